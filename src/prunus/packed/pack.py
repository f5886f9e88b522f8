"""From a dense matrix to a packed one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from prunus import bitmap
from prunus.errors import ModelError
from prunus.packed.matrix import GROUP, KINDS, PackedMatrix, QuantizedMatrix

# int4: shares of the largest magnitude that are tried as the largest number; the one with the least squared error wins.
_SHARES = torch.linspace(0.6, 1.0, 9)
_ROWS = 64  # looked at together, so that they stay in the processor's cache


@dataclass(frozen=True)
class Levels:
    """Whole numbers from `least` to `most` that stand for weights."""

    least: int
    most: int


INT8, INT4 = Levels(-127, 127), Levels(-8, 7)


def pack(weight: Tensor, kind: str, order: Tensor | None = None) -> PackedMatrix:
    """Leave the zeros out; float kinds keep every bit that fits, int8 and int4 round to the nearest number.

    Weights of either zero are left out, so -0.0 comes back as 0.0.

    Args:
        weight: `[rows, columns]`, floating, finite.
        kind: of the values: a name of `KINDS`.
        order: int `[columns]`, a permutation: stored column j is column `order[j]`.

    Raises:
        ModelError: weights that are NaN, infinite or too large for float16 scales.
    """
    assert kind in KINDS, kind
    if order is not None:
        weight = weight[:, order.long()]
    mask = weight != 0
    if kind in ("fp32", "bf16"):
        values, scales = weight[mask].to(KINDS[kind]), None
        if not torch.isfinite(values).all():
            raise ModelError("A matrix holds NaN or infinite weights. Repair the checkpoint.")
    else:
        levels = INT8 if kind == "int8" else INT4
        codes, scales = quantize(weight.float(), levels)
        values = codes[mask] if kind == "int8" else _halves(codes, mask)
    stored = None if order is None else order.to(torch.int32)
    rows, columns = weight.shape
    return PackedMatrix(rows, columns, kind, bitmap.pack(mask), values, scales, stored)


def quantize_dense(weight: Tensor) -> QuantizedMatrix:
    """All weights of a matrix as int8, symmetric, one scale for every 128 columns of a row.

    Raises:
        ModelError: as `pack`.
    """
    return QuantizedMatrix(*quantize(weight.float(), INT8))


def quantize(weight: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """The nearest whole numbers, int8 `[rows, columns]`, and float16 scales `[rows, groups]`.

    int8 scales map the largest magnitude of a group to 127. With the few numbers of int4 it pays to clip a little: of
    some shares of the largest magnitude the one with the least squared error of the group is taken.

    Raises:
        ModelError: weights that are NaN, infinite or too large for float16 scales.
    """
    columns = weight.shape[1]
    groups = pad(weight, (0, -columns % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(2)
    if not bool((largest / levels.most <= torch.finfo(torch.float16).max).all()):  # also false for NaN
        raise ModelError("A matrix holds NaN, infinite or absurdly large weights. Repair the checkpoint.")
    scales = (largest / levels.most).half()
    if levels is INT4:
        scales = _least_error(groups, largest, levels)
    codes = _round(groups, scales, levels)
    return codes.flatten(1)[:, :columns].contiguous(), scales


def _least_error(groups: Tensor, largest: Tensor, levels: Levels) -> Tensor:
    parts = zip(groups.split(_ROWS), largest.split(_ROWS), strict=True)
    return torch.cat([_search(part, most, levels) for part, most in parts])


def _search(groups: Tensor, largest: Tensor, levels: Levels) -> Tensor:
    best = torch.full_like(largest, torch.inf)
    scales = torch.zeros_like(largest, dtype=torch.float16)
    for share in _SHARES:
        tried = (largest * share / levels.most).half()
        # Zeros are rounded to zero whatever the scale, so pruned weights do not count.
        error = (_round(groups, tried, levels) * tried.float()[..., None] - groups).square().sum(2)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    return scales


def _round(groups: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    inverse = torch.where(scales > 0, 1 / scales.float(), 0.0)  # a group of zeros has the scale 0
    return (groups * inverse[..., None]).round_().clamp_(levels.least, levels.most).to(torch.int8)


def _halves(codes: Tensor, mask: Tensor) -> Tensor:
    """int4 numbers of the kept weights, two in a byte, each row beginning a byte."""
    kept = mask.sum(1)
    starts = 2 * ((kept + 1) // 2)
    row = torch.arange(len(kept), device=codes.device).repeat_interleave(kept)
    # In the padded array a row is preceded by one half for every odd row above it.
    place = torch.arange(int(kept.sum()), device=codes.device) + ((starts - kept).cumsum(0) - (starts - kept))[row]
    halves = torch.zeros(int(starts.sum()), dtype=torch.uint8, device=codes.device)
    halves[place] = (codes[mask] + 8).to(torch.uint8)
    return halves[0::2] | halves[1::2] << 4
