"""`prunus bench`: all engines in turns, round after round, so that a busy moment of the machine hits all of them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prunus.bench import DEFAULT, KINDS, Kind
from prunus.errors import PrunusError, RecipeError, near
from prunus.models.source import is_packed, locate, read_config
from prunus.progress import Progress, Silent

START = 16  # tokens behind which decoding begins


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        tokens: made in each round of decoding, at least 2.
        prompt: tokens that prefill reads, at least 2; decoding begins behind `START` of them.
        rounds: turns of every engine, at least 1; the median counts.
        threads: of every engine, at least 1.
    """

    tokens: int = 64
    prompt: int = 128
    rounds: int = 3
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers out of range.

        Raises:
            RecipeError: naming the number.
        """
        for name, least in (("tokens", 2), ("prompt", 2), ("rounds", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"The bench's {name} is at least {least}, not {getattr(self, name)}.")

    @property
    def positions(self) -> int:
        """The longest text that an engine holds: the prompt of prefill, or that of decoding with what is made."""
        return max(self.prompt, min(START, self.prompt) + self.tokens + 1)

    def check(self, folder: Path) -> None:
        """See that the model and our engine hold texts of this length.

        Raises:
            RecipeError: they do not.
        """
        from prunus.data.tokens import folder_positions
        from prunus.runtime.engine import CONTEXT

        most = min(folder_positions(folder) or CONTEXT, CONTEXT)
        if self.positions > most:
            raise RecipeError(
                f"A prompt of {self.prompt} tokens, or {self.tokens} tokens behind one of {min(START, self.prompt)}, "
                f"take {self.positions} positions; the model has {most} here. Lower --prompt or --tokens."
            )


@dataclass
class Engine:
    """A worker that is running."""

    name: str
    process: subprocess.Popen[str]
    holds: dict[str, Any]
    note: str = ""

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and wait.

        Raises:
            PrunusError: the worker died.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise _died(self.name) from None
        return _answer(self.process, self.name)


def bench(
    model: str | Path,
    *,
    against: Sequence[str] = DEFAULT,
    values: str | None = None,
    setup: Setup | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokens a second of the packed engine and of others on the same weights.

    Args:
        model: a packed folder, or an ordinary one, which is packed into a temporary folder first.
        against: names of `KINDS`.
        values: what an ordinary folder is packed as: a name of `packed.folder.VALUES`; None: int8.
        setup: how much is measured; one thread for each core unless given.
        progress: told about every measurement.

    Returns:
        `model`, `isa`, `threads`, `setup`, `rows[]` with `engine`, `phase`, `tokens`, `tokens_per_second` (median over
        the rounds), `spread` (largest over smallest of them), `bytes_per_token`, `file_bytes`, `peak_rss_bytes` and
        `note`, empty unless it is measured in another way than it would be run; `skipped[]` with `engine` and `why`.

    Raises:
        PrunusError: an unknown baseline, or the model itself cannot be run.
    """
    from prunus.runtime.native import require

    for name in against:
        if name not in KINDS:
            raise RecipeError(f"There is no baseline {name!r}.{near(name, KINDS)}")
    native = require()
    setup, progress = setup or Setup(threads=native.threads), progress or Silent()
    source = locate(model)
    if is_packed(source) and values is not None:
        raise RecipeError(f"{source} is packed already; leave --values out.")
    setup.check(source)
    with TemporaryDirectory(prefix="prunus-bench-") as scratch, ExitStack() as running:
        packed, values = _packed(source, Path(scratch), values or "int8", progress)
        engines, skipped = [], []
        for name in ["packed", *dict.fromkeys(name for name in against if name != "packed")]:
            progress.stage(f"load {name}", len(KINDS[name].variants))
            found, missing = _start(name, packed, Path(scratch), setup, running, progress)
            engines += found
            skipped += missing
            if name == "packed":
                if missing:
                    raise PrunusError(missing[0]["why"])
                engines[0].name = f"packed-{values}"
        rows = _measure(engines, setup, _vocabulary(source), progress, skipped)
    progress.close()
    return {
        "model": str(model), "isa": native.isa, "threads": setup.threads, "values": values,
        "setup": {"tokens": setup.tokens, "prompt": setup.prompt, "rounds": setup.rounds},
        "rows": rows, "skipped": skipped,
    }  # fmt: skip


def _packed(source: Path, scratch: Path, values: str, progress: Progress) -> tuple[Path, str]:
    """The packed folder to measure, and what its values are."""
    from prunus.packed.folder import VALUES, PackedFolder
    from prunus.packed.writing import write

    if is_packed(source):
        return source, PackedFolder.open(source).values
    if values not in VALUES:
        raise RecipeError(f"Values are {', '.join(VALUES)}, not {values!r}.{near(values, VALUES)}")
    progress.stage("pack", 1)
    write(source, scratch / "packed", values)
    progress.advance(values)
    return scratch / "packed", values


def _start(
    name: str, packed: Path, scratch: Path, setup: Setup, running: ExitStack, progress: Progress
) -> tuple[list[Engine], list[dict[str, str]]]:
    """The workers of one kind, warm, and what there is none of: `engine`, `why`."""
    kind = KINDS[name]
    if kind.package and find_spec(kind.package) is None:
        return [], [{"engine": name, "why": f"the package {kind.package} is not installed: {kind.install}"}]
    engines, skipped = [], []
    for row, variant in kind.variants.items():
        try:
            folder, note = _prepared(kind, packed, scratch, variant) if kind.dense else (packed, "")
            engine = _warm(row, kind, folder, variant, setup, running)
            engine.note = "; ".join(filter(None, (engine.note, note)))
            engines.append(engine)
        except PrunusError as problem:
            skipped.append({"engine": row, "why": str(problem)})
        progress.advance(row)
    return engines, skipped


def _prepared(kind: Kind, packed: Path, scratch: Path, variant: str) -> tuple[Path, str]:
    """The folder with the file of an engine that needs the zeros in place, and what is to be said of the file."""
    from importlib import import_module

    from prunus.formats import FORMATS, Settings

    dense, folder = scratch / "dense", scratch / "files"
    if not dense.exists():
        FORMATS["dense"].write(packed, dense, Settings())
    folder.mkdir(exist_ok=True)
    return folder, import_module(kind.module).prepare(dense, folder, variant)


def _warm(row: str, kind: Kind, folder: Path, variant: str, setup: Setup, running: ExitStack) -> Engine:
    """A worker that has read a prompt and made two tokens, unmeasured: caches, pages, threads.

    Raises:
        PrunusError: it refuses, or dies, also in the plainer way if there is one.
    """
    try:
        return _tried(row, kind, folder, variant, setup, running)
    except _Died:
        if row not in kind.plainer:
            raise
        plainer, note = kind.plainer[row]
        engine = _tried(row, kind, folder, plainer, setup, running)
        engine.note = note
        return engine


def _tried(row: str, kind: Kind, folder: Path, variant: str, setup: Setup, running: ExitStack) -> Engine:
    with ExitStack() as own:
        engine = own.enter_context(_worker(row, kind.module, folder, variant, setup))
        ids = [3] * setup.prompt
        engine.ask(phase="prefill", ids=ids, tokens=setup.prompt)
        engine.ask(phase="decode", ids=ids[:4], tokens=2)
        running.push(own.pop_all())
    return engine


@contextmanager
def _worker(name: str, module: str, folder: Path, variant: str, setup: Setup) -> Iterator[Engine]:
    threads = str(setup.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PRUNUS_THREADS": threads}
    environment["PRUNUS_POSITIONS"] = str(setup.positions)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "prunus.bench.worker", module, str(folder), variant],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
    )  # fmt: skip
    try:
        holds = _answer(process, name)
        if "refused" in holds:
            raise PrunusError(holds["refused"])
        yield Engine(name, process, holds)
    finally:
        process.kill()
        process.communicate()


class _Died(PrunusError):
    """A worker ended, told to or not."""


def _died(name: str) -> PrunusError:
    return _Died(f"{name} died while it was measured. Is there enough memory, and does it run on this processor?")


def _answer(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise _died(name)
    return json.loads(line)


def _measure(
    engines: list[Engine], setup: Setup, vocabulary: int, progress: Progress, skipped: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """One row for each engine and phase; what dies on the way is skipped, unless it is the first."""
    # Any tokens will do: the time does not depend on which. Small ids are in every vocabulary.
    ids = [3 + 7 * place % max(1, min(vocabulary, 20_000) - 3) for place in range(setup.prompt)]
    orders = {
        "prefill": {"ids": ids, "tokens": setup.prompt},
        "decode": {"ids": ids[:START], "tokens": setup.tokens},
    }
    progress.stage("measure", setup.rounds * len(engines) * len(orders))
    seconds: dict[tuple[str, str], list[float]] = {}
    peaks: dict[str, int] = {}
    turns = [(phase, {"phase": phase, **order}) for _ in range(setup.rounds) for phase, order in orders.items()]
    alive = list(engines)
    for turn, order in turns:
        for engine in list(alive):
            try:
                found = engine.ask(**order)
            except PrunusError as problem:
                if engine is engines[0]:
                    raise
                alive.remove(engine)
                skipped.append({"engine": engine.name, "why": str(problem)})
                continue
            each = found["seconds"] / (setup.prompt if turn == "prefill" else 1)
            seconds.setdefault((engine.name, turn), []).append(each)
            peaks[engine.name] = found["peak_rss_bytes"]
            progress.advance(f"{engine.name} {turn}")
    return [
        {
            "engine": engine.name, "phase": phase, "tokens": order["tokens"],
            "tokens_per_second": 1 / statistics.median(seconds[engine.name, phase]),
            "spread": max(seconds[engine.name, phase]) / min(seconds[engine.name, phase]),
            "bytes_per_token": engine.holds["bytes_per_token"], "file_bytes": engine.holds["file_bytes"],
            "peak_rss_bytes": peaks[engine.name], "note": engine.note,
        }
        for phase, order in orders.items()
        for engine in alive
    ]  # fmt: skip


def _vocabulary(folder: Path) -> int:
    config = read_config(folder)
    return int(config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size") or 256)


def race(folders: Mapping[str, Path], kind: str, *, setup: Setup) -> dict[str, dict[str, float]]:
    """Tokens a second of one engine on several folders, in turns: name -> phase -> median over the rounds.

    Args:
        folders: name -> model folder, as the engine takes it.
        kind: a row of `KINDS`; of its variants the first.
        setup: how much is measured.

    Raises:
        PrunusError: one of them does not load, or dies.
    """
    row = KINDS[kind]
    variant = next(iter(row.variants.values()))
    with ExitStack() as running:
        engines = [_tried(name, row, folder, variant, setup, running) for name, folder in folders.items()]
        lost: list[dict[str, str]] = []
        vocabulary = min(_vocabulary(folder) for folder in folders.values())
        rows = _measure(engines, setup, vocabulary, Silent(), lost)
    if lost:
        raise PrunusError(f"{lost[0]['engine']} could not be timed: {lost[0]['why']}")
    found: dict[str, dict[str, float]] = {name: {} for name in folders}
    for one in rows:
        found[one["engine"]][one["phase"]] = one["tokens_per_second"]
    return found
