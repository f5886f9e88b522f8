"""Reads a text or token ids from a name, a file or the hub: the one door for calibration and for evaluation."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from prunus.errors import CalibrationError, near

if TYPE_CHECKING:
    import numpy as np

EMBEDDED = {"calibration": "wikitext2-validation-head.raw.gz", "evaluation": "wikitext2-test.raw.gz"}
HUB: dict[str, tuple[str, str]] = {"c4": ("allenai/c4", "en/c4-train.00000-of-01024.json.gz")}
HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[^:]*){0,2}")
EMBEDDED_NAMES = ("wikitext2",)
NAMES = (*EMBEDDED_NAMES, *HUB)
FIELDS = (("text",), ("content",), ("prompt", "response"))
# Of a larger corpus the head is enough: 32 M characters are about 8 M tokens, 60 times the default 128 x 512 x 2.
HEAD = 32_000_000


@dataclass(frozen=True)
class Reading:
    """Either documents of text or arrays by the name of the model's input.

    Attributes:
        source: the name or path as it was given.
        documents: texts, in order; one for a plain text file.
        arrays: `input_ids` int64 [rows, length], or other model inputs with the same first dimension.
    """

    source: str
    documents: tuple[str, ...] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Of the text in UTF-8 (documents apart by a zero byte), or of names, shapes and bytes of the arrays."""
        if self.documents:
            return hashlib.sha256(b"\0".join(document.encode() for document in self.documents)).hexdigest()
        return hash_arrays(self.arrays)


def hash_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over name, type, shape and row-major bytes of each array, names in order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def read(source: str | Path, *, purpose: str, head: int | None = None) -> Reading:
    """Whatever `source` names.

    - `wikitext2`: the embedded text; a part of the validation split for "calibration", the test split for "evaluation".
    - a file, each also gzipped: `.npy` (token ids), `.npz` (named model inputs), `.jsonl` and `.parquet` (documents
      in the fields text, content, or prompt and response), `.raw` (WikiText: one row a line), any other: plain UTF-8.
    - `c4`, or `owner/name[:configuration[:split]]`: a data set of the hub.

    Args:
        source: name, path or hub id.
        purpose: "calibration" or "evaluation", which decides the split of an embedded text.
        head: characters of text after which reading stops (at the end of a document where there are documents).

    Raises:
        CalibrationError: nothing of that name; empty, binary or damaged; fields missing; no network.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_file(path, str(source), head)
    if path.is_dir():
        raise CalibrationError(f"{source} is a folder; give one file (.txt, .jsonl, .parquet, .npy or .npz).")
    name = str(source)
    if name in EMBEDDED_NAMES:
        return Reading(name, (wikitext(_embedded(EMBEDDED[purpose])),))
    if on_hub(source):
        return Reading(name, tuple(_from_hub(name, head or HEAD)))
    raise CalibrationError(f"There is no text or file {name}.{near(name, NAMES)} Or give a file's path.")


def on_hub(source: str | Path) -> bool:
    """True if `source` can only be a data set of the hub; nothing is asked there."""
    path, name = Path(source).expanduser(), str(source)
    if path.exists() or name in EMBEDDED_NAMES:
        return False
    return name in HUB or (HUB_ID.fullmatch(name) is not None and not _ends_like_a_file(path))


def wikitext(text: str) -> str:
    r"""WikiText as every published perplexity has it: the hub's rows joined by "\n\n".

    A row is a line with its newline, or "" for a blank line; so stands the text in the data set, and only so does GPT-2
    count 287,644 tokens in the test split (284,753 if rows lose their newline).
    """
    lines = text.split("\n")
    rows = lines[: len(lines) - 1] if lines[-1] == "" else lines
    return "\n\n".join("" if not row.strip() else row + "\n" for row in rows)


def _embedded(file: str) -> str:
    return gzip.decompress(files("prunus.data.texts").joinpath(file).read_bytes()).decode("utf-8")


def _ends_like_a_file(path: Path) -> bool:
    return Path(path.name.removesuffix(".gz")).suffix in {".txt", ".npy", ".npz", *READERS}


def _read_file(path: Path, source: str, head: int | None) -> Reading:
    kind = Path(path.name.removesuffix(".gz")).suffix
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            if kind in (".npy", ".npz"):
                return Reading(source, arrays=_arrays(file.read(), source))
            documents = tuple(_until(READERS.get(kind, _plain)(file, source, head), head))
    except UnicodeDecodeError as problem:
        raise CalibrationError(
            f"{source} is not UTF-8 text (byte {problem.start}); convert it, or give token ids as .npy."
        ) from problem
    except (OSError, EOFError, zlib.error) as problem:
        raise CalibrationError(f"{source} cannot be read ({problem}); copy or download it again.") from problem
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"{source} is empty; give a file with text in it, or wikitext2.")
    if any("\0" in document for document in documents):
        raise CalibrationError(f"{source} holds zero bytes, so it is binary; give text, or token ids as .npy.")
    return Reading(source, documents)


def _until(documents: Iterable[str], head: int | None) -> Iterator[str]:
    """Documents as they come, until they hold `head` characters."""
    seen = 0
    for document in documents:
        yield document
        seen += len(document)
        if head is not None and seen >= head:
            return


def _plain(file: Any, source: str, head: int | None) -> Iterator[str]:
    """One document; a mark at the file's start goes, and CRLF becomes LF, lest each system gets its own tokens."""
    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        yield text.read(-1 if head is None else head)


def _raw(file: Any, source: str, head: int | None) -> Iterator[str]:
    for text in _plain(file, source, head):
        yield wikitext(text)


def _json_lines(file: Any, source: str, head: int | None) -> Iterator[str]:
    with io.TextIOWrapper(file, encoding="utf-8-sig") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as problem:
                raise CalibrationError(
                    f"{source}, line {number} is not JSON ({problem}); one object a line."
                ) from problem
            yield document(row, f"{source}, line {number}")


def document(row: Any, where: str) -> str:
    """The text of one row: field text, else content, else prompt and response with a line end between if there is none.

    Raises:
        CalibrationError: if the row has none of these as strings; rename the field.
    """
    for names in FIELDS:
        if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names):
            first, rest = row[names[0]], [row[name] for name in names[1:]]
            gap = "" if not rest or first[-1:].isspace() else "\n"
            return gap.join([first, *rest])
    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise CalibrationError(
        f"{where} has no text: it needs a field text, content, or prompt and response; it has {found}."
    )


def _parquet(file: Any, source: str, head: int | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as problem:
        raise CalibrationError(f"Reading {source} needs pyarrow: pip install pyarrow") from problem
    number = 0
    try:
        # Read whole: a gzipped file cannot be searched from its end, where parquet keeps its index.
        for batch in ParquetFile(io.BytesIO(file.read())).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield document(row, f"{source}, row {number}")
    except ArrowException as problem:
        raise CalibrationError(f"{source} is not a whole parquet file ({problem}); download it again.") from problem


READERS: dict[str, Callable[[Any, str, int | None], Iterator[str]]] = {
    ".jsonl": _json_lines,
    ".parquet": _parquet,
    ".raw": _raw,
}


def _arrays(content: bytes, source: str) -> dict[str, np.ndarray]:
    """Named arrays of an .npz, or the ids of an .npy; never pickled objects."""
    import numpy as np

    try:
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        arrays = {"input_ids": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
    except (ValueError, EOFError, BadZipFile, KeyError) as problem:
        raise CalibrationError(
            f"{source} is not a numpy file of plain numbers ({problem}); save it with numpy.save or numpy.savez."
        ) from problem
    arrays = {name: check_array(name, array, source) for name, array in arrays.items()}
    rows = {name: array.shape[0] for name, array in arrays.items()}
    if not rows or min(rows.values()) == 0 or len(set(rows.values())) > 1:
        raise CalibrationError(
            f"{source} must hold the same number of samples, one or more, in each input; it has {rows}."
        )
    return arrays


def check_array(name: str, array: np.ndarray, source: str) -> np.ndarray:
    """Token ids as int64 [samples, length] (one row may be given flat), other inputs as int64, bool or float32.

    Raises:
        CalibrationError: ids that are no integers, negative or not two-dimensional; values that are not finite.
    """
    import numpy as np

    if array.dtype.kind not in "iubf" or array.size == 0:
        raise CalibrationError(f"{source}: {name} holds {array.dtype} of shape {array.shape}; numbers are needed.")
    if name == "input_ids":
        array = array[None] if array.ndim == 1 else array
        if array.dtype.kind not in "iu" or array.ndim != 2:
            raise CalibrationError(
                f"{source}: token ids are integers [samples, length]; these are {array.dtype} {list(array.shape)}."
            )
        if array.min() < 0:
            raise CalibrationError(f"{source}: a token id is negative ({array.min()}); padding has no place here.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise CalibrationError(f"{source}: {name} holds NaN or infinite values.")
    kinds = {"b": np.bool_, "f": np.float32}
    return np.ascontiguousarray(array, dtype=kinds.get(array.dtype.kind, np.int64))


def _from_hub(name: str, head: int) -> Iterator[str]:
    """Documents of a hub data set, streamed until `head` characters are there."""
    try:
        from datasets import load_dataset
    except ImportError as problem:
        raise CalibrationError(f"The data set {name} needs the package datasets: pip install datasets") from problem
    owner, *parts = HUB[name][0:1] if name in HUB else name.split(":")
    _check_hub(name, owner)
    where: dict[str, Any] = {"data_files": HUB[name][1]} if name in HUB else {"name": parts[0] if parts else None}
    split = parts[1] if len(parts) > 1 else "train"
    try:
        rows = load_dataset(owner, split=split, streaming=True, **where)
        yield from _until((document(row, name) for row in rows), head)
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        raise CalibrationError(
            f"The data set {name} cannot be read ({problem}); write owner/name:configuration:split."
        ) from problem


def _check_hub(name: str, owner: str) -> None:
    """Ask the hub once whether it has the data set: `load_dataset` would try six times for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(owner, timeout=10)
    except RepositoryNotFoundError as problem:
        raise CalibrationError(f"There is no file {name} and no data set of that name.{near(name, NAMES)}") from problem
    except Exception as problem:
        # Whatever the reason (no network, a proxy, the offline switch): the cure is the same.
        if not isinstance(problem, (OSError, HfHubHTTPError)) and not type(problem).__module__.startswith("http"):
            raise
        raise CalibrationError(
            f"There is no file {name}, and the hub cannot be reached to look for a data set of that name "
            f"({str(problem)[:120]}). Without a network use wikitext2 or a file."
        ) from problem
