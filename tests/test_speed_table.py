"""The tables of speeds say what the files of results say: ratios within one run, misses, what was not measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    sys.modules.pop("speed_table", None)
    import speed_table  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(speed_table, "RESULTS", tmp_path)
    return speed_table


def row(engine: str, rate: float, phase: str = "decode", note: str = "") -> dict[str, Any]:
    return {
        "engine": engine, "phase": phase, "tokens_per_second": rate, "bytes_per_token": 2e6, "file_bytes": 3e6,
        "peak_rss_bytes": 4e6, "note": note,
    }  # fmt: skip


def test_ratios_are_those_of_one_run_and_misses_are_said(tables: Any, tmp_path: Path) -> None:
    assert "Not measured yet" in tables.speed("short")
    engines = (("packed-int8", 100.0), ("hf-fp32", 10.0), ("dense-int8", 50.0), ("llama.cpp-q8_0", 80.0))
    rows = [row(name, rate / part, phase) for name, rate in engines for phase, part in (("decode", 1), ("prefill", 2))]
    rows[-1]["note"] = rows[-2]["note"] = "weights not repacked"
    rows[0]["spread"] = 1.76
    why = "it died on /tmp/prunus-bench-1a2b/dense"
    run = {"rows": rows, "isa": "avx2", "threads": 2, "skipped": [{"engine": "llama.cpp-q4_0", "why": why}]}
    (tmp_path / "speed.json").write_text(json.dumps({"smollm2": {"int8-unstructured": run}}))
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in tables.speed("short").splitlines()}
    assert "| 10.00 × | 12 × | 20 × | **missed** |" in lines["int8 over transformers float32"]
    assert "| 2.00 × | 1.05 × | 1.3 × | aim reached |" in lines["int8 over our dense int8 loop"]
    # The short table stands alone in README: a baseline that was held back is said there, too.
    assert "| 1.25 ×\\* | 1.5 × | 2.5 × | **missed** |" in lines["int8 over llama.cpp Q8_0"]
    assert "\\* llama.cpp: weights not repacked." in lines
    assert "the slowest round took up to 1.8 times as long" in tables.speed("short")
    assert not [line for line in lines if "bfloat16" in line or "int4" in line]  # not measured, so not there
    long = tables.speed("long")
    assert "| int8-unstructured | packed-int8 | 100.0 | 50.0 | 2 | 3 | 4 |" in long
    assert "llama.cpp-q8_0\\*" in long
    assert "\\* weights not repacked." in long
    assert "Not measured: llama.cpp-q4_0 beside int8-unstructured: it died on dense" in long


def test_a_pattern_costs_what_it_adds_to_unstructured(tables: Any, tmp_path: Path) -> None:
    rows = [
        {"sparsity": 0.5, "pattern": name, "perplexity": value} for name, value in (("unstructured", 50), ("8:16", 60))
    ]
    record = {"model": "smollm2", "metric": "wanda", "samples": 8, "windows": 6, "length": 512, "rows": rows}
    (tmp_path / "pattern_cost.json").write_text(json.dumps(record))
    assert "| 50 % | 8:16 | 60.00 | +20.0 % |" in tables.pattern_cost()


COMMON = {
    "model": "smollm2", "method": "wanda", "samples": 4, "windows": 2, "length": 256, "text": "t", "threads": 1,
}  # fmt: skip


def test_the_frontier_names_what_nothing_beats(tables: Any, tmp_path: Path) -> None:
    found = {
        "good": (10.0, 2.0, 100), "slower": (10.0, 1.0, 100), "smaller": (12.0, 1.0, 50), "untimed": (11.0, None, 200),
    }  # fmt: skip
    lines = [
        {"name": name, "perplexity": loss, "speed": speed, "tokens_per_second": speed, "file_bytes": size, **COMMON}
        for name, (loss, speed, size) in found.items()
    ]
    (tmp_path / "frontier.jsonl").write_text("\n".join(map(json.dumps, lines)))
    best = {
        line.split(" | ")[0].removeprefix("| "): line.endswith("| yes |") for line in tables.frontier().splitlines()
    }
    assert {name: best[name] for name in found} == {"good": True, "slower": False, "smaller": True, "untimed": False}


def test_rows_of_a_frontier_that_were_measured_otherwise_stand_apart(tables: Any, tmp_path: Path) -> None:
    # On fewer windows the perplexity is another number: it beats nothing, however low.
    lines = [
        {"name": name, "perplexity": loss, "speed": 1.0, "tokens_per_second": 1.0, "file_bytes": 9, **COMMON, **other}
        for name, loss, other in (("long", 12.0, {}), ("short", 10.0, {"windows": 1}), ("many", 11.0, {"samples": 8}))
    ]
    (tmp_path / "frontier.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shown = tables.frontier().split("Made by")
    assert len(shown) == 4
    assert all(
        f"| {row['name']} |" in part and part.count("| yes |") == 1 for row, part in zip(lines, shown, strict=False)
    )
    assert "2 windows of" in shown[0] and "1 windows of" in shown[1] and "on 8 samples" in shown[2]
