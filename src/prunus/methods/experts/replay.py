"""A mixture run again on what it saw, with some of its experts closed: what would be lost without them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from prunus.errors import ModelError
from prunus.methods.experts.seen import Entry
from prunus.models.experts import expert_loop
from prunus.models.pool import closed, parts
from prunus.sites import Block, Pool

# Bytes up to which the outputs of all experts for all tokens are kept, so that a subset costs only the router.
KEPT = 2**30


class Replay:
    """One loaded mixture and how it was called.

    What an expert gives for a token does not depend on who else is there. So each expert runs once on every token, and
    a subset is then the module's own forward, router and all, with the experts' outputs looked up.

    Attributes:
        pool: the mixture.
        dense: its outputs with all experts, one per call.
        hidden: what entered its experts, one `[tokens, d]` per call.
    """

    def __init__(self, block: Block, pool: Pool, calls: Sequence[Entry]):
        """Run the mixture as it is.

        Args:
            block: loaded.
            pool: one of its mixtures.
            calls: how the module that holds it was called, once per batch.
        """
        self.block, self.pool, self.calls = block, pool, calls
        self.experts, _, self.mixture = parts(block, pool)
        self._stacks: list[Tensor] | None = None
        self.hidden: list[Tensor] = []
        handle = self.experts.register_forward_pre_hook(lambda module, args: self.hidden.append(args[0]))
        self.dense = self._run()
        handle.remove()
        size = sum(one.numel() * one.element_size() for one in self.hidden) * pool.groups
        if len(self.hidden) == len(calls) and size <= KEPT:
            self._stacks = [self.outputs(one) for one in self.hidden]
            self.dense = self._run()

    def distance(self, keep: Tensor) -> float:
        """Σ over calls of ‖Z − Z_D‖_F, with bool `[experts]`, True = kept.

        Raises:
            ModelError: the outputs overflow the dtype.
        """
        return self._finite(sum(float(change.norm()) for change in self._changes(keep)))

    def lost(self, keep: Tensor) -> float:
        """‖Z − Z_D‖² / ‖Z‖² over all calls: the share of the mixture's output that changes.

        Raises:
            ModelError: the outputs overflow the dtype.
        """
        whole = self._finite(sum(float(own.double().square().sum()) for own in self.dense))
        gone = self._finite(sum(float(change.square().sum()) for change in self._changes(keep)))
        return gone / whole if whole else 0.0

    def _changes(self, keep: Tensor) -> Iterator[Tensor]:
        with closed(self.block, self.pool, keep):
            # float64: subsets may differ by little.
            pairs = zip(self._run(), self.dense, strict=True)
            yield from (one.double() - own.double() for one, own in pairs)

    def _finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise ModelError(
                f"The outputs of {self.pool.name} are not finite in {self.dense[0].dtype}. "
                "Use --dtype float32 or bfloat16."
            )
        return value

    @torch.no_grad()
    def outputs(self, hidden: Tensor) -> Tensor:
        """What every expert gives for every token of `[tokens, d]`, before it is weighted: `[experts, tokens, d]`."""
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
            return [_tensor(self.mixture(*args, **kwargs)) for args, kwargs in self.calls]
        found = []
        for (args, kwargs), stack in zip(self.calls, self._stacks, strict=True):
            with _answering(self.experts, stack):
                found.append(_tensor(self.mixture(*args, **kwargs)))
        return found


@contextmanager
def _answering(experts: nn.Module, stack: Tensor) -> Iterator[None]:
    """Inside the context the experts' outputs are looked up in `[experts, tokens, d]`."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        known = top_k_index < len(stack)  # a number beyond the experts stands for none
        row = torch.arange(len(hidden_states), device=hidden_states.device)[:, None]
        chosen = stack[top_k_index.clamp(max=len(stack) - 1), row]
        return (chosen * (top_k_weights * known)[..., None]).sum(1).to(hidden_states.dtype)

    experts.forward = forward
    try:
        yield
    finally:
        del experts.forward


def _tensor(result: Tensor | tuple) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _unseen(name: str, inputs: Tensor) -> None:
    """Nothing watches."""
