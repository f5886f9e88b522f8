"""What a language model learns of a Markov chain by reading it: the claims of llmICL and of the SGD paper, measured.

Each chain is one line of the result file; what is there is skipped, so that it can be stopped at any moment.

    python experiments/forecast.py run --model smollm2 --out results.jsonl --minutes 4
    python experiments/forecast.py table --out results.jsonl
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prunus.data.tokens import head_token, load_tokenizer
from prunus.evaluation.loading import load_model
from prunus.forecasting import chain
from prunus.forecasting.baselines import PRIOR, bigram_kernel
from prunus.forecasting.kernel import read_kernel
from prunus.forecasting.probe import counting, distances, power, random_chain, read_errors
from prunus.forecasting.serial import Alphabet, Scale, probe_number_tokenizer
from prunus.models.source import locate
from prunus.versions import versions

SEEDS = 3
OU = {"points": 500, "mean": 2.0, "pull": 0.1, "spread": 0.2}
CONTEXT = {"states": 3, "length": 1000}


def tasks() -> Iterator[tuple[str, int]]:
    """Kinds and seeds, so that the first lines already say something about each claim."""
    for seed, kind in itertools.product(range(SEEDS), ("ou", "context")):
        yield kind, seed


def context(model: Any, alphabet: Alphabet, seed: int) -> dict[str, Any]:
    """The distance to the true law of the next state, in windows of growing context, for model and counting."""
    kernel, path = random_chain(CONTEXT["states"], CONTEXT["length"], np.random.default_rng(seed))
    errors = read_errors(model, kernel, path, alphabet)
    others = distances(kernel[path], counting(path, len(kernel)))
    edges = np.unique(np.geomspace(10, len(path), 9).astype(int))
    windows = [(int(low), int(high)) for low, high in itertools.pairwise(edges)]
    exponent, fit = power(errors)
    return {
        "exponent": exponent, "fit": fit, "windows": windows,
        "errors": [float(errors[low:high].mean()) for low, high in windows],
        "counting": [float(others[low:high].mean()) for low, high in windows],
    }  # fmt: skip


def ou(model: Any, alphabet: Alphabet, seed: int) -> dict[str, Any]:
    """The stationary law of x' = x - pull (x - mean) + spread·noise read from its path; W1 as a share of all states."""
    generator = np.random.default_rng(100 + seed)
    width = OU["spread"] / np.sqrt(1 - (1 - OU["pull"]) ** 2)
    values = [OU["mean"] + width * generator.standard_normal()]
    while len(values) < OU["points"]:
        values.append(values[-1] - OU["pull"] * (values[-1] - OU["mean"]) + OU["spread"] * generator.standard_normal())
    scale = Scale.of(np.array(values), 2)
    states, grid = scale.bins(np.array(values)), scale.values(np.arange(scale.states))
    true = np.exp(-0.5 * ((grid - OU["mean"]) / width) ** 2)
    true /= true.sum()
    reading = read_kernel(model, states, alphabet, 2)
    laws = {
        "model": chain.stationary(chain.regular(chain.fill(reading.rows, scale.states))),
        "bigram": chain.stationary(bigram_kernel(states, scale.states, PRIOR)),
        "histogram": np.bincount(states, minlength=scale.states) / len(states),
    }
    centre = grid[:, None] - OU["pull"] * (grid[:, None] - OU["mean"])
    kernel = np.exp(-0.5 * ((grid[None] - centre) / OU["spread"]) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    rows = [chain.wasserstein(row, kernel[state]) / scale.states for state, row in reading.rows.items()]
    return {
        "w1": {name: chain.wasserstein(law, true) / scale.states for name, law in laws.items()},
        "mean_error": {name: float(law @ grid - OU["mean"]) for name, law in laws.items()},
        "row_w1": statistics.fmean(rows), "visited": len(reading.rows), "surprise": float(reading.surprise.mean()),
    }  # fmt: skip


RUNS = {"context": context, "ou": ou}


def run(name: str, out: Path, minutes: float, kinds: Sequence[str]) -> None:
    """Add the lines that are missing, until the time is up."""
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()] if out.exists() else []
    done = {(line["model"], line["kind"], line["seed"]) for line in lines}
    left = [(kind, seed) for kind, seed in tasks() if kind in kinds and (name, kind, seed) not in done]
    if not left:
        return
    folder = locate(name)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    head = head_token(tokenizer, "auto")
    alphabet = probe_number_tokenizer(tokenizer, () if head is None else (head,))
    begun = time.monotonic()
    for kind, seed in left:
        started = time.monotonic()
        result = RUNS[kind](model, alphabet, seed)
        line = {"model": name, "kind": kind, "seed": seed, "seconds": round(time.monotonic() - started, 1), **result}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "versions": versions()}) + "\n")
        print(json.dumps({key: line[key] for key in ("model", "kind", "seed", "seconds")}), flush=True)
        if time.monotonic() - begun > 60 * minutes:
            return


def table(out: Path) -> None:
    """What docs/forecast.md shows."""
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    for name in dict.fromkeys(line["model"] for line in lines):
        own = [line for line in lines if line["model"] == name and line["kind"] == "context"]
        if own:
            print(f"\n{name}: distance to the true law, {CONTEXT['states']} states, mean of {len(own)} chains\n")
            print("| context | model | counting |\n|---|---:|---:|")
            for place, (low, high) in enumerate(own[0]["windows"]):
                cells = [statistics.fmean(line[kind][place] for line in own) for kind in ("errors", "counting")]
                print(f"| {low}-{high} | {cells[0]:.4f} | {cells[1]:.4f} |")
            fits = ", ".join(f"t^-{line['exponent']:.2f} (R² {line['fit']:.2f})" for line in own)
            print(f"\nfalls as {fits}")
        own = [line for line in lines if line["model"] == name and line["kind"] == "ou"]
        if own:
            print(f"\n{name}: stationary law of OU after {OU['points']} points, W1 as a share of the range of states\n")
            print("| seed | model | bigram | histogram | mean of a row |\n|---|---:|---:|---:|---:|")
            for line in own:
                cells = " | ".join(f"{line['w1'][kind]:.4f}" for kind in ("model", "bigram", "histogram"))
                print(f"| {line['seed']} | {cells} | {line['row_w1']:.4f} |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4, help="begin no further chain after so long")
    parser.add_argument("--kinds", nargs="+", choices=list(RUNS), default=list(RUNS))
    given = parser.parse_args()
    if given.command == "run":
        run(given.model, given.out, given.minutes, given.kinds)
    else:
        table(given.out)


if __name__ == "__main__":
    main()
