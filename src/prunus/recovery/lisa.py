"""LISA: only a few blocks are trained at a time, others after every so many steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn
from transformers import TrainerCallback

from prunus.errors import RecipeError
from prunus.recovery.parameters import Embeddings, Norms, Output, inside, train_in_place
from prunus.recovery.student import Student

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True)
class Lisa:
    """Full training of `blocks` random blocks, exchanged every `every` steps (Pan et al. 2024, arXiv:2403.17919).

    Embeddings, head and last norm are trained all the time, unless told otherwise. A block that is left loses its
    optimizer state, as in the paper's own experiments, so that memory is bounded by what is active; the published code
    keeps it, and ends up with states of all blocks. The schedule follows from the seed and the step alone.

    Attributes:
        blocks: trained at a time.
        every: optimizer steps between exchanges.
        embeddings: train embeddings and head all the time; they are most of what LISA trains in small models.
        state: "drop" the optimizer state of blocks that are left, "keep" it, or keep it on the CPU ("offload").
    """

    blocks: int = 2
    every: int = 20
    embeddings: bool = True
    state: Literal["drop", "keep", "offload"] = "drop"

    name: ClassVar[str] = "lisa"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: fewer than one block or step.
        """
        if self.blocks < 1 or self.every < 1:
            raise RecipeError(f"LISA trains at least 1 block for at least 1 step, not {self.blocks} for {self.every}.")

    def attach(self, student: Student) -> None:
        """Everything that may ever be trained; which of it is, the callback decides.

        The optimizer must know every parameter from the beginning: one that is frozen then never changes later.
        """
        if self.blocks > len(student.blocks):
            raise RecipeError(f"The model has {len(student.blocks)} blocks, fewer than blocks={self.blocks}.")
        train_in_place(student, [slot for block in student.blocks for slot in block.slots])
        for _, members in inside(student):
            for _, value in members:
                student.train(value)
        Norms().attach(student)
        if self.embeddings:
            Embeddings().attach(student)
            Output().attach(student)

    def resting(self, student: Student) -> int:
        """Bytes of gradients and moments that what rests does without, at the least: the largest blocks are active."""
        sizes = sorted(sum(value.numel() for _, value in members) for _, members in inside(student))
        idle = sum(sizes[: len(sizes) - self.blocks])
        return idle * 4 * (3 if self.state == "drop" else 1)

    @contextmanager
    def begun(self, student: Student) -> Iterator[None]:
        """Inside the context only what the first interval trains has gradients."""
        wanted = drawn(len(student.blocks), self.blocks, student.seed, 0)
        rest = [
            value
            for index, (_, members) in enumerate(inside(student))
            for _, value in members
            if index not in wanted and value.requires_grad
        ]
        for value in rest:
            value.requires_grad_(False)
        try:
            yield
        finally:
            for value in rest:
                value.requires_grad_(True)

    def callbacks(self, student: Student) -> list[TrainerCallback]:
        """The rotation."""
        return [Rotation(self, student)]

    def merge(self, student: Student) -> None:
        """Nothing: the weights themselves were trained."""


class Rotation(TrainerCallback):
    """Freezes and thaws blocks between steps."""

    def __init__(self, part: Lisa, student: Student):
        """Nothing happens before training begins: the optimizer is built with everything trainable."""
        self.part, self.student = part, student
        self.active: list[int] = []
        self.members = [[value for _, value in members] for _, members in inside(student)]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The blocks of the interval that the (possibly resumed) step lies in."""
        self._rotate(state.global_step // self.part.every, kwargs["optimizer"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Others after every so many optimizer steps; micro-batches do not count."""
        if state.global_step % self.part.every == 0:
            self._rotate(state.global_step // self.part.every, kwargs["optimizer"])

    def _rotate(self, interval: int, optimizer: Optimizer) -> None:
        wanted = drawn(len(self.members), self.part.blocks, self.student.seed, interval)
        states = getattr(optimizer, "optimizer", optimizer).state
        for index, members in enumerate(self.members):
            for value in members:
                value.requires_grad_(index in wanted)
                if index not in wanted:
                    value.grad = None
                    self._rest(value, states)
                elif self.part.state == "offload":
                    _move(value, states, str(value.device))
        self.active = wanted

    def _rest(self, value: nn.Parameter, states: Any) -> None:
        if self.part.state == "drop":
            states.pop(value, None)
        elif self.part.state == "offload":
            _move(value, states, "cpu")


def _move(value: nn.Parameter, states: Any, device: str) -> None:
    for name, tensor in states.get(value, {}).items():
        states[value][name] = tensor.to(device) if getattr(tensor, "ndim", 0) else tensor


def drawn(count: int, chosen: int, seed: int, interval: int) -> list[int]:
    """The blocks of an interval, uniformly and without repetition; the same on every process and after a resume."""
    return sorted(random.Random(f"{seed} {interval}").sample(range(count), chosen))
