"""A mixture run again on what it saw, with some of its experts closed: what would be lost without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunus.models.experts import expert_loop
from prunus.models.pool import closed, parts
from prunus.sites import Block, Pool

# Bytes up to which the outputs of all experts for all tokens are kept, so that a subset costs only the router.
KEPT = 2**30


class Replay:
    """One loaded mixture and what entered it.

    What an expert gives for a token does not depend on who else is there. So each expert runs once on every token, and
    a subset is then the module's own forward, router and all, with the experts' outputs looked up.

    Attributes:
        pool: the mixture.
        dense: its outputs with all experts, one `[samples, tokens, d]` per batch.
    """

    def __init__(self, block: Block, pool: Pool, inputs: list[Tensor]):
        """Run the mixture as it is.

        Args:
            block: loaded.
            pool: one of its mixtures.
            inputs: what enters it, one `[samples, tokens, d]` per batch.
        """
        self.block, self.pool, self.inputs = block, pool, inputs
        self.experts, _, self.mixture = parts(block, pool)
        size = sum(batch.numel() * batch.element_size() for batch in inputs)
        self._stacks = [self.outputs(batch) for batch in inputs] if size * pool.groups <= KEPT else None
        self.dense = self._run()

    def distance(self, keep: Tensor) -> float:
        """Σ over batches of ‖Z − Z_D‖_F, with bool `[experts]`, True = kept."""
        with closed(self.block, self.pool, keep):
            # float64: subsets may differ by little.
            pairs = zip(self._run(), self.dense, strict=True)
            return sum(float((one.double() - own.double()).norm()) for one, own in pairs)

    def lost(self, keep: Tensor) -> float:
        """‖Z − Z_D‖² / ‖Z‖² over all batches: the share of the mixture's output that changes."""
        with closed(self.block, self.pool, keep):
            pairs = zip(self._run(), self.dense, strict=True)
            gone = sum(float((one.double() - own.double()).square().sum()) for one, own in pairs)
        whole = sum(float(own.double().square().sum()) for own in self.dense)
        return gone / whole if whole else 0.0

    @torch.no_grad()
    def outputs(self, batch: Tensor) -> Tensor:
        """What every expert gives for every token of a batch, before it is weighted: `[experts, tokens, d]`."""
        seen: list[Tensor] = []
        handle = self.experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.mixture(batch)
        finally:
            handle.remove()
        (hidden,) = seen
        one = hidden.new_ones(len(hidden), 1)
        return torch.stack(
            [
                expert_loop(self.experts, hidden, torch.full_like(one, expert, dtype=torch.long), one, _unseen)
                for expert in range(self.pool.groups)
            ]
        )

    @torch.no_grad()
    def _run(self) -> list[Tensor]:
        if self._stacks is None:
            return [_tensor(self.mixture(batch)) for batch in self.inputs]
        found = []
        for batch, stack in zip(self.inputs, self._stacks, strict=True):
            with _answering(self.experts, stack):
                found.append(_tensor(self.mixture(batch)))
        return found


@contextmanager
def _answering(experts: nn.Module, stack: Tensor) -> Iterator[None]:
    """Inside the context the experts' outputs are looked up in `[experts, tokens, d]`."""

    def forward(hidden: Tensor, index: Tensor, weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known = index < len(stack)  # a number beyond the experts stands for none
        row = torch.arange(len(hidden), device=hidden.device)[:, None]
        chosen = stack[index.clamp(max=len(stack) - 1), row]
        return (chosen * (weights * known)[..., None]).sum(1).to(hidden.dtype)

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


def _tensor(result: Tensor | tuple) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _unseen(name: str, inputs: Tensor) -> None:
    """Nothing watches."""
