"""Seconds of the reverse walk (gradients of the loss for every matrix), as a multiple of one forward pass.

    python benchmarks/gradient_time.py [--model smollm2] [--samples 8] [--rounds 3] [--out FILE.json]

The forward pass is that of all blocks and the head over the same samples, one by one, in the same process; rounds are
interleaved, medians of the ratios printed. Both read blocks from disk; the reverse walk also keeps their inputs there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from prunus.distributed import Processes
from prunus.evidence import Evidence
from prunus.job import Job, prepare
from prunus.loss import language_loss
from prunus.progress import Silent
from prunus.recipe import Recipe


@torch.no_grad()
def forward(job: Job) -> float:
    """Seconds of one pass through all blocks and the head, with the loss."""
    begun = time.perf_counter()
    for _ in job.stream.walk(job.batches, frozenset()):
        pass
    with job.stream.ends() as ends:
        for batch in job.batches[:-1]:
            assert batch.hidden is not None
            language_loss(ends(batch.inputs, {job.stream.blocks[-1].tower: batch.hidden}), batch.inputs["input_ids"])
    return time.perf_counter() - begun


def main() -> None:
    """Read the command line, measure, print and keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--samples", type=int, default=8, help="of 512 tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gradient_time.json"))
    arguments = parser.parse_args()
    text = {"samples": arguments.samples, "length": 512}
    recipe = Recipe(model=arguments.model, calibration=text, prune={"method": "gblm"})
    rows = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            job = prepare(recipe, Path(folder) / "out", overwrite=False, processes=Processes(), warnings=[])
            job.begin(restart=True)
            once = forward(job)
            evidence = Evidence(job.stream, job.batches, job.work, Silent(), job.needs)
            begun = time.perf_counter()
            evidence.prepare()
            rows.append({"forward": once, "gradients": time.perf_counter() - begun})
            job.work.close()
    ratio = statistics.median(row["gradients"] / row["forward"] for row in rows)
    result = {"ratio": ratio, "rounds": rows, "samples": arguments.samples, "threads": torch.get_num_threads()}
    print(json.dumps(result))
    arguments.out.write_text(json.dumps({**result, "versions": job.versions}, indent=1) + "\n")


if __name__ == "__main__":
    main()
