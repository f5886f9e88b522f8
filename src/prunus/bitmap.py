"""Masks at one bit a weight, as the registry of masks and the packed format store them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(keep: Tensor) -> Tensor:
    """Bool `[rows, columns]` → uint8 `[rows, ceil(columns / 8)]`.

    Bit j of a byte, the lowest first, is column 8·byte + j. The last byte of a row is filled up with zeros.
    """
    bytes_ = pad(keep.to(torch.uint8), (0, -keep.shape[1] % 8)).unflatten(1, (-1, 8))
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    return (bytes_ * places).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, columns: int) -> Tensor:
    """The inverse of `pack`: bool `[rows, columns]`."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[..., None] >> shifts & 1).flatten(1)[:, :columns].bool()
