"""Linear maps whose weight is a function of a frozen sparse weight and a few trained numbers, without keeping it.

    y = x · E(W, P, θ)ᵀ + b        E is computed for the forward pass, dropped, and computed again for the backward pass

Ordinary automatic differentiation would keep E and its parts for every matrix of the model until the backward pass. So
the gradient is written out: with G = ∂L/∂E = δᵀ·x, `form.gradients(G, ...)` gives those of θ. More memory than a plain
adapter is needed only for the matrix at hand: one buffer of its size at a time.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunus.sites import Slot


class Form(Protocol):
    """How the effective weight follows from the frozen one."""

    def weight(self, weight: Tensor, bits: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
        """E `[out, in]`, float32, a new tensor; +0.0 wherever the mask is False.

        Args:
            weight: W `[out, in]`, not changed.
            bits: P, packed as in `masks.pack`.
            parameters: θ, float32.
        """
        ...

    def gradients(
        self, gradient: Tensor, weight: Tensor, bits: Tensor, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """∂L/∂θ, each in the shape of its parameter; `gradient` is ∂L/∂E `[out, in]`, float32, and may be changed."""
        ...


class _Apply(torch.autograd.Function):
    """y = x·Eᵀ + b, with E computed twice instead of kept."""

    @staticmethod
    def forward(
        ctx: Any, form: Form, weight: Tensor, bits: Tensor, x: Tensor, bias: Tensor | None, *parameters: Tensor
    ) -> Tensor:
        ctx.form, ctx.weight, ctx.bits = form, weight, bits
        ctx.save_for_backward(x, *parameters)
        ctx.bias = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            effective = form.weight(weight, bits, parameters).to(weight.dtype)
            return nn.functional.linear(x.to(weight.dtype), effective, None if bias is None else bias.to(weight.dtype))

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        parameters, delta, weight = tuple(rest), deltas[0], ctx.weight
        with torch.autocast(x.device.type, enabled=False):
            effective = ctx.form.weight(weight, ctx.bits, parameters).to(weight.dtype)
            back = (delta @ effective).to(x.dtype) if ctx.needs_input_grad[3] else None
            del effective
            flat = delta.flatten(0, -2)
            # In the dtype of the parameters, float32: thousands of tokens are added up.
            kind = parameters[0].dtype
            gradient = flat.to(kind).T @ x.flatten(0, -2).to(kind)
            found = ctx.form.gradients(gradient, weight, ctx.bits, parameters)
            bias = flat.to(kind).sum(0).to(ctx.bias) if ctx.needs_input_grad[4] else None
        return None, None, None, back, bias, *found


class Effective(nn.Module):
    """Stands where a linear module stood; the frozen module stays inside as `base_layer`."""

    def __init__(self, slot: Slot, bits: Tensor, form: Form, parameters: dict[str, Tensor]):
        """Take over a module.

        Args:
            slot: where its matrix lies.
            bits: its packed mask.
            form: how the effective weight follows.
            parameters: name → initial value, in the order that the form takes them.
        """
        super().__init__()
        self.slot, self.form = slot, form
        self.base_layer = slot.module
        self.bits: Tensor
        self.register_buffer("bits", bits, persistent=False)
        self.names = list(parameters)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    @property
    def values(self) -> tuple[Tensor, ...]:
        """The trained parameters, in the order that the form takes them."""
        return tuple(getattr(self, name) for name in self.names)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the effective weight, x·Eᵀ + b."""
        weight = self.slot.matrix().weight
        bias = getattr(self.base_layer, "bias", None)
        return _Apply.apply(self.form, weight, self.bits, x, bias, *self.values)  # type: ignore[no-any-return]

    @torch.no_grad()
    def merge(self) -> None:
        """Write E into the frozen weight, computed in float32 and rounded once."""
        weight = self.slot.matrix().weight
        weight.copy_(self.form.weight(weight, self.bits, self.values))
