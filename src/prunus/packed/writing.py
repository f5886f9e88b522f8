"""A packed folder, written: one tensor at a time, so that memory is bounded by a shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_IMODE
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import prunus
from prunus.errors import ModelError
from prunus.loading import KEY
from prunus.models.checkpoint import Checkpoint
from prunus.output import DROPPED
from prunus.packed.folder import DTYPES, FORMAT, MANIFEST, VALUES, VERSION, Read, checksum, part_name, sign
from prunus.packed.layout import Layout, layout
from prunus.packed.matrix import PackedMatrix
from prunus.packed.orders import read_orders
from prunus.packed.pack import pack, quantize_dense

SHARD = 1 << 28  # bytes collected before a file is written
# Below this share of zeros a bitmap costs more than it saves, with float values.
WORTH = {"fp32": 1 / 32, "bf16": 1 / 16}


@dataclass
class Writer:
    """Collects tensors into shards, and what the manifest has to say of them."""

    out: Path
    entries: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, found: Read, original: Tensor) -> None:
        """Take one tensor of the model, in the form in which it shall be stored."""
        entry: dict[str, Any] = {"dtype": str(original.dtype).removeprefix("torch."), "shape": list(original.shape)}
        if isinstance(found, Tensor):
            entry |= {"form": "plain"} | ({"kind": "bf16"} if found.dtype != original.dtype else {})
            parts = {"": found}
        elif isinstance(found, PackedMatrix):
            entry |= {"form": "packed", "kind": found.kind, "order": found.order is not None}
            parts = {"bitmap": found.bitmap, "values": found.values, "scales": found.scales, "order": found.order}
        else:
            entry["form"], parts = "int8", {"codes": found.codes, "scales": found.scales}
        kept = {part: tensor.contiguous() for part, tensor in parts.items() if tensor is not None}
        entry["crc32"] = {part: checksum(tensor) for part, tensor in kept.items()}
        self.entries[name] = entry
        self.waiting |= {part_name(name, part): tensor for part, tensor in kept.items()}
        if sum(tensor.nbytes for tensor in self.waiting.values()) > SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        if self.waiting:
            self.files.append(f"packed-{len(self.files) + 1:05d}.safetensors")
            save_readable(self.waiting, self.out / self.files[-1])
            self.waiting = {}

    def finish(self, values: str, made: Mapping[str, Any]) -> None:
        """Write the rest, and the manifest."""
        self.flush()
        manifest = {"format": FORMAT, "version": VERSION, "values": values, "files": self.files}
        manifest |= {"tensors": self.entries, "made": dict(made)}
        manifest["crc32"] = sign(manifest)
        (self.out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def write(source: Path, out: Path, values: str, trust_remote_code: bool = False) -> list[str]:
    """Pack the model of a Hugging Face folder into the new folder `out`.

    Args:
        source: a local model folder.
        out: does not exist yet.
        values: a name of `VALUES`.
        trust_remote_code: run Python code of the folder to learn its structure.

    Returns:
        Sentences for the user.

    Raises:
        PrunusError: the model cannot be read or its structure is not known.
    """
    assert values in VALUES, values
    checkpoint = Checkpoint.open(source)
    plan = layout(source, checkpoint, trust_remote_code)
    orders = read_orders(source, checkpoint)
    out.mkdir(parents=True)
    writer, notes = Writer(out), []
    rounded = 0
    for name, tensor in checkpoint.read(checkpoint.tensors):
        try:
            found = form(name, tensor, values, plan, orders.get(name))
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from None
        rounded += values == "bf16" and name in plan.matrices | plan.tables and not _fits(tensor)
        writer.add(name, found, tensor)
    if rounded:
        notes.append(
            f"{rounded} matrices hold float32 weights that bfloat16 rounds; --values lossless keeps every bit."
        )
    writer.finish(values, {"prunus": prunus.__version__})
    copy_files(source, out, packed=True)
    return notes


def save_readable(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that whoever may read its folder may read; safetensors makes it the owner's alone."""
    save_file(dict(tensors), file, metadata=metadata)
    file.chmod(S_IMODE(file.parent.stat().st_mode) & 0o666)


def copy_files(source: Path, out: Path, packed: bool) -> None:
    """Configuration, tokenizer and provenance; config.json says whether the folder is packed."""
    for path in sorted(source.iterdir()):
        drop = any(path.match(pattern) for pattern in DROPPED if pattern != "prunus.json") or path.name == MANIFEST
        if path.is_file() and not drop and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", out / "additional_chat_templates")
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key != KEY} | ({KEY: "packed"} if packed else {})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def form(name: str, tensor: Tensor, values: str, plan: Layout, order: Tensor | None) -> Read:
    """How one tensor is stored.

    Args:
        name: on disk.
        tensor: as in the Hugging Face folder.
        values: a name of `VALUES`.
        plan: which tensors are what.
        order: of the columns of a packed matrix.

    Raises:
        ModelError: it holds NaN, infinite or absurdly large weights.
    """
    flat = tensor.flatten(0, -2) if tensor.ndim >= 2 else tensor
    if name in plan.matrices:
        kind = values if values in ("int8", "int4") else _exact_kind(tensor, values)
        zeros = 1 - int(tensor.count_nonzero()) / max(tensor.numel(), 1)
        if tensor.numel() and zeros >= WORTH.get(kind, 0.0):
            return pack(flat, kind, order)
    if name in plan.tables and values in ("int8", "int4"):
        return quantize_dense(flat)
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise ModelError("holds NaN or infinite weights. Repair the checkpoint.")
    return (
        tensor.bfloat16() if name in plan.matrices | plan.tables and _exact_kind(tensor, values) == "bf16" else tensor
    )


def _exact_kind(tensor: Tensor, values: str) -> str:
    return "bf16" if values == "bf16" or _fits(tensor) else "fp32"


def _fits(tensor: Tensor) -> bool:
    """Whether bfloat16 holds every value."""
    assert tensor.dtype in DTYPES.values(), tensor.dtype
    return tensor.dtype == torch.bfloat16 or torch.equal(tensor.bfloat16().to(tensor.dtype), tensor)
