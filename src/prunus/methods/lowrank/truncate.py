"""The best product of two thin matrices, under plain and under weighted errors, and what each rank would lose."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus.errors import CalibrationError

_PANEL = 1024  # rows of M that are read at once


def spectrum(weight: Tensor, moment: Tensor | None) -> Tensor:
    """σ², float64 `[min(out, in)]`, largest first: what each direction of `truncate` is worth.

    Args:
        weight: `[out, in]`.
        moment: M `[in, in]`, symmetric and positive semidefinite: the error is tr((W - BA)·M·(W - BA)ᵀ); None:
            identity.
    """
    return _directions(weight, moment)[0]


def truncate(weight: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """B `[out, rank]` and A `[rank, in]`, float32, with the smallest tr((W - BA)·M·(W - BA)ᵀ) of this rank.

    With M = SSᵀ and WS = UΣVᵀ, the best rank r of WS is U_r·U_rᵀ·WS (Eckart & Young 1936), so B = U_r and A = U_rᵀ·W
    give it back without an inverse of S, and without asking M to have full rank. SVD-LLM (Wang et al. 2024,
    arXiv:2403.07378, §3.1) reaches the same by the Cholesky factor of XXᵀ. Both factors then get the same size.

    Args:
        weight: `[out, in]`; not changed.
        moment: as in `spectrum`.
        rank: at least 1, at most min(out, in).
    """
    basis = _directions(weight, moment)[1][:, :rank]
    inner = basis.T @ weight.double()
    # A row of A is as long as its direction is strong; shared out, neither factor leaves the range of 16 bits.
    size = inner.norm(dim=1).sqrt()
    size = torch.where(size > 0, size, torch.ones_like(size))
    return (basis * size).float(), (inner / size[:, None]).float()


def _between(core: Tensor, moment: Tensor) -> Tensor:
    """core·M·coreᵀ, float64, some rows of M at a time: of 10,000 inputs M alone would take 800 MB in float64."""
    total = core.new_zeros(core.shape[0], core.shape[0])
    for part, rows in zip(core.split(_PANEL, dim=1), moment.split(_PANEL), strict=True):
        total += part @ (rows.double() @ core.T)
    return total


def _directions(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Squared singular values of W·M^(1/2), largest first, and its left singular vectors `[out, min(out, in)]`.

    Raises:
        CalibrationError: the weights or the inputs are not finite.
    """
    exact = weight.double()
    tall = exact.shape[0] > exact.shape[1]
    # W = QR keeps the eigenvectors small: those of R·M·Rᵀ, turned by Q, are those of W·M·Wᵀ.
    turn, core = torch.linalg.qr(exact) if tall else (None, exact)
    gram = core @ core.T if moment is None else _between(core, moment)
    if not bool(gram.isfinite().all()):
        raise CalibrationError(
            "A matrix or its inputs hold NaN or infinite numbers, so it has no singular values. Try --dtype float32 or "
            "bfloat16, or other calibration text."
        )
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    vectors = vectors.flip(1)
    return values.flip(0).clamp(min=0), vectors if turn is None else turn @ vectors
