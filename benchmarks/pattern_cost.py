"""What a cap on windows of columns costs in perplexity, with and without an order of columns.

    python benchmarks/pattern_cost.py --model smollm2 --folder SCRATCH [--only capped:10/16]

Wanda on 32 samples of WikiText-2, perplexity on the first 8 windows of 1,024 tokens of its test split. Writes
`benchmarks/results/pattern_cost.json`, one row after the other; rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import prunus

RESULTS = Path(__file__).parent / "results" / "pattern_cost.json"
# Sparsity -> patterns beside the unstructured one: a cap a third above the mean, and at 50 % the exact 8:16.
CASES = {0.5: ("capped:10/16", "8:16"), 0.6: ("capped:8/16",), 0.7: ("capped:6/16",)}
SAMPLES, WINDOWS = 32, 8


def variants() -> list[tuple[float, str, bool]]:
    """Sparsity, pattern, whether columns are permuted."""
    rows: list[tuple[float, str, bool]] = []
    for sparsity, patterns in CASES.items():
        rows.append((sparsity, "unstructured", False))
        rows += [(sparsity, pattern, permute) for pattern in patterns for permute in (False, True)]
    return rows


def measure(model: str, folder: Path, sparsity: float, pattern: str, permute: bool) -> dict:
    """Prune, evaluate, remove."""
    out = folder / "pattern-cost"
    settings = {"pattern.permute": True} if permute else {}
    options = {"method": "wanda", "pattern": pattern, "settings": settings, "samples": SAMPLES, "overwrite": True}
    made = prunus.prune(model, out, sparsity=sparsity, **options)
    found = prunus.evaluate(out, length=1024, windows=WINDOWS)
    shutil.rmtree(out)
    return {
        "sparsity": sparsity, "pattern": pattern, "permute": permute, "reached": made["sparsity"]["reached"],
        "perplexity": found["perplexity"], "loss": found["loss"], "loss_stderr": found["loss_stderr"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", help="only one row: SPARSITY,PATTERN,0|1")
    given = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"model": given.model, "method": "wanda"}
    known |= {"samples": SAMPLES, "windows": WINDOWS, "versions": {"prunus": prunus.__version__}}
    rows = known.setdefault("rows", [])
    for sparsity, pattern, permute in variants():
        wanted = given.only in (None, f"{sparsity},{pattern},{int(permute)}")
        done = any((row["sparsity"], row["pattern"], row["permute"]) == (sparsity, pattern, permute) for row in rows)
        if wanted and not done:
            rows.append(measure(given.model, given.folder, sparsity, pattern, permute))
            print(rows[-1], flush=True)
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
