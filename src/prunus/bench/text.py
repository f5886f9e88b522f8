"""What `prunus bench` and `prunus doctor` print."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunus.text import bytes_text, pairs, table, wrap


def bench_text(result: Mapping[str, Any]) -> str:
    """One table for each phase, the packed engine first, and what was skipped."""
    setup, parts = result["setup"], []
    phases = {"decode": f"{setup['tokens']} tokens, one at a time", "prefill": f"{setup['prompt']} tokens"}
    for phase, what in phases.items():
        rows = [row for row in result["rows"] if row["phase"] == phase]
        first = rows[0]["tokens_per_second"]
        head = ["engine", "tokens/s", "packed is", "read a token", "weights", "peak memory"]
        cells = [
            [
                row["engine"], f"{row['tokens_per_second']:.1f}", f"{first / row['tokens_per_second']:.2f} x",
                bytes_text(row["bytes_per_token"]), bytes_text(row["file_bytes"]), bytes_text(row["peak_rss_bytes"]),
            ]
            for row in rows
        ]  # fmt: skip
        parts.append(f"{phase} ({what})\n\n{table(head, cells, right=range(1, 6))}")
    noted = {row["engine"]: row["note"] for row in result["rows"] if row["note"]}
    parts += [wrap(f"{engine}: {note}.") for engine, note in noted.items()]
    parts += [wrap(f"Skipped: {item['engine']}: {item['why']}") for item in result["skipped"]]
    parts.append(
        wrap(
            f"Medians of {setup['rounds']} rounds, engines in turns; {result['isa']} kernels, {result['threads']} "
            "threads each. Weights are as each engine stores them; llama.cpp and transformers keep the zeros."
        )
    )
    return "\n\n".join(parts)


def doctor_text(result: Mapping[str, Any]) -> str:
    """What runs here, and what is installed."""
    extras = {name: found["version"] or f"not installed ({found['for']})" for name, found in result["extras"].items()}
    runs = {
        "kernels": result["kernels"],
        "can run": ", ".join(result["runnable"]) or "none",
        "threads": str(result["threads"] or "-"),
        "processors": str(result["processors"]),
        "memory": bytes_text(result["memory_bytes"]),
    }
    parts = {"Runtime": runs, "Versions": result["versions"], "Extras": extras}
    return "\n\n".join(f"{name}\n{pairs(facts)}" for name, facts in parts.items())
