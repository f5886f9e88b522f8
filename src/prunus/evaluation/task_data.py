"""Task data from plain files: `TASK.SPLIT.jsonl`, or `TASK.jsonl`, each also `.gz`, one JSON object a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from prunus.errors import CalibrationError, guess

SUFFIXES = (".jsonl", ".jsonl.gz")
# Groups of our own, by the tasks' names in lm-eval; their value is the plain mean of the tasks' accuracies.
GROUPS = {
    # The seven zero-shot tasks of SparseGPT's successors (Wanda, OWL, AlphaPruning).
    "owl7": ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """One file of items.

    Attributes:
        path: the file.
        rows: the objects, all with the same keys.
        lines: where each stands, from 1.
        sha256: of the uncompressed content.
    """

    path: Path
    rows: list[Row]
    lines: list[int]
    sha256: str


def _boolq(row: Row) -> Row:
    """As the hub has it: `label` 0 or 1; the published file says `answer: true`."""
    if "label" in row:
        return row
    if not isinstance(row.get("answer"), bool):
        raise ValueError("has neither a label (0 or 1) nor an answer (true or false)")
    return {**row, "label": int(row["answer"])}


# Where published files and the hub's rows differ, what makes the one of the other.
ADAPTERS: dict[str, Callable[[Row], Row]] = {"boolq": _boolq}


def find(folder: Path, task: str, split: str | None) -> Path | None:
    """`TASK.SPLIT.jsonl[.gz]`; `split` None: `TASK.jsonl[.gz]`."""
    stem = task if split is None else f"{task}.{split}"
    return next((path for suffix in SUFFIXES if (path := folder / f"{stem}{suffix}").is_file()), None)


def fingerprint(folder: str | None, tasks: Sequence[str]) -> dict[str, str]:
    """File name → sha256 of every file in the folder that may hold items of these tasks; empty without a folder."""
    names = tuple(f"{task}." for name in tasks for task in GROUPS.get(name, (name,)))
    files = sorted(Path(folder).expanduser().glob("*.jsonl*")) if folder else []
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in files if file.name.startswith(names)}


def check_folder(folder: Path) -> None:
    """Refuse a folder without any item file.

    Raises:
        CalibrationError: naming what was expected, and a folder inside it that has such files.
    """
    if not folder.is_dir():
        raise CalibrationError(f"There is no folder {folder} with task data; give one with files such as boolq.jsonl.")
    if not any(file for suffix in SUFFIXES for file in folder.glob(f"*{suffix}")):
        inner = Counter(file.parent for suffix in SUFFIXES for file in folder.glob(f"*/*{suffix}"))
        cure = f" Did you mean {inner.most_common(1)[0][0]}?" if inner else ""
        raise CalibrationError(f"{folder} holds no file such as boolq.jsonl or boolq.validation.jsonl.gz.{cure}")


def items_file(folder: Path, task: str, split: str) -> Path:
    """The file that holds the items to answer.

    Args:
        folder: from `--task-data`.
        task: by lm-eval's name.
        split: that lm-eval asks the items of this task from.

    Raises:
        CalibrationError: there is none; files of other splits and near names are named.
    """
    found = find(folder, task, split) or find(folder, task, None)
    if found is not None:
        return found
    names = sorted(file.name for suffix in SUFFIXES for file in folder.glob(f"*{suffix}"))
    others = [name for name in names if name.startswith(f"{task}.")]
    cure = f" {others[0]} is another split; name it {task}.jsonl if it is what you want." if others else ""
    near = guess(task, {name.split(".")[0] for name in names}) if not others else ""
    raise CalibrationError(f"{folder} has no {task}.{split}.jsonl (nor .gz) for the task {task}.{cure}{near}")


def read_rows(path: Path, task: str) -> Rows:
    """Read and check a file of items.

    Raises:
        CalibrationError: with the line that is no JSON object, or that lacks or changes what the first line has.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        text = content.decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise CalibrationError(f"{path} cannot be read as text ({problem}); copy or download it again.") from problem
    adapt = ADAPTERS.get(task, lambda row: row)
    rows, adapted, lines = [], [], []
    # Not splitlines(): JSON text may hold U+2028, which is no end of a line there.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            rows.append(read_row(line, path, number))
            lines.append(number)
            try:
                adapted.append(adapt(rows[-1]))
            except ValueError as problem:
                raise CalibrationError(f"{path}, line {number} {problem}; mend or remove the line.") from None
            _same(rows[0], rows[-1], f"{path}, line {number}", f"line {lines[0]}")
    if not rows:
        raise CalibrationError(f"{path} is empty; it must hold one JSON object a line.")
    return Rows(path, adapted, lines, sha256(content).hexdigest())


def read_row(line: str, path: Path, number: int) -> Row:
    """The JSON object in line `number` of the file `path`.

    Raises:
        CalibrationError: it is none, naming file and line.
    """
    try:
        row = json.loads(line)
    except ValueError as problem:
        raise CalibrationError(f"{path}, line {number} is not JSON ({problem}); mend or remove the line.") from None
    if not isinstance(row, dict):
        raise CalibrationError(f"{path}, line {number} is no JSON object but {type(row).__name__}; mend the line.")
    return row


def _same(first: Mapping[str, Any], row: Mapping[str, Any], place: str, where: str, inside: str = "") -> None:
    """Refuse a row that lacks a key of the first, has one more, or another kind of value under one."""
    for key in sorted(first.keys() ^ row.keys()):
        has, lacks = (place, where) if key in row else (where, place)
        raise CalibrationError(
            f"{place} differs from {where}: {has} has {inside}{key}, {lacks} has not. Mend the line."
        )
    for key, value in row.items():
        if _kind(value) != _kind(first[key]):
            raise CalibrationError(
                f"{place}: {inside}{key} is {_kind(value)}, and {_kind(first[key])} on {where}. Mend the line."
            )
        if isinstance(value, Mapping):
            _same(first[key], value, place, where, f"{inside}{key}.")


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
