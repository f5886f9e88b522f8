"""A token from its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prunus.errors import ModelError


def likeliest(logits: Tensor) -> int:
    """The place of the largest of `logits` [vocabulary], the first of equals.

    By NumPy: PyTorch would wake its own threads for that, and those spin on the processors for a while afterwards,
    beside the engine's that make the next token.

    Raises:
        ModelError: they are not finite.
    """
    values = logits.numpy()
    best = int(values.argmax())  # a NaN comes before all numbers
    if not math.isfinite(values[best]):
        raise ModelError(
            "The model's logits are not finite: its weights are damaged, or so large that float32 overflows. Export it "
            "again from a model that `prunus evaluate` can measure."
        )
    return best


def draw(logits: Tensor, generator: torch.Generator | None) -> int:
    """A place of `logits` [vocabulary], with the probability that they say.

    Raises:
        ModelError: as `likeliest`.
    """
    likeliest(logits)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
