"""What low rank costs: perplexity of every row of `RANKS` at two shares, and of equal shares for all matrices.

    python experiments/lowrank.py --model smollm2 --folder SCRATCH

Each row is `prunus prune` on a few samples of a text and `prunus evaluate` on the first windows of another, the same
for all. Rows that are in `experiments/results/lowrank.json` are not run again; the table in
docs/lowrank.md is written anew from that file after every row.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import prunus
from prunus.methods import RANKS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "lowrank.json"
PAGE = ROOT / "docs" / "lowrank.md"
BEGIN, END = "<!-- lowrank:begin -->", "<!-- lowrank:end -->"


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--folder", type=Path, help="where pruned models are made; not needed with --table")
    parser.add_argument("--shares", default="0.1,0.2")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--calibration", default="wikitext2", help="text to calibrate on")
    parser.add_argument("--text", default="wikitext2", help="text to evaluate on")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--table", action="store_true", help="only write the table")
    asked = parser.parse_args()
    if not asked.table:
        if asked.folder is None:
            parser.error("--folder is missing")
        asked.folder.mkdir(parents=True, exist_ok=True)
        for share in map(float, asked.shares.split(",")):
            for method, ranks in [*((name, "global") for name in reversed(RANKS)), ("svd-llm", "uniform")]:
                run(asked, method, ranks, share)
    write_table()


def run(asked: argparse.Namespace, method: str, ranks: str, share: float) -> None:
    """One row, unless it is there."""
    setting = {"samples": asked.samples, "length": asked.length, "windows": asked.windows, "window": asked.window}
    setting |= {"calibration": Path(asked.calibration).name, "text": Path(asked.text).name}
    key = {"model": Path(asked.model).name, "method": method, "ranks": ranks, "sparsity": share, **setting}
    if any(all(row[name] == value for name, value in key.items()) for row in rows()):
        return
    out = asked.folder / "out"
    pruned = prunus.prune(
        asked.model, out, method=method, sparsity=share, samples=asked.samples, length=asked.length,
        settings={"method.ranks": ranks}, calibration=asked.calibration, overwrite=True, restart=True,
    )  # fmt: skip
    same = ("model", "text", "window", "windows")
    dense = next((row["dense"] for row in rows() if all(row[name] == key[name] for name in same)), 0.0)
    judged = prunus.evaluate(
        out, baseline=None if dense else asked.model, text=asked.text, length=asked.window, windows=asked.windows
    )
    row = {
        **key, "reached": pruned["sparsity"]["reached"], "split": pruned["shapes"]["split"], "of": pruned["sites"],
        "parameters": pruned["shapes"]["parameters"], "seconds": pruned["seconds"]["total"],
        "versions": pruned["versions"], **perplexities(judged, dense),
    }  # fmt: skip
    shutil.rmtree(out)
    RESULTS.write_text(json.dumps([*rows(), row], indent=1) + "\n", encoding="utf-8")
    write_table()


def perplexities(judged: dict[str, Any], dense: float) -> dict[str, float]:
    """Of the result and of the dense model."""
    found = {"perplexity": judged["perplexity"]}
    return found | {"dense": dense or judged["baseline"]["perplexity"]}


def rows() -> list[dict[str, Any]]:
    """What was measured so far."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else []


def write_table() -> None:
    """The table of the page, from the file alone."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    kinds = dict.fromkeys((row["model"], row["samples"], row["text"], row["windows"]) for row in rows())
    tables = [
        _table([row for row in rows() if (row["model"], row["samples"], row["text"], row["windows"]) == kind])
        for kind in kinds
    ]
    table = "\n\n".join(tables)
    PAGE.write_text(f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def _table(found: list[dict[str, Any]]) -> str:
    """One model's rows, with what they share in front."""
    one = found[0]
    words = (
        f"{one['model']}, one shot, no recovery; {one['samples']} x {one['length']} tokens of {one['calibration']}, "
        f"perplexity on the first {one['windows']} x {one['window']:,} tokens of {one['text']}, dense "
        f"{one['dense']:.2f} (`experiments/lowrank.py`):\n"
    )
    lines = ["| removed | method | ranks | matrices split | perplexity |", "|---|---|---|---|---|"]
    lines += [
        f"| {100 * row['reached']:.2f} % | {row['method']} | {row['ranks']} | {row['split']} of {row['of']} | "
        f"{row['perplexity']:.2f} |"
        for row in sorted(found, key=lambda row: (row["sparsity"], row["perplexity"]))
    ]
    return "\n".join([words, *lines])


if __name__ == "__main__":
    main()
