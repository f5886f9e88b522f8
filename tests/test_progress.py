"""Progress: what is said where, and what is not."""

from __future__ import annotations

import io

import pytest

from prunus import progress as module
from prunus.progress import Live, Pace, Plain, Silent, choose, clock


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Yes."""
        return True


def work(progress: module.Progress, total: int = 3) -> None:
    """A stage from beginning to end."""
    progress.stage("prune", total)
    for number in range(total):
        progress.advance(f"model.layers.{number}", error=0.125)
    progress.warn("one [odd] thing")
    progress.close()
    progress.close()


def test_plain_lines_name_block_error_and_memory_and_have_no_escape_codes() -> None:
    stream = io.StringIO()
    work(Plain(stream, every=0))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("prune 1/3  model.layers.0  error 0.1250")
    assert "MB" in lines[0]
    assert len(lines) == 4
    assert "\x1b" not in stream.getvalue()
    assert lines[-1] == "warning: one [odd] thing"


def test_quick_steps_are_left_out_but_never_the_last() -> None:
    stream = io.StringIO()
    work(Plain(stream, every=1000), total=50)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines() if "prune" in line][-1] == "prune 50/50"
    assert len(stream.getvalue().splitlines()) <= 3


def test_a_terminal_gets_one_line_for_each_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    work(Live(stream))
    assert "3/3" in stream.getvalue()
    assert "model.layers.2" in stream.getvalue()
    assert "error 0.1250" in stream.getvalue()
    assert "one [odd] thing" in stream.getvalue()


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    work(Live(stream))
    assert "\x1b[3" not in stream.getvalue().replace("\x1b[?25", "")


@pytest.mark.parametrize(
    ("quiet", "terminal", "kind"),
    [(True, True, Silent), (False, True, Live), (False, False, Plain), (True, False, Silent)],
)
def test_the_stream_decides_unless_quiet(
    quiet: bool, terminal: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RANK", raising=False)
    assert isinstance(choose(quiet=quiet, stream=Terminal() if terminal else io.StringIO()), kind)


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert isinstance(choose(stream=io.StringIO()), Silent)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(choose(stream=Terminal()), Plain)


def test_time_left_is_the_mean_step_times_the_steps_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    pace = Pace("prune", 10, started=now, last=now)
    pace.step()
    pace.step()  # both at once: done by an earlier run
    assert pace.left() is None
    for _ in range(2):
        now += 3.0
        pace.step()
    assert pace.left() == pytest.approx(6 * 3.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (62.4, "1:02"), (3661, "1:01:01"), (None, "?"), (59.6, "1:00")]
)
def test_a_clock_reads_as_clocks_do(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text
