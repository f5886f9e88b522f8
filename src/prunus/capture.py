"""How a model calls each of its blocks, learned without running them.

Every block is bypassed (it returns its input unchanged) and the model's own forward runs. It builds masks, rotary
tables and per-block arguments as always and calls each block once; the arguments are recorded. No argument name and no
family is known here, and no weights of blocks are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from prunus.errors import ModelError
from prunus.sites import Block

Inputs = Mapping[str, Tensor]

# A block and the arguments of a call → a real result of a block of its class.
Forms = Callable[[Block, tuple, dict[str, Any]], Any]


class Hidden:
    """Stands in a recorded call where the hidden states go."""


HIDDEN = Hidden()

SIDE_CHANNEL = (
    "{} is given more from the blocks before it than hidden states (such as shared keys and values); pruning it block "
    "by block would use stale inputs, so this model is refused."
)


@dataclass
class Call:
    """One call of one block: its arguments, the hidden states taken out, and the form of its result.

    Attributes:
        args: positional arguments; `HIDDEN` marks the hidden states.
        kwargs: keyword arguments; likewise.
    """

    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module, hidden: Tensor) -> Tensor:
        """Run the block as the model would; returns its hidden states `[samples, length, d]`."""
        args = [hidden if value is HIDDEN else value for value in self.args]
        kwargs = {name: hidden if value is HIDDEN else value for name, value in self.kwargs.items()}
        result = module(*args, **kwargs)
        return result if isinstance(result, Tensor) else result[0]


@dataclass
class Recording:
    """What one batch shows: tower → the hidden states that enter it (in running order), and block → its call."""

    hidden: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)


class Recorder:
    """Bypasses blocks while the model runs, and records how they are called."""

    def __init__(self, blocks: Sequence[Block], forms: Forms):
        """Prepare to record these blocks.

        Args:
            blocks: blocks of one or more towers.
            forms: gives a real result of a block, which shows whether it returns its hidden states alone or first in
                a tuple.
        """
        self.blocks = blocks
        self.forms = forms
        self.known: list[Tensor] = []
        self.extras: dict[int, str] = {}

    def record(self, run: Callable[[], Any], offset: float = 0.0) -> Recording:
        """Run the model once and return what its blocks were given.

        Args:
            run: calls the model.
            offset: added to every bypassed result; any recorded argument that moves with it carries state besides
                the hidden states.

        Raises:
            ModelError: a block is called twice or changes what is passed on between blocks.
        """
        recording = Recording()
        last: dict[str, Tensor] = {}
        with replaced({block.module: self._bypass(block, recording, last, offset) for block in self.blocks}):
            run()
        return recording

    def _bypass(self, block: Block, recording: Recording, last: dict[str, Tensor], offset: float) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if block.name in recording.calls:
                raise ModelError(f"{block.name} runs more than once in a forward pass; such models are not supported.")
            hidden = _hidden(block, args, kwargs, last.get(block.tower))
            recording.hidden.setdefault(block.tower, hidden)
            recording.calls[block.name] = Call(*self._taken(args, kwargs, hidden))
            last[block.tower] = hidden + offset if offset else hidden
            form = self.forms(block, args, kwargs)
            self.extras.update((id(value), block.name) for value in _extras(form))
            return in_form(form, last[block.tower])

        return forward

    def _taken(self, args: tuple, kwargs: dict, hidden: Tensor) -> tuple[tuple, dict]:
        def take(value: Any) -> Any:
            if value is hidden:
                return HIDDEN
            if id(value) in self.extras:
                raise ModelError(SIDE_CHANNEL.format(f"The block after {self.extras[id(value)]}"))
            if isinstance(value, Tensor):
                return self._stored_once(value)
            if isinstance(value, Cache):
                return None  # it would grow with every run of the block
            if isinstance(value, (tuple, list)):
                return type(value)(take(item) for item in value) if type(value) in (tuple, list) else value
            # Anything else is handed on as it is; blocks that share a growing dictionary then share it in the replay.
            return value

        return tuple(take(value) for value in args), {name: take(value) for name, value in kwargs.items()}

    def _stored_once(self, value: Tensor) -> Tensor:
        """The same tensor, or an equal one seen before: rotary tables and masks repeat over blocks and batches."""
        for known in self.known:
            if known is value or (
                known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value)
            ):
                return known
        self.known.append(value)
        return value


def _hidden(block: Block, args: tuple, kwargs: dict, last: Tensor | None) -> Tensor:
    """The hidden states among the arguments: what the block before returned, or the first floating tensor."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    if last is None:
        return next(value for value in tensors if value.is_floating_point() and value.ndim >= 2)
    if not any(value is last for value in tensors):
        raise ModelError(
            f"This model changes the hidden states before {block.name}, outside of any block; pruning it "
            "block by block would use wrong inputs, so it is refused."
        )
    return last


def refuse_side_channels(first: Recording, moved: Recording, tower: str) -> None:
    """Compare two recordings of the same batch, the second with an offset on every block's result.

    Raises:
        ModelError: an argument of a block in the tower moved with the offset: blocks pass each other more than
            hidden states.
    """
    for name, call in first.calls.items():
        if not name.startswith(f"{tower}."):
            continue
        other = moved.calls.get(name)
        if other is None or not _same((call.args, call.kwargs), (other.args, other.kwargs)):
            raise ModelError(SIDE_CHANNEL.format(name))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return True


def in_form(result: Any, hidden: Tensor) -> Any:
    """The hidden states in the form of a real result; whatever else that held comes along as it was."""
    return hidden if isinstance(result, Tensor) else type(result)([hidden, *result[1:]])


def _extras(result: Any) -> list[Tensor]:
    """The tensors that a real result holds besides the hidden states."""
    return [] if isinstance(result, Tensor) else [value for value in result[1:] if isinstance(value, Tensor)]


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Modules call these functions inside the context."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
