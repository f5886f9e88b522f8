"""The parts of a block: stretches between two points of its residual stream, found by running it once.

A block adds what its branches compute to the hidden states that pass through it: `h + attention(norm(h))`, then
`u + mlp(norm(u))`. Every addition is a seam, and what runs between two seams is a part. Seams are found by watching the
block's own additions; no name of a module and no family is known here. A part is run by calling the block with the
modules of its other parts answering zero, so that norms, scales and masks are always the model's own code. That this
gives the block's own output is checked; a block where it does not is one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunus.capture import Call, in_form, replaced
from prunus.sites import Block, Slot

# The names under which torch announces an addition of two tensors.
_ADDITIONS = frozenset({"add", "__add__", "__radd__", "add_", "__iadd__"})

# Largest difference between a block and its parts run one after the other, over the largest output.
_SAME = 1e-4


@dataclass(frozen=True)
class Part:
    """A stretch of a block between two points of the residual stream.

    Attributes:
        name: of its largest module, such as `self_attn`; "" for a whole block.
        slots: its prunable matrices.
        modules: path below the block -> outermost module that runs in it; "" -> the block itself if it is whole.
        silent: outermost modules of the other parts -> a result of each, which shows its form.
    """

    name: str
    slots: tuple[Slot, ...]
    modules: dict[str, nn.Module]
    silent: dict[nn.Module, Any]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the context, running the block runs this part and hands the hidden states past the others."""
        with replaced({module: _zero(form) for module, form in self.silent.items()}):
            yield


@dataclass(frozen=True)
class Seen:
    """An outermost module that ran, the number of additions before it, and its result (for its form)."""

    module: nn.Module
    seam: int
    shape: torch.Size
    result: Any


def whole_block(block: Block) -> Part:
    """The block as one part."""
    return Part("", tuple(block.slots), {"": block.module}, {})


@torch.no_grad()
def find_parts(block: Block, call: Call, hidden: Tensor) -> list[Part]:
    """The parts of a loaded block in running order; one part if it has no seam inside.

    Args:
        block: its weights may be anything finite.
        call: how the model calls it.
        hidden: a few tokens in front of it `[samples, length, d]`.
    """
    whole = [whole_block(block)]
    seams = _Seams(hidden)
    with _outermost(block.module, seams):
        outputs = call(block.module, hidden)
    if not seams.ended_by(outputs):
        return whole
    parts = _parts(block, seams.seen)
    covered = {id(slot) for part in parts for slot in part.slots}
    if len(parts) < 2 or covered != {id(slot) for slot in block.slots}:
        return whole
    return parts if _adds_up(parts, block, call, hidden, outputs) else whole


class _Seams(TorchFunctionMode):
    """Follows the hidden states through a block and notes which modules run between its additions."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.stream = [hidden]  # all are kept, so that no address is given out twice
        self.seen: list[Seen] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        adding = getattr(func, "__name__", "") in _ADDITIONS
        tensors = [value for value in args if isinstance(value, Tensor)] if adding else []
        full = len(tensors) == 2 and all(value.numel() == self.stream[-1].numel() for value in tensors)
        on_stream = full and any(self.ended_by(value) for value in tensors)
        result = func(*args, **(kwargs or {}))
        if on_stream:
            self.stream.append(result)
        return result

    def ended_by(self, value: Tensor) -> bool:
        """Whether a tensor is the hidden states where the last addition left them, seen in any shape."""
        return value.numel() == self.stream[-1].numel() and value.data_ptr() == self.stream[-1].data_ptr()


@contextmanager
def _outermost(block: nn.Module, seams: _Seams) -> Iterator[None]:
    """Inside the context, the block's forward shows `seams` its additions and the outermost modules that it calls."""
    depth = 0

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        nonlocal depth
        depth -= 1
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if depth == 0 and tensors:
            seams.seen.append(Seen(module, len(seams.stream) - 1, tensors[0].shape, result))

    with ExitStack() as stack:
        for module in list(block.modules())[1:]:
            for handle in (
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, with_kwargs=True),
            ):
                stack.callback(handle.remove)
        stack.enter_context(seams)
        yield


def _parts(block: Block, seen: list[Seen]) -> list[Part]:
    """One part for each seam before which a module with prunable matrices ran."""
    paths = {id(module): path for path, module in block.module.named_modules()}
    groups: dict[int, list[Seen]] = {}
    for one in seen:
        groups.setdefault(one.seam, []).append(one)
    found = []
    for seam, members in groups.items():
        own = {id(module) for one in members for module in one.module.modules()}
        slots = tuple(slot for slot in block.slots if id(slot.module) in own)
        # Only what gives a vector for each vector that it is given can answer zero without knowing more about it.
        others = {
            one.module: one.result
            for one in seen
            if one.seam != seam and _first(one.result).shape[:-1] == one.shape[:-1]
        }
        modules = {paths[id(one.module)]: one.module for one in members}
        found.append(Part(_largest(modules), slots, modules, others))
    return found


def _largest(modules: dict[str, nn.Module]) -> str:
    return max(modules, key=lambda path: sum(value.numel() for value in modules[path].parameters()))


def _adds_up(parts: list[Part], block: Block, call: Call, hidden: Tensor, outputs: Tensor) -> bool:
    """Whether the parts one after the other compute what the block computes."""
    for part in parts:
        with part.alone():
            hidden = call(block.module, hidden)
    if hidden.shape != outputs.shape:
        return False
    return bool((hidden - outputs).abs().max() <= _SAME * outputs.abs().max())


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _zero(form: Any) -> Callable:
    """A forward that answers a zero vector for each vector that it is given."""
    width = _first(form).shape[-1]

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        # One zero in every place: no memory, and nothing to differentiate.
        return in_form(form, given.new_zeros(()).expand(*given.shape[:-1], width))

    return forward
