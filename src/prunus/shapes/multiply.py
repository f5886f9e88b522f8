"""Factors multiplied back into the matrices that they stand for: the same function in a stock class, no gain."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from prunus.models.checkpoint import INDEX, Checkpoint
from prunus.models.thin import INNER, OUTER
from prunus.shapes.folder import Shapes, read_shapes
from prunus.shapes.write import index, write_config


def multiply_folder(folder: Path, shapes: Shapes) -> tuple[Shapes, torch.dtype]:
    """Replace every pair of factors of a folder by their product, one shard in memory at a time.

    Args:
        folder: a copy of the one that `shapes` was read from.
        shapes: with ranks.

    Returns:
        What the folder is now, and the narrowest dtype that a product was rounded to.
    """
    checkpoint = Checkpoint.open(folder)
    parts = {
        shapes.disk[f"{path}.{part}"]: (path, part)
        for path in shapes.ranks
        for part in (f"{INNER}.weight", f"{OUTER}.weight", f"{OUTER}.bias")
        if f"{path}.{part}" in shapes.disk
    }
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    inner = {path: name for name, (path, part) in parts.items() if part == f"{INNER}.weight"}
    written: list[Path] = []
    rounded = torch.float32
    for file in files:
        tensors: dict[str, Tensor] = {}
        for name, tensor in checkpoint.read([n for n, stored in checkpoint.tensors.items() if stored.file == file]):
            path, part = parts.get(name, ("", ""))
            if part == f"{OUTER}.weight":
                ((_, other),) = checkpoint.read([inner[path]])
                product = (tensor.double() @ other.double()).to(tensor.dtype)
                turned = isinstance(shapes.model.get_submodule(path), Conv1D)
                tensors[name.replace(f".{OUTER}.weight", ".weight")] = product.T if turned else product
                rounded = min(rounded, tensor.dtype, key=lambda kind: kind.itemsize)
            elif part != f"{INNER}.weight":
                tensors[name.replace(f".{OUTER}.bias", ".bias") if part else name] = tensor
        fresh = file.with_name(f".{file.name}.new")  # later shards may still need what lies in this one
        save_file({name: value.contiguous() for name, value in tensors.items()}, fresh, metadata={"format": "pt"})
        written.append(fresh)
    for fresh, file in zip(written, files, strict=True):
        fresh.replace(file)
    if (folder / INDEX).is_file():
        index(folder, files)
    write_config(folder, shapes.written)
    return read_shapes(folder), rounded
