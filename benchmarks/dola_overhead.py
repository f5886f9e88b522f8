"""What DoLa costs beside plain greedy decoding: the same prompts by both in turns, seconds for each token.

    python benchmarks/dola_overhead.py [--model smollm2] [--candidates 8] [--tokens 32] [--rounds 7] [--threads 2]

Both go through `generate` with a cache; the first token, which is the prompt's, is not counted. A round is one text by
each; the median of the rounds' ratios counts, since a busy moment then hits both. CPU time is kept too: on a machine
that does other things it says more, with one thread. Writes `benchmarks/results/dola_overhead.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import prunus
from prunus.data.tokens import load_tokenizer
from prunus.decoding.dola.options import Dola
from prunus.evaluation.loading import load_model
from prunus.models.source import locate
from prunus.versions import decisive

RESULTS = Path(__file__).parent / "results" / "dola_overhead.json"
PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a ship that",
    "Water boils at",
    "The first person who walked on the moon",
)


class Clock:
    """A criterion that never stops, and notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """False for every sequence."""
        self.times.append((time.perf_counter(), time.process_time()))
        return torch.zeros(len(ids), dtype=torch.bool)


def seconds(model: Any, given: Any, tokens: int, dola: Dola | None) -> tuple[float, float]:
    """Of the clock and of CPUs, medians over the tokens but the first."""
    clock = Clock()
    how = {"custom_generate": prunus.dola_generate, "dola": dola} if dola else {}
    model.generate(
        **given, **how, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0,
        repetition_penalty=1.0, stopping_criteria=[clock],
    )  # fmt: skip
    steps = list(itertools.pairwise(clock.times))
    wall, cpu = (statistics.median(after[kind] - before[kind] for before, after in steps) for kind in (0, 1))
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    logging.getLogger("prunus").setLevel(logging.ERROR)  # of the repetition penalty, the same for both here
    torch.set_num_threads(given.threads)
    folder = locate(given.model)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    blocks = model.config.get_text_config().num_hidden_layers
    layers = tuple(range(2, blocks, 2))[: given.candidates]
    ways = {"plain": None, "dola": Dola(layers)}
    batches = [tokenizer([text], return_tensors="pt") for text in PROMPTS]
    for dola in ways.values():
        seconds(model, batches[0], 4, dola)  # once unmeasured
    found: dict[str, list[float]] = {name: [] for name in ways}
    cpus: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds):
        batch = batches[number % len(batches)]
        # Who begins changes, so that neither always runs behind the other.
        for name in list(ways)[:: 1 if number % 2 else -1]:
            wall, cpu = seconds(model, batch, given.tokens, ways[name])
            found[name].append(wall)
            cpus[name].append(cpu)
        ratio, work = (kind["dola"][-1] / kind["plain"][-1] for kind in (found, cpus))
        print(f"round {number + 1}: DoLa takes {ratio:.3f} times as long, {work:.3f} times the CPU time", flush=True)
    ratios, works = ([dola / plain for plain, dola in zip(*kind.values(), strict=True)] for kind in (found, cpus))
    record = {
        "model": given.model, "layers": layers, "tokens": given.tokens, "rounds": given.rounds,
        "threads": given.threads, "seconds": {name: statistics.median(values) for name, values in found.items()},
        "lowest": {name: min(values) for name, values in found.items()}, "ratios": ratios,
        "overhead": statistics.median(ratios) - 1, "cpu_overhead": statistics.median(works) - 1,
        "processor": platform.processor(), "versions": decisive(),
    }  # fmt: skip
    given.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    lowest = {name: min(values) for name, values in cpus.items()}
    print(
        f"{len(layers)} candidates, {given.threads} threads: plain {1e3 * record['seconds']['plain']:.1f} ms, DoLa "
        f"{1e3 * record['seconds']['dola']:.1f} ms a token (medians); overhead {100 * record['overhead']:+.1f} % "
        f"(median of {given.rounds} rounds), lowest over lowest "
        f"{100 * (record['lowest']['dola'] / record['lowest']['plain'] - 1):+.1f} %"
    )
    print(
        f"CPU time: overhead {100 * record['cpu_overhead']:+.1f} %; lowest {1e3 * lowest['plain']:.1f} and "
        f"{1e3 * lowest['dola']:.1f} ms, {100 * (lowest['dola'] / lowest['plain'] - 1):+.1f} %"
    )


if __name__ == "__main__":
    main()
