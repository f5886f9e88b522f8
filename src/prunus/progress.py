"""Progress of a long job: one line on a terminal, one line per block elsewhere, nothing when asked to be quiet.

Everything goes to standard error, so that standard output holds results alone.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


# Seconds below which a step was only skipped over.
INSTANT = 0.005


class Progress(Protocol):
    """What a job may say while it runs; it never needs an answer."""

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of `total` steps, such as the blocks of the model; it ends the stage before."""
        ...

    def advance(self, note: str = "", error: float | None = None) -> None:
        """One step is done. `note` names it (a block), `error` is its relative output error, >= 0."""
        ...

    def warn(self, text: str) -> None:
        """Say something that the user should know, without stopping."""
        ...

    def close(self) -> None:
        """The job is over, well or not; the line on the terminal is given back. May be called twice."""
        ...


class Silent:
    """Says nothing; the default of the Python functions."""

    def stage(self, name: str, total: int) -> None:
        """Nothing."""

    def advance(self, note: str = "", error: float | None = None) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing; warnings are also in the result."""

    def close(self) -> None:
        """Nothing."""


@dataclass
class Pace:
    """Where a stage stands. Steps that took no time were done by an earlier run and say nothing about the pace."""

    name: str
    total: int
    done: int = 0
    skipped: int = 0
    started: float = field(default_factory=time.monotonic)
    last: float = field(default_factory=time.monotonic)

    def step(self) -> None:
        """One step more."""
        now = time.monotonic()
        self.done += 1
        self.skipped += now - self.last < INSTANT
        self.last = now

    def left(self) -> float | None:
        """Seconds to go: seconds a step so far * steps to come; None before the first step."""
        worked = self.done - self.skipped
        return (self.last - self.started) / worked * (self.total - self.done) if worked else None

    def facts(self, error: float | None) -> str:
        """`error 0.0123  812 MB  1:02  2:10 left`."""
        memory, left = resident_bytes(), self.left()
        parts = [
            "" if error is None else f"error {error:.4f}",
            "" if memory is None else f"{memory / 1e6:,.0f} MB",
            clock(self.last - self.started),
            f"{clock(left)} left" if left is not None and self.done < self.total else "",
        ]
        return "  ".join(part for part in parts if part)


@dataclass
class Plain:
    """One line per step, for files and for terminals that cannot redraw: step, error, memory, elapsed, left.

    Attributes:
        stream: where lines go.
        every: least seconds between two lines; quick steps are left out, the last of a stage never is.
    """

    stream: TextIO
    every: float = 1.0
    pace: Pace | None = None
    printed: float = 0.0

    def stage(self, name: str, total: int) -> None:
        """Begin a stage; nothing is printed before its first step is done."""
        self.pace = Pace(name, total)

    def advance(self, note: str = "", error: float | None = None) -> None:
        """Print the step."""
        assert self.pace is not None, "advance() before stage()"
        self.pace.step()
        if self.pace.last - self.printed < self.every and self.pace.done < self.pace.total:
            return
        self.printed = self.pace.last
        parts = [f"{self.pace.name} {self.pace.done}/{self.pace.total}", note, self.pace.facts(error)]
        self._print("  ".join(part for part in parts if part))

    def warn(self, text: str) -> None:
        """Print the warning on a line of its own."""
        self._print(f"warning: {text}")

    def close(self) -> None:
        """Nothing to give back."""

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)


class Live:
    """One line that is redrawn: stage, block i of n, error, memory, elapsed, time left, the block's name."""

    def __init__(self, stream: TextIO) -> None:
        """Draw on `stream`, a terminal."""
        from rich.console import Console

        self.console = Console(file=stream, highlight=False, no_color="NO_COLOR" in os.environ)
        self.bar: Bar | None = None
        self.pace = Pace("", 0)

    def stage(self, name: str, total: int) -> None:
        """Begin a stage on a fresh line; the line of the one before stays."""
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self.close()
        self.pace = Pace(name, total)
        facts = TextColumn("{task.fields[facts]}", markup=False)
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), facts, console=self.console
        )
        self.bar.start()
        self.bar.add_task(name, total=total, facts="")

    def advance(self, note: str = "", error: float | None = None) -> None:
        """Redraw the line; `note` comes last, where its length moves nothing."""
        assert self.bar is not None, "advance() before stage()"
        self.pace.step()
        self.bar.update(self.bar.task_ids[0], advance=1, facts="  ".join(filter(None, (self.pace.facts(error), note))))

    def warn(self, text: str) -> None:
        """Print the warning above the line."""
        self.console.print(f"warning: {text}", markup=False, soft_wrap=True)

    def close(self) -> None:
        """Stop redrawing and leave the line as it is."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def choose(*, quiet: bool = False, stream: TextIO | None = None) -> Progress:
    """Silent if asked, one live line on a terminal, plain lines elsewhere; only the first process speaks."""
    where: TextIO = sys.stderr if stream is None else stream
    if quiet or os.environ.get("RANK", "0") != "0":
        return Silent()
    if where.isatty() and os.environ.get("TERM") != "dumb":
        return Live(where)
    return Plain(where)


def resident_bytes() -> int | None:
    """Memory of this process in use now; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def clock(seconds: float | None) -> str:
    """`62.4` -> `1:02`; an hour and more -> `1:01:02`; unknown -> `?`."""
    if seconds is None:
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
