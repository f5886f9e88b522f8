"""What a mixture did on the calibration text: who was chosen, with which weight, and what came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunus.models.experts import expert_loop
from prunus.models.pool import parts
from prunus.sites import Pool
from prunus.stream import Step


@dataclass
class Seen:
    """Running sums over the tokens routed to each expert, float64 `[experts]`.

    Attributes:
        count: tokens.
        norm: Σ ‖f_j(x)‖₂ of outputs before they are weighted.
        weighted: Σ g_j ‖f_j(x)‖₂, with the weight by which the model multiplies them.
        inputs: hidden states `[1, tokens, d]` that entered the mixture, one per batch, where they were asked for.
    """

    count: Tensor
    norm: Tensor
    weighted: Tensor
    inputs: list[Tensor] = field(default_factory=list)


def watch(step: Step, *, keep: bool = False) -> dict[str, Seen]:
    """Run a block once more on the calibration text and look at its mixtures; the probe is not counted.

    Args:
        step: a loaded block.
        keep: also keep what enters each mixture.
    """
    found = {pool.name: _empty(pool) for pool in step.block.pools}
    batches = len(step.dense) - 1  # the probe is the last
    with _hooks(step, found, batches, keep):
        step.rerun()
    for seen in found.values():
        step.processes.add_up([seen.count, seen.norm, seen.weighted])
    return found


@contextmanager
def _hooks(step: Step, found: dict[str, Seen], batches: int, keep: bool) -> Iterator[None]:
    handles = []
    for pool in step.block.pools:
        experts, _, mixture = parts(step.block, pool)
        calls = {"experts": 0, "mixture": 0}

        def routed(module: nn.Module, args: tuple, calls: dict = calls, seen: Seen = found[pool.name]) -> None:
            calls["experts"] += 1
            if calls["experts"] <= batches:
                _count(module, seen, *args[:3])

        def entered(module: nn.Module, args: tuple, calls: dict = calls, seen: Seen = found[pool.name]) -> None:
            calls["mixture"] += 1
            if keep and calls["mixture"] <= batches:
                seen.inputs.append(args[0].detach())

        handles += [experts.register_forward_pre_hook(routed), mixture.register_forward_pre_hook(entered)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _empty(pool: Pool) -> Seen:
    counts, weights, norms = (torch.zeros(pool.groups, dtype=torch.float64) for _ in range(3))
    return Seen(counts, weights, norms)


@torch.no_grad()
def _count(module: nn.Module, seen: Seen, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
    """Add one call: `hidden [tokens, d]`, the experts chosen `[tokens, k]` and their weights `[tokens, k]`."""
    ones = torch.ones_like(weights[:, :1])
    for expert in index.unique().tolist():
        tokens, slot = torch.where(index == expert)
        alone = torch.full((len(tokens), 1), expert, dtype=index.dtype, device=index.device)
        outputs = expert_loop(module, hidden[tokens], alone, ones[tokens], lambda name, value: None)
        norms = outputs.double().norm(dim=1)
        seen.count[expert] += len(tokens)
        seen.norm[expert] += float(norms.sum())
        seen.weighted[expert] += float((norms * weights[tokens, slot].double()).sum())
