"""Unequal blocks filled up with zeros to one width: the same function in a stock class, without the gain."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor
from torch.nn import functional

from prunus.errors import FormatError
from prunus.shapes.fit import Shape
from prunus.shapes.folder import Shapes
from prunus.shapes.stock import Stock, find_stock
from prunus.shapes.write import rewrite

HEADS, GROUPS = "num_attention_heads", "num_key_value_heads"


def pad_to_stock(shapes: Shapes) -> tuple[Stock, dict[str, int]]:
    """The narrowest stock configuration that all blocks fit into.

    Zero rows of q, k and v with zero columns of o, and zero neurons, add nothing to a block's output.

    Returns:
        The configuration, and the widths that every block shall have.

    Raises:
        FormatError: no stock class holds even the widest block; the sentence says why.
    """
    configs = [shapes.fitter.width(fit.widths) for fit in shapes.fits]
    changed = {key for fit in shapes.fits for key in fit.widths}
    odd = sorted(key for key in changed if "expert" in key and len({config.get(key) for config in configs}) > 1)
    if odd:
        raise FormatError(f"blocks differ in {odd[0]}, and an expert of zeros would still be chosen by the router")
    widths = {key: max(config[key] for config in configs) for key in changed if all(key in one for one in configs)}
    if not {HEADS, GROUPS} & set(widths):
        return find_stock(shapes, widths), widths
    shares = {config[HEADS] // config[GROUPS] for config in configs}
    if len(shares) > 1:
        raise FormatError(f"blocks differ in the number of query heads per KV head ({sorted(shares)})")
    share, reason = shares.pop(), ""
    for groups in range(max(config[GROUPS] for config in configs), shapes.config.num_key_value_heads + 1):
        wider = {**widths, HEADS: groups * share, GROUPS: groups}
        try:
            return find_stock(shapes, wider), wider
        except FormatError as problem:
            reason = reason or str(problem)
    raise FormatError(reason)


def pad_folder(folder: Path, shapes: Shapes, widths: Mapping[str, int]) -> None:
    """Fill the tensors of a folder up with zeros, so that all blocks have these widths.

    Raises:
        FormatError: a tensor holds several matrices in one, between which zeros would be needed.
    """
    wanted: dict[str, tuple[Shape, set[int]]] = {}
    head = getattr(shapes.fitter.config, "head_dim", 1)
    for index, fit in enumerate(shapes.fits):
        own = shapes.fitter.width(fit.widths)
        grown = {key: value - own[key] for key, value in widths.items()}
        steps = {step * (head if key in (HEADS, GROUPS) else 1) for key, step in grown.items()}
        for name, shape in shapes.fitter.shapes(index, widths).items():
            wanted[shapes.disk.get(f"{shapes.blocks}.{index}.{name}", "")] = (shape, steps)

    def change(name: str, tensor: Tensor) -> Tensor:
        shape, steps = wanted.get(name, (tuple(tensor.shape), set()))
        return _padded(tensor, shape, steps, name)

    rewrite(folder, change)


def _padded(tensor: Tensor, shape: Shape, steps: Collection[int], name: str) -> Tensor:
    """`tensor` with zeros behind its rows and columns; each may grow by one of `steps`, one width's growth."""
    grown = [after - before for before, after in zip(tensor.shape, shape, strict=True)]
    if any(step and step not in steps for step in grown):
        raise FormatError(f"{name} holds several matrices in one, which cannot be filled up with zeros at its end.")
    sides = [side for step in reversed(grown) for side in (0, step)]
    return functional.pad(tensor, sides) if any(grown) else tensor
