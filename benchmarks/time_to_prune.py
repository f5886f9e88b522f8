"""Seconds to prune, as a multiple of the floor: two bare forward passes of all blocks over the calibration tokens.

    python benchmarks/time_to_prune.py [--model smollm2] [--samples 16 64] [--rounds 3] [--out FILE.json]

Floor and methods are interleaved, round by round, in one process; medians of the ratios within a round are printed.
What is timed of a method is everything between loading the first block and the last block's shard on disk; reloading
the result in a fresh process and starting Python are not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from prunus.distributed import Processes
from prunus.engine import prune
from prunus.gather import Gatherer
from prunus.job import prepare
from prunus.recipe import Recipe


@torch.no_grad()
def floor(recipe: Recipe, out: Path) -> float:
    """Seconds of two forward passes of every block over the batches, with nothing else between."""
    job = prepare(recipe, out, overwrite=True, processes=Processes(), warnings=[])
    seconds = 0.0
    for step in job.stream.walk(job.batches, frozenset()):
        for _ in range(2):
            begun = time.perf_counter()
            job.stream._run(step.block, job.batches, Gatherer(step.block, frozenset()))
            seconds += time.perf_counter() - begun
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--samples", type=int, nargs="+", default=[16, 64], help="of 512 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/time.json"))
    arguments = parser.parse_args()
    rows = {}
    for samples in arguments.samples:
        ratios: dict[str, list[float]] = {name: [] for name in arguments.methods}
        seconds: dict[str, list[float]] = {name: [] for name in ["floor", *arguments.methods]}
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                common = {"model": arguments.model, "calibration": {"samples": samples, "length": 512}}
                bare = floor(Recipe(**common), out)
                seconds["floor"].append(bare)
                for name in arguments.methods:
                    result = prune(Recipe(**common, prune={"method": name}), out, overwrite=True)
                    shutil.rmtree(out)
                    seconds[name].append(result["seconds"]["prune"])
                    ratios[name].append(result["seconds"]["prune"] / bare)
        rows[f"{samples} x 512"] = {
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "ratio_to_floor": {name: statistics.median(values) for name, values in ratios.items()},
            "rounds": arguments.rounds,
            "threads": torch.get_num_threads(),
            "versions": result["versions"],
        }
        print(f"{samples} x 512", json.dumps(rows[f"{samples} x 512"]["ratio_to_floor"]),
              json.dumps(rows[f"{samples} x 512"]["seconds"]), flush=True)  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
