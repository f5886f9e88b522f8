"""Tables of what benchmarks/speed.py, greedy.py, pattern_cost.py, frontier.py and dola_overhead.py measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
SCRATCH = re.compile(r"\S*/prunus-bench-[^/\s]+/")  # where a benchmark made its files, gone by now
ALIKE = ("windows", "length", "text", "method", "samples", "threads")  # rows of a frontier compare where these agree
NAMES = {"smollm2": "SmolLM2-135M", "1.1b": "1.1 B"}
# What was promised: words, variant of speed.py, baseline, phase, and by model what to reach and what to aim at.
SMALL, LARGE = "smollm2", "1.1b"
FREE, CAPPED, FOUR = "int8-unstructured", "int8-capped", "int4-capped"
Q8, Q4, DENSE = "llama.cpp-q8_0", "llama.cpp-q4_0", "dense-int8"
GOALS: tuple[tuple[str, str, str, str, dict[str, tuple[float, float]]], ...] = (
    ("lossless over transformers float32", "lossless-unstructured", "hf-fp32", "decode", {SMALL: (8, 10)}),
    ("lossless over transformers bfloat16", "lossless-unstructured", "hf-bf16", "decode", {SMALL: (5, 7)}),
    ("int8 over transformers float32", FREE, "hf-fp32", "decode", {SMALL: (12, 20), LARGE: (6, 12)}),
    ("int8 over transformers bfloat16", FREE, "hf-bf16", "decode", {SMALL: (8, 13), LARGE: (3.5, 7)}),
    ("int8 over llama.cpp Q8_0", FREE, Q8, "decode", {SMALL: (1.5, 2.5), LARGE: (1.5, 2.5)}),
    ("int8 capped 6/16 over llama.cpp Q4_0", CAPPED, Q4, "decode", {SMALL: (1.8, 2.5), LARGE: (1.4, 1.8)}),
    ("int4 capped 6/16 over llama.cpp Q4_0", FOUR, Q4, "decode", {SMALL: (2.2, 3), LARGE: (1.7, 2.3)}),
    ("int8 over our dense int8 loop", FREE, DENSE, "decode", {SMALL: (1.05, 1.3), LARGE: (1.05, 1.3)}),
    ("int8 capped 6/16 over our dense int8 loop", CAPPED, DENSE, "decode", {SMALL: (1.3, 1.7), LARGE: (1.3, 1.7)}),
    ("int8 4:16 (75 %) over our dense int8 loop", "int8-4:16", DENSE, "decode", {SMALL: (1.6, 2.2), LARGE: (1.6, 2.2)}),
    ("prefill, int8 over transformers float32", FREE, "hf-fp32", "prefill", {SMALL: (1.4, 2), LARGE: (1.4, 2)}),
)  # fmt: skip


def speed(kind: str = "short") -> str:
    """`short`: the ratios that were promised, missed ones too. `long`: tokens a second of every engine and variant."""
    record = _read("speed.json")
    if not record:
        return _missing("benchmarks/speed.py --folder SCRATCH")
    return {"short": _goals, "long": _engines}[kind](record)


def _goals(record: Mapping[str, Mapping[str, Any]]) -> str:
    lines: list[list[str]] = []
    notes: set[str] = set()
    for words, variant, baseline, phase, goals in GOALS:
        for model, (reach, aim) in goals.items():
            found = _ratio(record.get(model, {}).get(variant), baseline, phase)
            if found is None:
                continue
            verdict = "aim reached" if found >= aim else "reached" if found >= reach else "**missed**"
            # A baseline that was held back makes its ratio larger: no table may show the one without the other.
            rows = [row for row in record[model][variant]["rows"] if row["engine"] == baseline]
            held = {row["note"] for row in rows if row.get("note")}
            notes |= {f"\\* {baseline.partition('-')[0]}: {note}." for note in held}
            measured = f"{found:.2f} ×" + ("\\*" if held else "")
            lines.append([words, NAMES[model], measured, f"{reach:g} ×", f"{aim:g} ×", verdict])
    if not lines:
        return _missing("benchmarks/speed.py --folder SCRATCH")
    head = ["70 % removed, tokens a second", "model", "measured", "to reach", "aim", ""]
    return "\n\n".join([_table(head, lines, right=(2, 3, 4)), *sorted(notes), _how(record)])


def _ratio(found: Mapping[str, Any] | None, baseline: str, phase: str) -> float | None:
    """The packed engine's tokens a second over the baseline's in the same run; None where one was not measured."""
    rates = {row["engine"]: row["tokens_per_second"] for row in (found or {}).get("rows", ()) if row["phase"] == phase}
    own = next((rate for engine, rate in rates.items() if engine.startswith("packed-")), None)
    return own / rates[baseline] if own is not None and baseline in rates else None


def _engines(record: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for model, variants in record.items():
        lines = []
        for variant, found in variants.items():
            phases = {(row["engine"], row["phase"]): row for row in found["rows"]}
            for engine in dict.fromkeys(row["engine"] for row in found["rows"]):
                one = phases[engine, "decode"]
                own = engine.startswith("packed-")
                cells = [f"{phases[engine, phase]['tokens_per_second']:,.1f}" for phase in ("decode", "prefill")]
                sizes = [f"{one[key] / 1e6:,.0f}" for key in ("bytes_per_token", "file_bytes", "peak_rss_bytes")]
                lines.append([variant if own else "", engine + ("\\*" if one.get("note") else ""), *cells, *sizes])
        head = ["variant", "engine", "decode, tokens/s", "prefill", "MB read a token", "MB of weights", "peak MB"]
        parts.append(f"{NAMES.get(model, model)}:\n\n{_table(head, lines, right=range(2, 7))}")
    notes = {row["note"] for variants in record.values() for found in variants.values() for row in found["rows"]
             if row.get("note")}  # fmt: skip
    skipped = {
        f"{item['engine']} beside {variant}: {SCRATCH.sub('', item['why'])}"
        for variants in record.values() for variant, found in variants.items() for item in found["skipped"]
    }  # fmt: skip
    below = [f"\\* {note}." for note in sorted(notes)] + [f"Not measured: {why}" for why in sorted(skipped)]
    return "\n\n".join([*parts, *below, _how(record)])


def _how(record: Mapping[str, Mapping[str, Any]]) -> str:
    found = [one for variants in record.values() for one in variants.values()]
    said = sorted({f"{one['isa']} kernels, {one['threads']} threads" for one in found})
    # What a ratio of two medians is worth: on a busy machine less than its digits say.
    worst = max((row.get("spread", 1.0) for one in found for row in one["rows"]), default=1.0)
    words = f" Of one engine the slowest round took up to {worst:.1f} times as long as the quickest."
    apart = words if worst > 1 else ""
    return (
        f"Engines in turns, medians; {'; '.join(said)}.{apart} Made by `benchmarks/speed.py`; weights removed by "
        "magnitude."
    )


def greedy() -> str:
    """Whether the engine writes what transformers writes."""
    found = _read("greedy.json")
    if not found:
        return _missing("benchmarks/greedy.py --folder SCRATCH")
    prompts, total = found["prompts"], found["prompts"] * found["tokens"]
    return (
        f"{NAMES.get(found['model'], found['model'])} at {100 * found['sparsity']:g} %, lossless, {prompts} prompts of "
        f"WikiText-2, {found['tokens']} tokens each, greedily, against transformers in float32: {found['equal']:,} of "
        f"{total:,} choices equal, {found['near_ties']} near-ties (logits closer than 1e-3), {found['different']} "
        f"others; {found['texts_equal_without_help']} of {prompts} texts equal to the end. Made by "
        "`benchmarks/greedy.py`."
    )


def pattern_cost() -> str:
    """Perplexity of each pattern at each sparsity, and what it costs over free unstructured."""
    record = _read("pattern_cost.json")
    rows = record.get("rows") or ()
    if not rows:
        return _missing("benchmarks/pattern_cost.py")
    free = {row["sparsity"]: row["perplexity"] for row in rows if row["pattern"] == "unstructured"}
    lines = []
    for row in rows:
        base = free.get(row["sparsity"])
        cost = f"{100 * (row['perplexity'] / base - 1):+.1f} %" if base and row["pattern"] != "unstructured" else ""
        lines.append([f"{100 * row['sparsity']:g} %", row["pattern"], f"{row['perplexity']:,.2f}", cost])
    below = (
        f"{NAMES.get(record['model'], record['model'])}, {record['metric']}, {record['samples']} samples, "
        f"{record['windows']} windows of {record['length']} tokens. Made by `benchmarks/pattern_cost.py`."
    )
    head = ["removed", "pattern", "perplexity", "over unstructured"]
    return "\n\n".join([_table(head, lines, right=(0, 2, 3)), below])


def frontier(model: str = "smollm2") -> str:
    """Every packed variant and llama.cpp's of a model: perplexity, speed, size, and which no other beats in all.

    Rows that were measured otherwise (on other windows, by another method) are not comparable: each way has a table.
    """
    path = RESULTS / "frontier.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in map(json.loads, lines):
        if row["model"] == model:
            alike.setdefault(tuple(row[key] for key in ALIKE), []).append(row)
    if not alike:
        return _missing(f"benchmarks/frontier.py run --model {model} --folder SCRATCH")
    picture = RESULTS.parent.parent / "docs" / f"frontier-{Path(model).name}.svg"
    # The picture is of one way alone; benchmarks/frontier.py refuses to draw more.
    shown = [f"![Perplexity against decode speed and size]({picture.name})"] if picture.is_file() else []
    return "\n\n".join([*(shown if len(alike) == 1 else []), *(_frontier(model, rows) for rows in alike.values())])


def _frontier(model: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of rows that were measured alike."""
    cells = []
    for row in sorted(rows, key=lambda row: row["perplexity"]):
        speeds = ["-", "-"] if row["speed"] is None else [f"{row['tokens_per_second']:,.1f}", f"{row['speed']:.2f} ×"]
        best = "yes" if not any(_beats(other, row) for other in rows) else ""
        name = row["name"] + ("\\*" if row.get("note") else "")
        cells.append([name, f"{row['perplexity']:,.2f}", *speeds, f"{row['file_bytes'] / 1e6:,.1f}", best])
    head = ["", "perplexity", "tokens/s", "over dense int8", "MB on disk", "beaten by none"]
    first = rows[0]
    noted: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            noted.setdefault(row["note"], []).append(row["name"])
    notes = [f"\\* {', '.join(names)}: {note}." for note, names in noted.items()]
    below = (
        f"{NAMES.get(model, model)}, {first['method']} on {first['samples']} samples; {first['windows']} windows of "
        f"{first['length']} tokens of {first['text']}; decoding on {first['threads']} threads, each beside our dense "
        "int8 loop in the same run. *Beaten by none*: nothing else here is at least as good in perplexity, speed and "
        "size and better in one. Made by `benchmarks/frontier.py`."
    )
    return "\n\n".join([_table(head, cells, right=range(1, 5)), *notes, below])


def _beats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """No worse in everything that both have, and better in something."""
    keys = [key for key in ("perplexity", "file_bytes", "speed") if one[key] is not None and other[key] is not None]
    # Larger is better of speed alone.
    gains = [(other[key] - one[key]) * (-1 if key == "speed" else 1) for key in keys]
    return min(gains) >= 0 and max(gains) > 0


def dola_overhead() -> str:
    """What DoLa costs a token."""
    record = _read("dola_overhead.json")
    if not record:
        return _missing("benchmarks/dola_overhead.py")
    seconds, lowest = record["seconds"], record["lowest"]
    line = [
        NAMES.get(record["model"], record["model"]), str(len(record["layers"])), str(record["threads"]),
        *(f"{1e3 * seconds[name]:.1f} ms" for name in ("plain", "dola")), f"{100 * record['overhead']:+.1f} %",
    ]  # fmt: skip
    head = ["model", "candidates", "threads", "plain greedy, a token", "DoLa", "overhead"]
    below = (
        f"Median of {record['rounds']} rounds in turns, {record['tokens']} tokens each; lowest over lowest "
        f"{100 * (lowest['dola'] / lowest['plain'] - 1):+.1f} %, CPU time {100 * record['cpu_overhead']:+.1f} %. "
        "Made by `benchmarks/dola_overhead.py`."
    )
    return "\n\n".join([_table(head, [line], right=range(1, 6)), below])


def _missing(command: str) -> str:
    return f"*Not measured yet: `python {command}`.*"


def _read(file: str) -> dict[str, Any]:
    path = RESULTS / file
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def _table(head: Sequence[str], lines: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    rule = ["--:" if number in set(right) else "---" for number in range(len(head))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *lines))
