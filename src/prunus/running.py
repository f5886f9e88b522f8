"""What all long jobs share: join the processes, check, continue or begin, and leave nothing half-done behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prunus.distributed import Processes
from prunus.errors import PrunusError
from prunus.job import check_out
from prunus.notes import collecting
from prunus.progress import Progress, Silent
from prunus.work import Work


@dataclass
class Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time inside the context to a stage."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - begun

    def read(self) -> dict[str, float]:
        """Seconds of each stage, and in total."""
        return {"total": time.monotonic() - self.started, **self.seconds}


class Checked(Protocol):
    """A job that passed all checks, as far as this module needs to know it."""

    @property
    def folder(self) -> Path:
        """The model that it begins with."""
        ...

    @property
    def out(self) -> Path:
        """The folder to make."""
        ...

    @property
    def overwrite(self) -> bool:
        """Whether it may replace what is there."""
        ...

    @property
    def work(self) -> Work:
        """The unfinished state beside it."""
        ...

    @property
    def processes(self) -> Processes:
        """This process among its peers."""
        ...

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the result to the last bit."""
        ...

    @property
    def warnings(self) -> list[str]:
        """What the user should know."""
        ...

    def begin(self, restart: bool) -> None:
        """Take the work folder."""
        ...


Job = TypeVar("Job", bound=Checked)
Prepare = Callable[[Processes, list[str]], Job]
Run = Callable[[Job, Progress, Clock], dict[str, Any]]


def carry_out(
    prepare: Prepare[Job], run: Run[Job], *, device: str, restart: bool, progress: Progress | None
) -> dict[str, Any]:
    """Do a job; an interrupted one, called again with the same arguments, continues where it stopped.

    Args:
        prepare: makes all checks and the job, given the processes and the list that receives warnings.
        run: the work itself, once the work folder is taken; returns the result.
        device: where to compute, as in a recipe.
        restart: forget unfinished work of an earlier call.
        progress: told about every step, and closed.

    Returns:
        What `run` returned, or what it had returned if only the removal of the work folder was missing.

    Raises:
        PrunusError: from `prepare` or `run`; a work folder that holds nothing yet is removed then.
    """
    progress, clock = progress or Silent(), Clock()
    processes = Processes.join(device)
    warnings: list[str] = []
    job = None
    try:
        with collecting(warnings):
            with clock("prepare"):
                job = prepare(processes, warnings)
            result = _published(job, restart) or _begun(job, run, restart, progress, clock)
    except PrunusError:
        if job is not None:
            job.work.close_refused()
        raise
    finally:
        progress.close()
        if job is not None:
            job.work.close()
    processes.leave()
    return result


def _begun(job: Job, run: Run[Job], restart: bool, progress: Progress, clock: Clock) -> dict[str, Any]:
    job.processes.on_first(lambda: job.begin(restart))
    for text in job.warnings:
        progress.warn(text)
    return run(job, progress, clock)


def _published(job: Checked, restart: bool) -> dict[str, Any] | None:
    """The result of the same run, if it was killed between OUT's appearance and the removal of its work folder."""

    def finish() -> dict[str, Any] | None:
        if not job.work.published:
            return None
        same = job.work.read("published.json") == job.fingerprint
        job.work.close(remove=True)
        if same and not restart:
            return json.loads((job.out / "prunus.json").read_text(encoding="utf-8"))["result"]
        check_out(job.out, job.folder, job.overwrite)
        return None

    return job.processes.on_first(finish)
