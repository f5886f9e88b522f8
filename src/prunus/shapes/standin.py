"""A folder with smaller shapes and zeros for weights: it takes as long to run as a model of these shapes."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from prunus.models.fitted import is_fitted
from prunus.models.modelling import ours
from prunus.models.weights import Weights
from prunus.shapes.depth import without
from prunus.shapes.fit import Shape
from prunus.shapes.legal import narrowed
from prunus.shapes.write import index, settle
from prunus.sites import Block, Width


def narrow_evenly(widths: Sequence[Width], blocks: Sequence[Block], share: float) -> dict[str, int]:
    """Width -> groups that stay, if the same share of all goes: whole groups of heads, and neurons for the rest.

    Args:
        widths: of all blocks.
        blocks: with their matrices.
        share: of the weights of all matrices to remove.
    """
    target = share * sum(info.size for block in blocks for info in block.infos)
    total = sum(int(width.weights.sum()) for width in widths)
    left: dict[str, int] = {}
    for kind in ("heads", "neurons"):
        mine = [width for width in widths if width.kind == kind]
        rest = sum(int(width.weights.sum()) for width in mine)
        part = target / total if kind == "heads" and rest < total else target / rest if rest else 0.0
        for width in mine:
            left[width.name] = max(1, round(width.groups * (1 - part)))
            spent = (width.groups - left[width.name]) * int(width.weights.sum()) / width.groups
            target, total = target - spent, total - (int(width.weights.sum()) if kind == "heads" else 0)
            if kind == "neurons":
                rest -= int(width.weights.sum())
                part = target / rest if rest else 0.0
    return left


def write_standin(
    weights: Weights,
    blocks: Sequence[Block],
    folder: Path,
    *,
    dropped: Collection[Block] = (),
    left: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write one, a shard for each block.

    Args:
        weights: of the dense model.
        blocks: all of them.
        folder: to make.
        dropped: blocks that go; the last ones of their tower.
        left: width -> groups that stay; all unless given.
        trust_remote_code: as the run was allowed.

    Raises:
        FormatError: no widths of the model's class give these shapes.
    """
    folder.mkdir()
    dense = weights.checkpoint.folder
    gone: dict[str, set[int]] = {}
    for block in dropped:
        gone.setdefault(block.tower, set()).add(block.index)
    config = without(dense, gone, trust_remote_code)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    names = [weights.outside([block.name for block in blocks])]
    names += [weights.sources(block.name) for block in blocks if block not in dropped]
    shapes: dict[str, Shape] = {}
    for block in blocks if left else ():
        own = {name: tuple(value.shape) for name, value in block.module.state_dict().items()}
        shapes |= {f"{block.name}.{name}": shape for name, shape in narrowed(block, own, left or {}).items()}
    files = []
    for number, members in enumerate(names):
        tensors = {}
        for name in members:
            stored, targets = weights.checkpoint.tensors[name], weights.targets[name]
            plain = name not in weights.converted and len(targets) == 1
            shape = shapes.get(targets[0], stored.shape) if plain else stored.shape
            tensors[name] = torch.zeros(shape, dtype=stored.dtype)
        files.append(folder / f"model-{number:05d}.safetensors")
        save_file(tensors, files[-1], metadata={"format": "pt"})
    index(folder, files)
    if left or ours(dense) or is_fitted(dense):
        settle(folder)
