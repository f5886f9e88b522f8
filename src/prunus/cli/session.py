"""What every command does around its work: keep standard output clean, take an interruption well, print the result."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import typer

from prunus.progress import Progress, choose

# Libraries talk on standard error too much to read anything else there. A user's own setting wins.
QUIET_LIBRARIES = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

RESUMES = "Interrupted. The same command again continues after the last finished block."


@contextmanager
def working(*, quiet: bool, interrupted: str = "Interrupted.") -> Iterator[Progress]:
    """Work with a progress line, with nothing on standard output, until done or interrupted.

    Args:
        quiet: show no progress.
        interrupted: the sentence for Ctrl-C and for a polite kill; the exit code is 130.
    """
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    progress = choose(quiet=quiet)
    try:
        with _polite_kill(), redirect_stdout(sys.stderr), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield progress
    except KeyboardInterrupt:
        progress.close()
        print(f"\nprunus: {interrupted}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        progress.close()


@contextmanager
def _polite_kill() -> Iterator[None]:
    """SIGTERM, which schedulers send before they kill, is taken like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show(result: Mapping[str, Any], text: Callable[[Any], str], *, as_json: bool) -> None:
    """Print the result on standard output: as one JSON object, or as text. Only the first process prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    written = json.dumps(finite(result), ensure_ascii=False) if as_json else text(result)
    try:
        print(written.rstrip(), flush=True)
    except BrokenPipeError:
        # The reader has seen enough; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def finite(value: Any) -> Any:
    """The same data with null for numbers that JSON does not know (NaN, infinity)."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
