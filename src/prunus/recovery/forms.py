"""Four ways to change a sparse weight by few numbers so that its zeros stay, and the gradients of each, written out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.bitmap import unpack

Parameters = tuple[Tensor, ...]


@dataclass(frozen=True)
class Masked:
    """E = W + s·P∘(B·A): the mask is applied while training, so that the merge is exact.

    PERP (arXiv:2312.15230) calls it MaskLoRA; SQFT (arXiv:2410.03750) SparsePEFT.

    Attributes:
        scale: s = alpha / rank.
    """

    scale: float

    def weight(self, weight: Tensor, bits: Tensor, parameters: Parameters) -> Tensor:
        """E, in one buffer; θ = (A `[r, in]`, B `[out, r]`)."""
        a, b = parameters
        effective = torch.mm(b, a)
        effective.masked_fill_(~unpack(bits, weight.shape[1]), 0.0)
        return effective.mul_(self.scale).add_(weight)

    def gradients(self, gradient: Tensor, weight: Tensor, bits: Tensor, parameters: Parameters) -> Parameters:
        """∂A = s·Bᵀ·(P∘G), ∂B = s·(P∘G)·Aᵀ."""
        a, b = parameters
        gradient.masked_fill_(~unpack(bits, weight.shape[1]), 0.0)
        return torch.mm(b.T, gradient).mul_(self.scale), torch.mm(gradient, a.T).mul_(self.scale)


@dataclass(frozen=True)
class Scaled:
    """E = W∘(B·A): PERP's ScaleLoRA (MultLoRA in its later versions); a zero times anything stays zero."""

    def weight(self, weight: Tensor, bits: Tensor, parameters: Parameters) -> Tensor:
        """E, in one buffer; θ = (A `[r, in]`, B `[out, r]`)."""
        a, b = parameters
        return torch.mm(b, a).mul_(weight)

    def gradients(self, gradient: Tensor, weight: Tensor, bits: Tensor, parameters: Parameters) -> Parameters:
        """∂A = Bᵀ·(W∘G), ∂B = (W∘G)·Aᵀ."""
        a, b = parameters
        gradient.mul_(weight)
        return torch.mm(b.T, gradient), torch.mm(gradient, a.T)


@dataclass(frozen=True)
class RowsTimesColumns:
    """E = W∘(1 + s·S), S_oj = b_o·A_{⌊o·r/out⌋, j}: SPP (arXiv:2405.16057).

    The rows are divided into r groups as equal as they can be; each group has one template A_i of scales for its
    columns, and each row its own factor b. The published code needs a number of rows that r divides; ⌊o·r/out⌋ does
    not. Its dropout on the input of the adapter alone is left out: it would need a second product.

    Attributes:
        scale: s.
    """

    scale: float

    def weight(self, weight: Tensor, bits: Tensor, parameters: Parameters) -> Tensor:
        """E, in one buffer; θ = (A `[r, in]`, b `[out, 1]`)."""
        a, b = parameters
        return a[group(len(weight), len(a), a.device)].mul_(b).mul_(self.scale).add_(1.0).mul_(weight)

    def gradients(self, gradient: Tensor, weight: Tensor, bits: Tensor, parameters: Parameters) -> Parameters:
        """∂A_i = s·Σ_{o in i} b_o·W_o∘G_o, ∂b_o = s·Σ_j A_ij·W_oj·G_oj."""
        a, b = parameters
        rows = group(len(weight), len(a), a.device)
        gradient.mul_(weight).mul_(self.scale)
        per_row = torch.cat([torch.mv(part, template) for part, template in _by_group(gradient, rows, a)])
        templates = torch.zeros_like(a).index_add_(0, rows, gradient.mul_(b))
        return templates, per_row.unsqueeze(1)


def group(rows: int, groups: int, device: torch.device) -> Tensor:
    """Group of every row, ⌊o·r/out⌋, int64 `[rows]`."""
    return torch.arange(rows, device=device) * groups // rows


def _by_group(gradient: Tensor, rows: Tensor, a: Tensor) -> list[tuple[Tensor, Tensor]]:
    counts = torch.bincount(rows, minlength=len(a)).tolist()
    return list(zip(gradient.split(counts), a, strict=True))


def kaiming(rows: int, columns: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """U(-1/√columns, 1/√columns), `[rows, columns]`: Kaiming's with a = √5, as LoRA's A begins everywhere."""
    bound = 1 / math.sqrt(columns)
    return _drawn(torch.rand, rows, columns, generator, device).mul_(2 * bound).sub_(bound)


def ones(rank: int, shape: tuple[int, int], spread: float, generator: torch.Generator | None, device) -> Parameters:
    """A `[rank, in]` and B `[out, rank]` with B·A = 1 everywhere.

    With equal entries all rank-one terms would have equal gradients for ever, and the rank of B·A would stay 1 (the
    published code has that defect). So A varies by `spread`, in such a way that its sum over the terms does not.
    """
    side = 1 / math.sqrt(rank)
    noise = _drawn(torch.randn, rank, shape[1], generator, device)
    noise = noise - noise.mean(0) if rank > 1 else noise * 0
    return side * (1 + spread * noise), torch.full((shape[0], rank), side, device=device)


def _drawn(draw, rows: int, columns: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Random numbers drawn on the CPU, so that every device and process has the same."""
    if device.type == "meta":
        return torch.empty(rows, columns, device=device)
    return draw(rows, columns, generator=generator).to(device)
