"""What a mixture did on the calibration text: who was chosen, with which weight, what came out, and what went in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.models.experts import expert_loop
from prunus.models.pool import parts
from prunus.sites import Pool
from prunus.stream import Step

# Positional and keyword arguments of a call.
Entry = tuple[tuple, dict[str, Any]]


@dataclass
class Seen:
    """Running sums over the tokens routed to each expert, float64 `[experts]`.

    Attributes:
        count: tokens.
        norm: Σ ‖f_j(x)‖₂ of outputs before they are weighted.
        weighted: Σ g_j ‖f_j(x)‖₂, with the weight by which the model multiplies them.
    """

    count: Tensor
    norm: Tensor
    weighted: Tensor


def watch(step: Step) -> dict[str, Seen]:
    """Run a block once more on the calibration text and look at its mixtures; the probe is not counted."""
    found = {pool.name: _empty(pool) for pool in step.block.pools}
    with _hooks(step, found, batches=len(step.dense) - 1):  # the probe is the last
        step.rerun()
    for seen in found.values():
        step.processes.add_up([seen.count, seen.norm, seen.weighted])
    return found


def entering(step: Step, tokens: int) -> dict[str, list[Entry]]:
    """How the module that holds each mixture is called, by the first batches with so many tokens."""
    found: dict[str, list[Entry]] = {pool.name: [] for pool in step.block.pools}
    handles = []
    for pool in step.block.pools:

        def entered(module: nn.Module, args: tuple, kwargs: dict, own: list[Entry] = found[pool.name]) -> None:
            own.append((args, kwargs))

        handles.append(parts(step.block, pool)[2].register_forward_pre_hook(entered, with_kwargs=True))
    try:
        step.through(first(step, tokens))
    finally:
        for handle in handles:
            handle.remove()
    return found


def first(step: Step, tokens: int) -> list[Tensor]:
    """What enters a block, of so many batches that they hold the wanted tokens; the probe is not among them."""
    inputs = step.inputs[:-1]
    total = itertools.accumulate(batch.shape[:-1].numel() for batch in inputs)
    wanted = next((number for number, have in enumerate(total, start=1) if have >= tokens), len(inputs))
    return inputs[:wanted]


@contextmanager
def _hooks(step: Step, found: dict[str, Seen], batches: int) -> Iterator[None]:
    handles = []
    for pool in step.block.pools:
        calls = iter(range(batches))

        def routed(module: nn.Module, args: tuple, calls: Iterator = calls, seen: Seen = found[pool.name]) -> None:
            if next(calls, None) is not None:
                _count(module, seen, *args[:3])

        handles.append(parts(step.block, pool)[0].register_forward_pre_hook(routed))
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
