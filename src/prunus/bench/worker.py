"""One engine in a process of its own: python -m prunus.bench.worker MODULE FOLDER VARIANT.

Says on standard output, one JSON object a line, what it holds, and then for every order
`{"phase": "prefill" | "decode", "ids": [...], "tokens": N}` on standard input the seconds it took.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from prunus import memory
from prunus.errors import PrunusError


def main() -> None:
    """Load, answer orders, end with the input."""
    module, folder, variant = sys.argv[1:]
    # Libraries print; what they print shall not stand among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        runner = import_module(module).open(Path(folder), variant)
    except (PrunusError, ImportError, MemoryError) as problem:
        _say(answers, {"refused": str(problem) or type(problem).__name__})
        return
    _say(answers, {"bytes_per_token": runner.bytes_per_token, "file_bytes": runner.file_bytes})
    for line in sys.stdin:
        order = json.loads(line)
        if order["phase"] == "prefill":
            seconds = runner.prefill(order["ids"])
        else:
            seconds = runner.decode(order["ids"], order["tokens"])
        _say(answers, {"seconds": seconds, "peak_rss_bytes": memory.peak()})


def _say(answers: TextIO, what: dict[str, Any]) -> None:
    print(json.dumps(what), file=answers, flush=True)


if __name__ == "__main__":
    main()
