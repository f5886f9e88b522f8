"""Makes a folder of narrowed tensors one that loads: its config.json, and what has to lie beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunus.errors import FormatError
from prunus.models import modelling
from prunus.models.checkpoint import INDEX, Checkpoint
from prunus.shapes.folder import Shapes, read_shapes
from prunus.shapes.stock import Stock, find_stock

ZEROS = "model-zero-biases.safetensors"
Change = Callable[[str, Tensor], Tensor]


def settle(folder: Path) -> dict[str, Any]:
    """Describe a checkpoint folder so that it loads: as a stock class if one fits, else with the modelling file.

    Args:
        folder: tensors in their own shapes, and config.json with the dense model's sizes or as `settle` left it.

    Returns:
        `{"stock": bool, "class": str, "relabelled": str | None, "per_layer": {…}, "reason": str}`; `reason` says why no
        stock class fits.

    Raises:
        FormatError: a block's tensors fit no widths of the model's class.
    """
    shapes = read_shapes(folder)
    if shapes.plain:
        if (folder / modelling.FILE).is_file():  # blocks with sizes of their own were here, and all of them are gone
            write_config(folder, shapes.written)
        return _done(shapes.written, None, "")
    try:
        if not shapes.uniform:
            raise FormatError("blocks differ in their widths")
        stock = find_stock(shapes, shapes.common or {})
    except FormatError as reason:
        config = own_class(shapes)
        write_config(folder, config)
        return _done(config, None, str(reason))
    write_config(folder, stock.config)
    add_zeros(folder, shapes, stock)
    return _done(stock.config, stock.relabelled, "")


def own_class(shapes: Shapes) -> dict[str, Any]:
    """config.json for the modelling file, with everything that makes blocks differ.

    Raises:
        FormatError: the blocks are one part of a larger model.
    """
    if shapes.part:
        raise FormatError(f"{shapes.blocks} is a part of a larger model, for which there is no modelling file.")
    written = {**shapes.written}
    head = getattr(shapes.fitter.config, "head_dim", None)
    if isinstance(head, int):
        written["head_dim"] = head  # or it would follow the number of heads
    shape: dict[str, Any] = {"blocks": shapes.blocks, "biases": shapes.biases}
    if shapes.ranks:
        shape["ranks"] = shapes.ranks
    return modelling.describe(written, type(shapes.config).__name__, shape, shapes.per_layer)


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, and the modelling file if it names one; an older one goes."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    code = folder / modelling.FILE
    code.unlink(missing_ok=True)  # never written through a link into another folder
    if modelling.is_described(config):
        code.write_text(modelling.source(dict(config)), encoding="utf-8")


def add_zeros(folder: Path, shapes: Shapes, stock: Stock) -> None:
    """Add the biases that the stock class has and the model does not, as zeros in a file of their own."""
    if not stock.zeros:
        return
    checkpoint = Checkpoint.open(folder)
    zeros = {}
    for name, shape in stock.zeros.items():
        weight = checkpoint.tensors[shapes.disk[f"{name.removesuffix('.bias')}.weight"]]
        zeros[shapes.stored(name)] = torch.zeros(shape, dtype=weight.dtype)
    files = sorted({stored.file for stored in checkpoint.tensors.values()})
    if files == [folder / "model.safetensors"]:  # under this name transformers would read it alone
        files = [files[0].rename(folder / "model-weights.safetensors")]
    save_file(zeros, folder / ZEROS, metadata={"format": "pt"})
    index(folder, [*files, folder / ZEROS])


def index(folder: Path, files: list[Path]) -> None:
    """Write the index of several shards."""
    shards = [Checkpoint.of_shard(file) for file in files]
    where = {name: stored.file.name for shard in shards for name, stored in shard.tensors.items()}
    total = sum(shard.bytes for shard in shards)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def rewrite(folder: Path, change: Change) -> None:
    """Replace every tensor of a folder by what `change(name on disk, tensor)` gives, one shard in memory at a time."""
    checkpoint = Checkpoint.open(folder)
    for file in sorted({stored.file for stored in checkpoint.tensors.values()}):
        names = [name for name, stored in checkpoint.tensors.items() if stored.file == file]
        tensors = {name: change(name, tensor).contiguous() for name, tensor in checkpoint.read(names)}
        save_file(tensors, file, metadata={"format": "pt"})


def _done(config: Mapping[str, Any], relabelled: str | None, reason: str) -> dict[str, Any]:
    return {
        "stock": not modelling.is_described(config),
        "class": config["architectures"][0],
        "relabelled": relabelled,
        "per_layer": config.get("per_layer_config", {}),
        "reason": reason,
    }
