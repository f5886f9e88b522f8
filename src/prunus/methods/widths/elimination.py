"""Which groups of columns a matrix can best do without, if the columns that stay are refitted each time.

Optimal brain surgeon on groups (Kurtic et al. 2023, "ZipLM", arXiv:2302.04089, §3.1), in rounds of a few groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Elimination:
    """The order in which groups went.

    Attributes:
        order: int64, groups, the first to go first.
        losses: float64, for each of them its part in the growth of the output error Σ_i row_i·‖ΔW_i·X‖².
    """

    order: Tensor
    losses: Tensor


def eliminate(weight: Tensor, hessian: Tensor, groups: Tensor, rows: Tensor, count: int, rounds: int) -> Elimination:
    """Remove groups of columns, always those that cost least with all other columns refitted.

    Args:
        weight: `[out, in]`.
        hessian: of its inputs, damped, positive definite, `[in, in]`.
        groups: int64 `[in]`, the group of each column; -1 stays in any case.
        rows: `[out]`, what the squared error of each output counts.
        count: how many groups to remove.
        rounds: into how many rounds the removal of all groups would be cut; groups of one round are scored together.
    """
    weight = weight.double() * rows.double().sqrt()[:, None]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    left = torch.arange(len(groups), device=weight.device)
    total = int(groups.max()) + 1
    step = max(1, -(-total // rounds))
    order, losses = [], []
    while count > len(order):
        scores = _scores(weight, inverse, groups[left], total)
        most = min(step, count - len(order))
        lowest = scores.argsort(stable=True)[:most]
        gone = torch.isin(groups[left], lowest)
        block = inverse[gone][:, gone]
        loss, weight, inverse = _without(weight, inverse, block, gone)
        left = left[~gone]
        order += lowest.tolist()
        losses += [loss / most] * most
    return Elimination(torch.tensor(order, dtype=torch.int64), torch.tensor(losses, dtype=torch.float64))


def refit(weight: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """The columns that stay, fitted to give the outputs of all: W·H[:, S]·H[S, S]⁻¹; others +0.0. float32 `[out, in]`.

    Args:
        weight: `[out, in]`.
        hessian: of its inputs, damped, `[in, in]`.
        kept: bool `[in]`, S.
    """
    exact = hessian.double()
    factor = torch.linalg.cholesky(exact[kept][:, kept])
    wanted = weight.double() @ exact[:, kept]
    fitted = torch.zeros_like(weight, dtype=torch.float32)
    fitted[:, kept] = torch.cholesky_solve(wanted.T, factor).T.float()
    return fitted


def _scores(weight: Tensor, inverse: Tensor, groups: Tensor, total: int) -> Tensor:
    """tr(W_P·(H⁻¹_PP)⁻¹·W_Pᵀ) of each group; infinite for those that are gone."""
    scores = torch.full((total,), torch.inf, dtype=weight.dtype, device=weight.device)
    members = torch.bincount(groups[groups >= 0], minlength=total)
    if int(members.max()) <= 1:
        own = groups >= 0
        scores[groups[own]] = (weight.square().sum(0) / inverse.diagonal())[own]
        return scores
    for group in members.nonzero().flatten().tolist():
        mine = groups == group
        part = weight[:, mine]
        scores[group] = (torch.linalg.solve(inverse[mine][:, mine], part.T) * part.T).sum()
    return scores


def _without(weight: Tensor, inverse: Tensor, block: Tensor, gone: Tensor) -> tuple[float, Tensor, Tensor]:
    """The loss of removing columns, and what is left of the weight and of the inverse, refitted."""
    lost, across = weight[:, gone], inverse[gone][:, ~gone]
    solved = torch.linalg.solve(block, torch.cat([lost.T, across], dim=1))
    change, bridge = solved[:, : len(weight)], solved[:, len(weight) :]
    loss = float((change * lost.T).sum())
    return loss, weight[:, ~gone] - change.T @ across, inverse[~gone][:, ~gone] - across.T @ bridge
