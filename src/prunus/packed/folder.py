"""A packed folder, read: every name, length, offset, index, scale and checksum is looked at before it is used."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.errors import FormatError
from prunus.models.checkpoint import Checkpoint, Stored
from prunus.models.source import MANIFEST
from prunus.packed.matrix import KINDS, SCALED, PackedMatrix, QuantizedMatrix, check, check_quantized
from prunus.packed.reference import dequantize, unpack

FORMAT, VERSION = "prunus-packed", 1
VALUES = ("lossless", "bf16", "int8", "int4")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = {**DTYPES, **{str(kind).removeprefix("torch."): kind for kind in (torch.float64, torch.int64, torch.int32)}}
PLAIN |= {"int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool}
PLAIN |= {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
FORMS = ("packed", "int8", "plain")
LARGEST = 2**31 - 1  # rows, columns: what an int32 can count

Read = PackedMatrix | QuantizedMatrix | Tensor


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one tensor of the model.

    Attributes:
        form: a name of `FORMS`.
        dtype: that the tensor has in the Hugging Face folder.
        shape: likewise; a packed tensor is a matrix whose columns are the last dimension.
        kind: of the values of a packed one; `bf16` for a plain one that is stored narrower than it is; else empty.
        order: whether a packed one has an order of columns.
        crc32: part -> checksum of its bytes.
    """

    form: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    order: bool
    crc32: Mapping[str, int]

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    def parts(self) -> tuple[str, ...]:
        """Names of what is stored of it; empty name: the tensor itself."""
        if self.form == "plain":
            return ("",)
        if self.form == "int8":
            return ("codes", "scales")
        return ("bitmap", "values", *(["scales"] if self.kind in SCALED else []), *(["order"] if self.order else []))


@dataclass(frozen=True)
class PackedFolder:
    """A checked packed folder; tensors are read one at a time.

    Attributes:
        folder: where.
        values: what its matrices were packed as: a name of `VALUES`.
        entries: name in the Hugging Face folder -> how it is stored.
        stored: name of a part -> where it lies.
        provenance: what the manifest says of the making, for people.
    """

    folder: Path
    values: str
    entries: Mapping[str, Entry]
    stored: Mapping[str, Stored]
    provenance: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> PackedFolder:
        """Read and check the manifest and the headers.

        Raises:
            FormatError: it is not a packed folder, of another version, damaged, or incomplete.
        """
        manifest = read_manifest(folder)
        entries = {name: _entry(name, item) for name, item in _field(manifest, "tensors", dict).items()}
        stored = _stored(folder, _field(manifest, "files", list))
        wanted = {part_name(name, part): entry for name, entry in entries.items() for part in entry.parts()}
        if wanted.keys() != stored.keys():
            odd = min(wanted.keys() ^ stored.keys())
            word = "lacks" if odd in wanted else "holds, unannounced,"
            raise FormatError(f"{folder} {word} {odd!r}; its files do not belong together. Export it again.")
        values = _field(manifest, "values", str)
        if values not in VALUES:
            raise FormatError(f"{folder / MANIFEST} says that the values are {values[:60]!r}. Export it again.")
        return cls(folder, values, entries, stored, _field(manifest, "made", dict))

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(stored.bytes for stored in self.stored.values())

    def read(self, name: str) -> Read:
        """One tensor as it is stored, checked.

        Raises:
            FormatError: its bytes are not what was written, or not what the format promises.
        """
        entry = self.entries[name]
        parts = {part: self._part(name, part, entry) for part in entry.parts()}
        if entry.form == "plain":
            return _check_plain(parts[""], entry, name)
        if entry.form == "int8":
            matrix = QuantizedMatrix(parts["codes"], parts["scales"])
            check_quantized(matrix, entry.matrix, name)
            return matrix
        packed = PackedMatrix(
            *entry.matrix, entry.kind, parts["bitmap"], parts["values"], parts.get("scales"), parts.get("order")
        )
        check(packed, name)
        return packed

    def orders(self) -> dict[str, Tensor]:
        """Name -> order of the columns, int32 `[columns]`, of the packed matrices that have one.

        Raises:
            FormatError: as `read`.
        """
        return {name: self._part(name, "order", entry) for name, entry in self.entries.items() if entry.order}

    def dense(self, name: str) -> Tensor:
        """One tensor as it is in the Hugging Face folder: its shape, its dtype.

        Raises:
            FormatError: as `read`.
        """
        return to_dense(self.read(name), self.entries[name])

    def _part(self, name: str, part: str, entry: Entry) -> Tensor:
        key = part_name(name, part)
        ((_, tensor),) = Checkpoint(self.folder, self.stored, "").read([key])
        if checksum(tensor) != entry.crc32[part]:
            raise FormatError(f"{self.folder}: the bytes of {key} are not those that were written. Copy it again.")
        return tensor


def to_dense(found: Read, entry: Entry) -> Tensor:
    """What was read, in the shape and dtype that the Hugging Face folder has."""
    if isinstance(found, Tensor):
        return found.to(PLAIN[entry.dtype])
    dense = unpack(found) if isinstance(found, PackedMatrix) else dequantize(found)
    return dense.view(entry.shape).to(DTYPES[entry.dtype])


def part_name(name: str, part: str) -> str:
    """Under what a part of a tensor is stored; no module of a model has a colon in its name."""
    return f"{name}:{part}" if part else name


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    flat = tensor.contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def sign(manifest: Mapping[str, Any]) -> int:
    """CRC-32 of a manifest without its own: of the JSON with sorted keys and without blanks."""
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, of a version that is known and as it was written.

    Raises:
        FormatError: otherwise.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise FormatError(f"{folder} has no readable {MANIFEST}; it is not a packed model.") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path} is not JSON; the file is damaged. Copy or export it again.") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise FormatError(f"{path} does not say that this is a packed model of prunus. Export it again.")
    version = manifest.get("version")
    if type(version) is not int or version != VERSION:  # to Python, true and 1.0 are 1 as well
        raise FormatError(
            f"{folder} is packed in version {version!r} of the format, this prunus reads version {VERSION}. "
            "Export the model again with this prunus, or use the one that wrote it."
        )
    try:
        whole = sign(manifest) == manifest.get("crc32")
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise FormatError(f"{path} is not as it was written (its checksum differs). Copy or export it again.")
    return manifest


def _field(value: Mapping[str, Any], name: str, kind: type) -> Any:
    found = value.get(name)
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise FormatError(f"{MANIFEST}: {name!r} is {str(found)[:60]!r}, not a {kind.__name__}. Export it again.")
    return found


def _entry(name: str, item: Any) -> Entry:
    if not isinstance(item, dict):
        raise FormatError(f"{MANIFEST}: the entry of {name!r} is no object. Export it again.")
    form, dtype = _field(item, "form", str), _field(item, "dtype", str)
    shape, crc32 = tuple(_field(item, "shape", list)), _field(item, "crc32", dict)
    entry = Entry(form, dtype, shape, str(item.get("kind", "")), item.get("order", False) is True, crc32)
    problem = _problem(entry)
    if problem:
        raise FormatError(f"{MANIFEST}: the entry of {name!r} {problem}. Export it again.")
    return entry


def _problem(entry: Entry) -> str | None:
    """What is wrong with an entry, or None."""
    if entry.form not in FORMS:
        return f"has the unknown form {entry.form!r}"
    if entry.dtype not in (PLAIN if entry.form == "plain" else DTYPES):
        return f"has the unknown dtype {entry.dtype!r}"
    if not all(type(size) is int and 0 <= size <= LARGEST for size in entry.shape):
        return f"has no possible shape, {str(entry.shape)[:60]}"
    if entry.form != "plain" and (len(entry.shape) < 2 or not all(0 < size <= LARGEST for size in entry.matrix)):
        return f"has a shape, {str(entry.shape)[:60]}, that is no matrix"
    if entry.form == "packed" and entry.kind not in KINDS:
        return f"has values of the unknown kind {entry.kind!r}"
    if entry.form == "plain" and entry.kind not in ("", "bf16"):
        return f"is stored in the unknown form {entry.kind!r}"
    if set(entry.crc32) != set(entry.parts()):
        return "has not one checksum for each of its parts"
    return None


def _stored(folder: Path, files: list[Any]) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    if not files:
        raise FormatError(f"{folder / MANIFEST} names no files. Export it again.")
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FormatError(f"{MANIFEST}: {str(file)[:60]!r} is no safetensors file of the folder. Export it again.")
        if not (folder / file).is_file():
            raise FormatError(f"{folder} lacks {file}. Copy it again.")
        try:
            tensors = Checkpoint.of_shard(folder / file).tensors
        except OSError as error:
            raise FormatError(f"{folder / file} cannot be read ({error}). Copy it again.") from None
        if tensors.keys() & stored.keys():
            raise FormatError(f"{folder}: {min(tensors.keys() & stored.keys())!r} is in two files. Export it again.")
        stored |= tensors
    return stored


def _check_plain(tensor: Tensor, entry: Entry, name: str) -> Tensor:
    dtype = KINDS[entry.kind] if entry.kind else PLAIN[entry.dtype]
    if tuple(tensor.shape) != entry.shape or tensor.dtype != dtype:
        raise FormatError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced {dtype} {list(entry.shape)}.")
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise FormatError(f"{name} holds NaN or infinite weights.")
    return tensor
