"""The experiment that decides about presets: metric × allocation × update × pattern, judged on held-out text.

    python experiments/grid.py screen --model tests/assets/stories260k --text TEXT --out screen.jsonl
    python experiments/grid.py screen --model smollm2 --allocations uniform owl … --out …
    python experiments/grid.py table --out screen.jsonl

Each run is a line of JSON, written when it is done; what the file already holds is not run again. `--minutes` stops
after a run, to go on another day. Runs are in order of rising cost: what is cheap is known first.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from harness import judge

from prunus.allocations import ALLOCATIONS
from prunus.errors import PrunusError
from prunus.metrics import METRICS
from prunus.updates import UPDATES

SHAPES: dict[str, dict[str, Any]] = {
    "50": {"sparsity": 0.5},
    "60": {"sparsity": 0.6},
    "70": {"sparsity": 0.7},
    "80": {"sparsity": 0.8},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "4:16": {"pattern": "4:16"},
}
# What each metric ranks over where nothing else is said, as in its paper.
GROUPS = {"magnitude": "matrix", "obs": "matrix"}


def runs(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and `prune` part of every run."""
    for shape, update, metric, allocation in product(
        arguments.shapes, arguments.updates, arguments.metrics, arguments.allocations
    ):
        settings = {} if ":" in shape else {"pattern.group": GROUPS.get(metric, "row")}
        if allocation == "ecoflap":
            settings["allocation.order"] = "first"  # the zeroth order answers the same question in hours
        yield f"{metric} {allocation} {update} {shape}", {
            "method": "wanda", "metric": metric, "update": update, "allocation": allocation, "settings": settings,
            **SHAPES[shape],
        }  # fmt: skip


def screen(arguments: argparse.Namespace) -> None:
    """Run what is missing in the result file."""
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    done = {row["name"] for row in read(arguments.out)}
    begun = time.monotonic()
    texts = {"text": {"text": arguments.text, "length": arguments.window, "indices": list(range(arguments.windows))}}
    calibration = {"source": arguments.calibration, "samples": arguments.samples, "length": arguments.length}
    for name, prune in [("dense", {"sparsity": 0.0, "method": "magnitude"}), *runs(arguments)]:
        if name in done:
            continue
        if time.monotonic() - begun > 60 * arguments.minutes:
            print("time is up; the same command goes on")
            return
        row = {"name": name, "model": Path(arguments.model).name, "dtype": arguments.dtype, "prune": prune}
        try:
            row |= judge(arguments.model, prune, calibration, texts, arguments.dtype)
        except PrunusError as refused:
            row["refused"] = str(refused)
        with arguments.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:40s} {row.get('perplexity', row.get('refused'))}", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file; a last line that was cut off is dropped."""
    rows = []
    for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def table(arguments: argparse.Namespace) -> None:
    """Perplexities by shape, the best combinations first, with the paired difference to the first row."""
    rows = [row for row in read(arguments.out) if "windows" in row]
    for shape in SHAPES:
        found = [row for row in rows if row["name"].endswith(f" {shape}")]
        found.sort(key=lambda row: row["perplexity"]["text"])
        for row in found[: arguments.top]:
            best = found[0]["windows"]["text"]
            gap = torch.tensor(row["windows"]["text"]) - torch.tensor(best)
            error = float(gap.std()) / math.sqrt(len(gap)) if len(gap) > 1 else float("nan")
            print(
                f"{shape:5s} {row['name']:40s} {row['perplexity']['text']:10.3f}  "
                f"+{float(gap.mean()):.4f} ± {error:.4f} nats  {row['seconds']['total']:.1f} s"
            )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["screen", "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--calibration", default="wikitext2")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="auto", help="bfloat16 is three times as fast where the processor has it")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--updates", nargs="+", choices=UPDATES, default=list(UPDATES))
    parser.add_argument(
        "--allocations", nargs="+", choices=ALLOCATIONS, default=[name for name in ALLOCATIONS if name != "manual"]
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--top", type=int, default=12)
    arguments = parser.parse_args()
    {"screen": screen, "table": table}[arguments.command](arguments)


if __name__ == "__main__":
    main()
