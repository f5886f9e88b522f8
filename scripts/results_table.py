"""Tables of what there is to choose from (the registries) and of what was measured (`benchmarks/results/*.json`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.methods import ELEMENTWISE
from prunus.methods.catalogue import rows as catalogue
from prunus.metrics import METRICS
from prunus.updates import UPDATES

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
# What stands beside each method in README: the column's name, and the options of the run in parity.json.
COLUMNS: dict[str, dict[str, Any]] = {
    "50 %": {},
    "2:4": {"pattern": "2:4"},
    "70 %": {"sparsity": 0.7},
    "70 %, OWL": {"sparsity": 0.7, "allocation": "owl"},
}
PROTOCOL = (
    "Perplexity of SmolLM2-135M-Instruct on 6 windows of 1,024 tokens of WikiText-2's test split, calibrated on 16 x "
    "512 tokens of its validation split; lower is better. Made by `benchmarks/parity.py`. Six windows serve comparison "
    "with the original code, not a ranking."
)


def methods() -> str:
    """One row for each method: its parts, paper, needs, and the perplexities measured with it."""
    rows = [row for row in catalogue() if row["kind"] == "method" and row["name"] in ELEMENTWISE]
    found = {(row["name"], name): _measured(row["name"], options) for row in rows for name, options in COLUMNS.items()}
    columns = [name for name in COLUMNS if any(found[row["name"], name] for row in rows)]
    lines = [[*_parts(row), *(found[row["name"], name] or "-" for name in columns)] for row in rows]
    head = ["method", "metric", "update", "ranks within", "needs", "paper"]
    below = PROTOCOL if columns else _missing("parity")
    return "\n\n".join([_table([*head, *columns], lines, right=range(len(head), len(head) + len(columns))), below])


def choices(kind: str) -> str:
    """One row for each name of a kind: metric, update, pattern or allocation."""
    rows = [row for row in catalogue() if row["kind"] == kind]
    settings = [", ".join(f"`{key} = {value}`" for key, value in row["defaults"].items()) or "-" for row in rows]
    lines = [[f"`{row['name']}`", _paper(row), text] for row, text in zip(rows, settings, strict=True)]
    return _table([kind, "paper", "settings"], lines)


def settings(kind: str, name: str) -> str:
    """The hyper-parameters of one part, with their defaults and the option that sets them."""
    row = next(row for row in catalogue() if (row["kind"], row["name"]) == (kind, name))
    if not row["defaults"]:
        return f"The {kind} `{name}` has no settings."
    lines = [[f"`--set {kind}.{key}=...`", f"`{value}`"] for key, value in row["defaults"].items()]
    return _table([f"{kind} `{name}`", "default"], lines)


def measured(file: str, *names: str) -> str:
    """The rows of `parity`, `time` or `memory`; of parity those whose name begins with one of `names`."""
    rows = _read(file)
    if file == "parity" and names:
        rows = {name: row for name, row in rows.items() if name.startswith(names)}
    if not rows:
        return _missing(file)
    return {"parity": _parity, "time": _time, "memory": _memory}[file](rows)


def _parity(rows: Mapping[str, Mapping[str, Any]]) -> str:
    head = ["run", "perplexity", "original code", "deviation", "matrices with equal masks"]
    lines = []
    for name, row in rows.items():
        masks = row.get("masks")
        lines.append([
            name,
            f"{row['perplexity']:,.2f}",
            "-" if row["original"] is None else f"{row['original']:,.2f}",
            "-" if row["deviation"] is None else f"{100 * row['deviation']:+.2f} %",
            f"{masks['matrices_equal']} of {masks['matrices']}" if masks else "-",
        ])  # fmt: skip
    return "\n\n".join([_table(head, lines, right=range(1, 5)), PROTOCOL])


def _time(rows: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows.values() for name in row["ratio_to_floor"]))
    lines = [
        [tokens, f"{row['seconds']['floor']:.1f} s", *(f"{row['ratio_to_floor'][name]:.2f} x" for name in names)]
        for tokens, row in rows.items()
    ]
    below = "Floor: two bare forward passes of all blocks over the tokens. Made by `benchmarks/time_to_prune.py`."
    return "\n\n".join([_table(["tokens", "floor", *names], lines, right=range(1, len(names) + 2)), below])


def _memory(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["on disk", "blocks", "parameters", "peak memory", "predicted"]
    lines = [
        [
            row["dtype on disk"],
            str(row["blocks"]),
            f"{row['parameters'] / 1e9:.2f} B",
            f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            f"{row['predicted_peak_bytes'] / 1e9:.2f} GB",
        ]
        for row in rows
    ]
    below = "Wanda on 8 x 256 tokens, random Llama shape 2,048 wide. Made by `benchmarks/memory.py`."
    return "\n\n".join([_table(head, lines, right=range(1, 5)), below])


def _parts(row: Mapping[str, Any]) -> list[str]:
    method = ELEMENTWISE[row["name"]]
    metric = next(name for name, part in METRICS.items() if part == method.metric)
    update = next(name for name, part in UPDATES.items() if part == method.update)
    link = f"[{row['name']}](docs/methods/{row['name']}.md)"
    return [link, metric, update, getattr(method.pattern, "group", "row"), _needs(row), _paper(row)]


def _paper(row: Mapping[str, Any]) -> str:
    """The paper with its number as a link; a dash if there is none."""
    linked = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", row["paper"])
    return re.sub(r"openreview (\w+)", r"[openreview](https://openreview.net/forum?id=\1)", linked) or "-"


def _needs(row: Mapping[str, Any]) -> str:
    return ", ".join(row["needs"]) or "weights alone"


def _measured(method: str, options: Mapping[str, Any]) -> str:
    """The perplexity of the run with exactly these options; of the original's rounding (`compat`) if of no other."""
    want = {"method": method, **options}
    runs = _read("parity").values()
    same = [run for run in runs if {key: value for key, value in run["options"].items() if key != "compat"} == want]
    same.sort(key=lambda run: "compat" in run["options"])
    return f"{same[0]['perplexity']:,.1f}" if same else ""


def _missing(file: str) -> str:
    return f"*No measurements here yet: `benchmarks/results/{file}.json` has no row for this.*"


def _read(file: str) -> Any:
    path = RESULTS / f"{file}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """A Markdown table; the columns in `right` are aligned to the right."""
    rule = ["--:" if number in set(right) else "---" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *lines))
