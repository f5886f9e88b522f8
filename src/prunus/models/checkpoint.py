"""A folder of safetensors, read and checked without building a model.

Everything that can be wrong with the files is found here, before any work: headers are parsed, lengths compared, the
index checked against the shards. Pickles are never opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunus.errors import FormatError, ModelError
from prunus.models.source import PICKLES, is_packed

INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """One tensor on disk: its shard, dtype, shape and size in bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder of safetensors shards.

    Attributes:
        folder: the folder.
        tensors: name on disk → where and what it is.
        headers: sha256 over the shards' headers and sizes, which identifies the layout without reading the weights.
    """

    folder: Path
    tensors: Mapping[str, Stored]
    headers: str

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of all shards.

        Raises:
            ModelError: no safetensors in the folder, or an index that names a missing or outside file; or a packed one.
            FormatError: a shard is truncated or its header is not what safetensors promises.
        """
        if is_packed(folder):
            raise ModelError(
                f"{folder} is a packed model, which cannot be read as an ordinary one. Restore it first: "
                f"prunus export {folder} NEW --format dense."
            )
        return cls._read_headers(folder, _shards(folder))

    @classmethod
    def of_shard(cls, file: Path) -> Checkpoint:
        """One shard as a checkpoint of its own.

        Raises:
            FormatError: as `open`.
        """
        return cls._read_headers(file.parent, [file])

    @classmethod
    def _read_headers(cls, folder: Path, files: list[Path]) -> Checkpoint:
        digest = sha256()
        tensors: dict[str, Stored] = {}
        for file in files:
            header, raw = _header(file)
            digest.update(raw + str(file.stat().st_size).encode())
            for name, entry in header.items():
                if name in tensors:
                    raise FormatError(f"{file.name}: tensor {name!r} is also in {tensors[name].file.name}.")
                tensors[name] = _stored(file, name, entry)
        if not tensors:
            raise FormatError(f"{folder}: the safetensors files hold no tensor.")
        return cls(folder, tensors, digest.hexdigest())

    @property
    def identity(self) -> dict[str, str]:
        """Hashes that change when the configuration or a shard does; the weights themselves are not read.

        Shards count with their names, sizes, headers and times of change.
        """
        files = sorted({stored.file for stored in self.tensors.values()})
        state = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        config = (self.folder / "config.json").read_bytes()
        return {
            "config": sha256(config).hexdigest(),
            "weights": sha256("\n".join([self.headers, *state]).encode()).hexdigest(),
        }

    @property
    def bytes(self) -> int:
        """Size of all tensors on disk."""
        return sum(stored.bytes for stored in self.tensors.values())

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, one at a time, in their stored dtype on the CPU.

        The file is read, not mapped: mapped pages would count as this process's memory for as long as they are used.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        for file, members in by_file.items():
            try:
                with safe_open(file, framework="pt", device="cpu", backend="pread") as shard:
                    for name in members:
                        yield name, shard.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise FormatError(f"{file}: cannot be read ({error}). Fetch the file again.") from None


def _shards(folder: Path) -> list[Path]:
    """The safetensors files that belong to the checkpoint, in name order."""
    index = folder / INDEX
    if index.is_file():
        return _indexed(folder, index)
    single = folder / "model.safetensors"
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds pickled weights only ({pickles[0]}); prunus never opens pickles, which can run code. "
            "Convert it where you trust it: load it with transformers and call save_pretrained."
        )
    raise ModelError(f"{folder} holds no safetensors weights.")


def _indexed(folder: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise FormatError(f"{index}: is not a safetensors index (JSON with a `weight_map`).") from None
    files = [folder / str(name) for name in names]
    for name, file in zip(names, files, strict=True):
        if Path(str(name)).name != name:
            raise FormatError(f"{index}: shard {name!r} lies outside the folder; that is not allowed.")
        if not file.is_file():
            raise FormatError(f"{index}: names the shard {name}, which is missing. Fetch the file again.")
    return files


def _header(file: Path) -> tuple[dict[str, dict], bytes]:
    """The parsed header without its metadata, and its raw bytes; the file's length is checked against it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        raw = stream.read(length) if 8 + length <= size else b""
    try:
        header = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError):
        raise FormatError(f"{file}: is not a whole safetensors file (unreadable header). Fetch it again.") from None
    for name, entry in header.items():
        if not _is_entry(entry):
            raise FormatError(
                f"{file}: the header's entry of tensor {name!r} is not a dtype, a shape and two offsets. "
                "Fetch the file again."
            )
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise FormatError(
            f"{file}: is truncated or damaged: {size:,} bytes where its header promises {8 + length + end:,}. "
            "Fetch the file again."
        )
    return header, raw


def _is_entry(entry: Any) -> bool:
    """True for `{"dtype": str, "shape": [sizes], "data_offsets": [begin, end]}`, all numbers whole and in order."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    return _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _stored(file: Path, name: str, entry: dict) -> Stored:
    if entry["dtype"] not in DTYPES:
        raise FormatError(f"{file}: tensor {name!r} has the dtype {entry['dtype']!r}, which prunus cannot read.")
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise FormatError(
            f"{file}: tensor {name!r} of shape {list(shape)} in {entry['dtype']} takes "
            f"{math.prod(shape) * dtype.itemsize:,} bytes, and its offsets leave {end - begin:,}. Fetch the file again."
        )
    return Stored(file, dtype, shape, end - begin)
