"""How much of what mixtures do their remaining experts still do: a warning before a collapse, with numbers."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.methods.experts.choice import Case
from prunus.sites import Pool

_LOG = logging.getLogger("prunus")
# Sum over all mixtures of the share of their outputs that may change; and nats a token that each unit of it cost above
# that, at least and at most, as noise in stories260k (5 blocks) and SmolLM2-135M (30): experiments/experts.py.
LIMIT = 0.5
COST = (0.3, 1.1)
# Numbers of removed experts that are tried on the way to all that go, and tokens on which outputs are compared.
POINTS, TOKENS = 8, 256


def probe(case: Case, keep: Tensor) -> dict[str, Any]:
    """What goes with some experts of one mixture; JSON values.

    Args:
        case: the mixture.
        keep: bool `[experts]`, True = kept.

    Returns:
        `gone`: numbers of removed experts, rising to all that go, those that gave least first. `lost`: for each, the
        share of the mixture's output that changes, ‖Z − Z_D‖² / ‖Z‖². `routed`: share of Σ g ‖f‖ that the removed
        experts gave. `cosine`: mean over tokens and pairs of the cosine of two experts' outputs. `entropy`: of the
        router's choices, 1 = all experts equally often.
    """
    seen, pool = case.seen, case.pool
    curve = {int((~mask).sum()): case.replay.lost(mask) for mask in _on_the_way(case, keep)}
    total = float(seen.weighted.sum())
    often = seen.count / seen.count.sum().clamp_min(1)
    entropy = -float(torch.xlogy(often, often).sum()) / math.log(pool.groups) if pool.groups > 1 else 1.0
    return {
        "gone": list(curve), "lost": list(curve.values()),
        "routed": float(seen.weighted[~keep].sum()) / total if total else 0.0,
        "cosine": cosine(case.replay.outputs(case.replay.hidden[0][:TOKENS])), "entropy": entropy,
    }  # fmt: skip


def cosine(outputs: Tensor) -> float:
    """Mean cosine between the outputs `[experts, tokens, d]` of two experts for the same token."""
    experts = len(outputs)
    unit = torch.nn.functional.normalize(outputs.double(), dim=-1)
    # ‖Σ u‖² counts every pair twice and every expert with itself once.
    pairs = (unit.sum(0).square().sum(-1) - unit.square().sum((0, -1))) / max(experts * (experts - 1), 1)
    return float(pairs.mean())


def warn(found: Mapping[str, Mapping[str, Any]], pools: Sequence[Pool], size: int) -> None:
    """Say so, through the logger, where more goes than the others can make up for: Σ over mixtures of `lost` > `LIMIT`.

    Args:
        found: mixture -> what `probe` gave.
        pools: all mixtures.
        size: weights of the matrices of all blocks, of which sparsity is a share.
    """
    if not found:
        return
    lost = {name: one["lost"][-1] for name, one in found.items()}
    total = sum(lost.values())
    if total <= LIMIT:
        return
    worst = max(lost, key=lost.__getitem__)
    gone, experts = sum(one["gone"][-1] for one in found.values()), sum(pool.groups for pool in pools)
    routed, pairs = (sum(one[key] for one in found.values()) / len(found) for key in ("routed", "cosine"))
    low, high = (_times(math.exp(min(nats * total, 99.0))) for nats in COST)
    _LOG.warning(
        f"These experts are not redundant: without {gone} of {experts}, {_percent(total / len(pools))} of what a "
        f"mixture puts out on the calibration text changes (most in {worst}: {_percent(lost[worst])}). Where it was "
        f"measured, so much in {len(pools)} mixtures made perplexity {low} to {high} times as large. Those that go "
        f"gave {_percent(routed)} of the routed output, and two experts' outputs for one token have a mean cosine of "
        f"{pairs:.2f}. {_advice(found, pools, size)}"
    )


def _times(factor: float) -> str:
    return f"{factor:.1f}" if factor < 100 else "over 100"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _advice(found: Mapping[str, Mapping[str, Any]], pools: Sequence[Pool], size: int) -> str:
    """The largest sparsity on the way that stays below the limit, if any does."""
    safe = 0.0
    for point in range(1, POINTS):
        lost, weights = 0.0, 0
        for pool in pools:
            if (one := found.get(pool.name)) is not None:
                place = math.ceil(len(one["gone"]) * point / POINTS) - 1
                lost += one["lost"][place]
                weights += one["gone"][place] * int(pool.weights[0])
        if lost > LIMIT:
            break
        safe = weights / size
    if not safe:
        return "Remove fewer, or plan to train afterwards (prunus recover)."
    return f"A sparsity of {int(1000 * safe) / 1000:g} would stay below; or train afterwards (prunus recover)."


def _on_the_way(case: Case, keep: Tensor) -> list[Tensor]:
    """Masks with ever more of the experts that go, in the order of what they gave, equally many of each group."""
    spans = case.pool.spans
    gave = torch.where(keep, math.inf, case.seen.weighted).unflatten(0, (spans, -1))
    order = gave.argsort(dim=1, stable=True)
    each = int((~keep).sum()) // spans
    masks = []
    for count in sorted({math.ceil(each * point / POINTS) for point in range(1, POINTS + 1)}):
        one = torch.ones(spans, case.pool.groups // spans, dtype=torch.bool)
        masks.append(one.scatter_(1, order[:, :count], False).flatten())
    return masks
