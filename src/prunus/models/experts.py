"""Fused experts seen one matrix at a time.

transformers 5 stacks the experts of a block in parameters `[experts, …]` and multiplies them in one call. The classes
that do so carry flags of their layout (`is_transposed`, `has_gate`, `has_bias`), set by its decorator
`use_experts_implementation`. `observing` replaces the call of one module by the plain loop over experts, which shows
every matrix the tokens routed to it; nothing is unfused, so nothing has to be fused back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunus.sites import SiteInfo, Slot

# Called with the name of a matrix inside the experts module ("3.down_proj") and its inputs [tokens, in].
Observer = Callable[[str, Tensor], None]


def is_experts(module: nn.Module) -> bool:
    """True if the module stacks experts in a layout that transformers' decorator describes."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate") and isinstance(down, Tensor)


def stacks(module: Any, path: str, block: str) -> Iterator[Slot]:
    """One slot per expert and matrix, such as `path.3.gate_up_proj` and `path.3.down_proj`."""
    for attribute in (_first(module), "down_proj"):
        stack = getattr(module, attribute)
        rows, columns = tuple(stack.shape[1:])[:: -1 if module.is_transposed else 1]
        for expert in range(len(stack)):
            info = SiteInfo(f"{path}.{expert}.{attribute}", block, (rows, columns))
            yield Slot(info, f"{path}.{attribute}", module, attribute, expert, module.is_transposed)


@contextmanager
def observing(module: nn.Module, observe: Observer) -> Iterator[None]:
    """Inside the context the module computes expert by expert and shows each matrix its inputs."""

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return expert_loop(module, hidden_states, top_k_index, top_k_weights, observe)

    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def expert_loop(module: Any, hidden: Tensor, index: Tensor, weights: Tensor, observe: Observer) -> Tensor:
    """The mixture as the plain loop over experts.

    Args:
        module: experts in transformers' layout.
        hidden: `[tokens, d]`.
        index: int `[tokens, k]`, experts chosen for each token.
        weights: `[tokens, k]`, their gate values.
        observe: sees the inputs of every matrix that got a token.

    Returns:
        `[tokens, d]` in the dtype of `hidden`; equal to transformers' grouped product up to the order of summation.
    """
    first = _first(module)
    result = torch.zeros_like(hidden)
    for expert in range(module.down_proj.shape[0]):
        tokens, slot = torch.where(index == expert)
        if not len(tokens):
            continue
        inputs = hidden[tokens]
        observe(f"{expert}.{first}", inputs)
        inner = _linear(module, first, expert, inputs)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        observe(f"{expert}.down_proj", inner)
        outputs = _linear(module, "down_proj", expert, inner)
        if getattr(module, "has_post_expert_norm", False):
            outputs = module.post_expert_norm(outputs)
        result.index_add_(0, tokens, (outputs * weights[tokens, slot, None]).to(result.dtype))
    return result


def _first(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _linear(module: Any, attribute: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(module, attribute)[expert]
    bias = getattr(module, f"{attribute}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(inputs, weight.T if module.is_transposed else weight, bias)
