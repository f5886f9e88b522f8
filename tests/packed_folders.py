"""Small packed folders for tests, and ways to break them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunus.packed.folder import MANIFEST, PackedFolder, checksum, sign
from prunus.packed.pack import pack, quantize_dense
from prunus.packed.writing import Writer

SHARD = "packed-00001.safetensors"


def sparse(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[rows, columns]`, some two thirds zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(weight.shape, generator=generator) < 0.34)).to(dtype)


def small_folder(folder: Path) -> Path:
    """One matrix of every kind, one of them in another order of columns; a table; a vector."""
    folder.mkdir(parents=True)
    writer = Writer(folder)
    for seed, kind in enumerate(("fp32", "bf16", "int8", "int4")):
        weight = sparse(6, 150 + seed, seed, torch.bfloat16 if kind == "bf16" else torch.float32)
        order = torch.randperm(weight.shape[1]) if kind == "int4" else None
        writer.add(f"layers.{seed}.weight", pack(weight, kind, order), weight)
    table = torch.randn(9, 20)
    writer.add("embed.weight", quantize_dense(table), table)
    writer.add("norm.weight", torch.ones(20), torch.ones(20))
    writer.finish("lossless", {"prunus": "test"})
    return folder


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a packed folder, as it was."""
    packed = PackedFolder.open(folder)
    return {name: packed.dense(name) for name in packed.entries}


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest and sign it again, as an attacker would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["crc32"] = sign(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors and sign everything again."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD)
    sign_tensors(folder, tensors)


def sign_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put the checksums of these tensors into the manifest."""

    def update(manifest: dict) -> None:
        for name, entry in manifest["tensors"].items():
            for part in entry["crc32"]:
                key = f"{name}:{part}" if part else name
                if key in tensors:
                    entry["crc32"][part] = checksum(tensors[key])

    edit_manifest(folder, update)


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))

    return apply


def _entry(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda manifest: manifest["tensors"][name].update(values))


def _manifest(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda manifest: manifest.update(values))


def _bytes(file: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes())) and None


def _flip(raw: bytes) -> bytes:
    return raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 4]) + raw[len(raw) // 2 + 1 :]


def _put(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[index] = value
        return tensor

    return change


# What was done to the folder -> a word of the refusal.
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights cut short": (_bytes(SHARD, lambda raw: raw[:-7]), "truncated"),
    "weights too long": (_bytes(SHARD, lambda raw: raw + b"\0" * 64), "truncated or damaged"),
    "one bit of the weights flipped": (_bytes(SHARD, _flip), "not those that were written"),
    "weights empty": (_bytes(SHARD, lambda raw: b""), "not a whole safetensors"),
    "header length absurd": (_bytes(SHARD, lambda raw: b"\xff" * 8 + raw[8:]), "not a whole safetensors"),
    "weights missing": (lambda folder: (folder / SHARD).unlink(), "lacks"),
    "manifest cut short": (_bytes(MANIFEST, lambda raw: raw[:-9]), "not JSON"),
    "manifest flipped": (_bytes(MANIFEST, lambda raw: raw.replace(b"150", b"151")), "checksum"),
    "manifest missing": (lambda folder: (folder / MANIFEST).unlink(), "not a packed model"),
    "manifest a list": (_bytes(MANIFEST, lambda raw: b"[]"), "does not say"),
    "manifest deeply nested": (_bytes(MANIFEST, lambda raw: b"[" * 100000), "not JSON"),
    "another format": (_manifest(format="gguf"), "does not say"),
    "another version": (_manifest(version=2), "version 2"),
    "version as text": (_manifest(version="1"), "version '1'"),
    "version that Python takes for 1": (_manifest(version=True), "version True"),
    "unknown values": (_manifest(values="int3"), "values are 'int3'"),
    "no files": (_manifest(files=[]), "names no files"),
    "file outside": (_manifest(files=["../packed-00001.safetensors"]), "no safetensors file"),
    "tensors a list": (_manifest(tensors=[]), "not a dict"),
    "a tensor too many announced": (
        lambda folder: edit_manifest(folder, lambda m: m["tensors"].update(more=m["tensors"]["norm.weight"])), "lacks",
    ),
    "a tensor unannounced": (
        lambda folder: edit_manifest(folder, lambda m: m["tensors"].pop("norm.weight")), "unannounced",
    ),
    "unknown form": (_entry("layers.0.weight", form="zip"), "unknown form"),
    "unknown kind": (_entry("layers.0.weight", kind="fp8"), "unknown kind"),
    "negative shape": (_entry("layers.0.weight", shape=[-6, 150]), "no possible shape"),
    "huge shape": (_entry("layers.0.weight", shape=[2**40, 150]), "no possible shape"),
    "shape that overflows": (_entry("layers.0.weight", shape=[2**31 - 1, 2**31 - 1, 150]), "no matrix"),
    "shape of a vector": (_entry("layers.0.weight", shape=[900]), "no matrix"),
    "more rows than there are": (_entry("layers.0.weight", shape=[7, 150]), "the format asks"),
    "fewer columns than there are": (_entry("layers.0.weight", shape=[6, 149]), "beyond the last"),
    "another kind of values": (_entry("layers.0.weight", kind="bf16"), "the format asks"),
    "float16 announced for plain": (_entry("norm.weight", dtype="float16"), "announced"),
    "a bit beyond the columns": (_tensor("layers.0.weight:bitmap", lambda t: t | 128), "beyond the last"),
    "a kept bit too many": (_tensor("layers.0.weight:bitmap", _put(0, 255)), "values"),
    "a value short": (_tensor("layers.0.weight:values", lambda t: t[:-1]), "values"),
    "values in two dimensions": (_tensor("layers.0.weight:values", lambda t: t[None]), "values"),
    "NaN value": (_tensor("layers.0.weight:values", _put(0, float("nan"))), "NaN"),
    "infinite bfloat16": (_tensor("layers.1.weight:values", _put(0, float("inf"))), "NaN or infinite"),
    "NaN scale": (_tensor("layers.2.weight:scales", _put(0, float("nan"))), "scale is NaN"),
    "infinite scale": (_tensor("layers.3.weight:scales", _put(0, float("inf"))), "scale is NaN"),
    "negative scale": (_tensor("layers.2.weight:scales", _put(0, -1.0)), "negative"),
    "a scale short": (_tensor("layers.2.weight:scales", lambda t: t[:, :1]), "scales"),
    "NaN scale of a table": (_tensor("embed.weight:scales", _put(0, float("nan"))), "scale is NaN"),
    "order names a column twice": (_tensor("layers.3.weight:order", lambda t: t.clamp(min=1)), "once"),
    "order beyond the columns": (_tensor("layers.3.weight:order", _put(0, 10**6)), "once"),
    "order negative": (_tensor("layers.3.weight:order", _put(0, -1)), "once"),
    "order of 64 bits": (_tensor("layers.3.weight:order", lambda t: t.long()), "order"),
    "half byte not empty": (_tensor("layers.3.weight:values", lambda t: t | 0xF0), "unused half"),
    "NaN in a vector": (_tensor("norm.weight", _put(0, float("nan"))), "NaN"),
}  # fmt: skip
