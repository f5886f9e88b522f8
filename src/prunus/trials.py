"""Trials on the whole dense model in memory: change one matrix, look at the loss, put it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from prunus.loss import model_loss
from prunus.sites import Matrix
from prunus.statistics import Source
from prunus.stream import Batch, Stream


class Losses(Protocol):
    """The losses of batches with the weights as they are now."""

    def __call__(self, batches: int | None = None) -> Tensor:
        """Float64 `[batches]`, of all or the first so many."""
        ...


Whole = tuple[dict[str, list[Matrix]], Losses]
"""Block name -> its matrices, in memory and to be changed in place; and the losses that follow."""
Trial = Callable[[list[Matrix], Losses], Tensor]
"""`trial(matrices of one block, losses) -> value`; it leaves every weight as it found it."""


class WholeModel:
    """Not a running sum: the right to make trials on the whole model in memory, which costs that memory."""

    source: ClassVar[Source] = "trials"
    copies: ClassVar[int] = 1


class WholeModelTwice:
    """The same, with a second copy of the weights, so that masks can change."""

    source: ClassVar[Source] = "trials"
    copies: ClassVar[int] = 2


@contextmanager
def resident(stream: Stream, chosen: list[Batch]) -> Iterator[Losses]:
    """Inside the context the dense model is in memory as a whole.

    Args:
        stream: its model is loaded, and dropped afterwards.
        chosen: what the losses are of; the probe's is not among them.

    Yields:
        The function that measures the loss of each batch.
    """
    weights = stream.weights
    weights.load(weights.known(weights.targets))
    stream.model.tie_weights()

    @torch.no_grad()
    def losses(batches: int | None = None) -> Tensor:
        found = []
        for batch in chosen[:batches]:
            inputs = {name: value.to(stream.device) for name, value in batch.inputs.items()}
            found.append(float(model_loss(stream.model, inputs)))
        return torch.tensor(found, dtype=torch.float64)

    try:
        yield losses
    finally:
        weights.drop(stream.model)
