"""Widths of a block, found from the zeros of a Jacobian: which rows can only go together with which columns.

Every matrix of the block is replaced by fresh random outputs (leaves), so nothing of its weights is needed. A matrix
whose inputs depend on leaves but not on the hidden states is an inner consumer (`o_proj`, `down_proj`), and the
gradient of its input columns tells which rows of which other matrices feed them. Columns that share a row belong
together; the connected components are the groups. No name and no family is known here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from prunus.capture import Call
from prunus.models.experts import is_experts
from prunus.sites import Block, Member, Width


@dataclass
class Seen:
    """What one matrix was given, and the leaf that stands for its outputs."""

    name: str
    inputs: Tensor
    outputs: Tensor


@dataclass
class Probe:
    """A block run once with leaves in place of its matrices.

    Attributes:
        hidden: the leaf of the hidden states.
        result: what the block returned.
        seen: by name of the matrix, in call order; one that is called twice is not in it.
    """

    hidden: Tensor
    result: Tensor
    seen: dict[str, Seen] = field(default_factory=dict)


def find_widths(block: Block, call: Call, hidden: Tensor) -> tuple[list[Width], list[str]]:
    """The widths of a block, and why other inner consumers have none.

    Args:
        block: its parameters may be on the meta device; not changed.
        call: how the model calls it.
        hidden: hidden states `[samples, length, d]` of the length that the call was recorded with; values do not count.

    Returns:
        Widths in the order of their consumers, and a sentence for each consumer whose channels cannot be grouped.
    """
    probe = _run(block, call, hidden)
    found, refusals = [], []
    for name, seen in probe.seen.items():
        producers = _producers(probe, seen)
        if producers is None:
            continue
        exposed = [other for other in producers if _exposed(probe, other, name)]
        if exposed:
            refusals.append(f"{name}: its channels also leave {exposed[0]} by another way")
            continue
        width = _width(block, seen, [probe.seen[other] for other in producers])
        if width.groups == len(width.columns[0].groups) or width.groups > 1:
            found.append(width)
        else:
            refusals.append(f"{name}: all its channels hang together (one head of keys and values, or a norm over all)")
    return found, refusals


def relocated(widths: list[Width], model: Block, target: Block) -> list[Width]:
    """The same widths in another block of the same make."""

    def there(name: str) -> str:
        return target.name + name.removeprefix(model.name)

    def member(one: Member) -> Member:
        return Member(there(one.matrix), one.groups)

    return [
        Width(
            there(width.name), target.name, width.kind, width.groups,
            tuple(map(member, width.rows)), tuple(map(member, width.columns)), width.weights,
        )
        for width in widths
    ]  # fmt: skip


def make(block: Block) -> tuple:
    """What decides the widths of a block: its class and the shapes of its matrices."""
    shapes = tuple((slot.info.name.removeprefix(block.name), slot.info.shape) for slot in block.slots)
    return type(block.module), shapes


def _run(block: Block, call: Call, hidden: Tensor) -> Probe:
    """Run a copy of the block with leaves in place of its matrices."""
    generator = torch.Generator().manual_seed(0)
    module = copy.deepcopy(block.module)
    slots = {slot.info.name.removeprefix(f"{block.name}."): slot for slot in block.slots if slot.expert is None}
    stream = torch.randn(hidden.shape, generator=generator).to(hidden.dtype).requires_grad_()
    probe = Probe(stream, stream)
    twice: set[str] = set()
    for path, child in module.named_modules():
        if is_experts(child):
            child.forward = _opaque(generator)  # a mixture's neurons are its experts' own
        elif path in slots:
            child.forward = _leaf(slots[path].info.name, slots[path].info.shape[0], probe, twice, generator)
    for path, child in module.named_modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and path not in slots and not is_experts(child):
                value = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
                child._parameters[name] = nn.Parameter(value.to(hidden.dtype), requires_grad=False)
    with torch.enable_grad():
        probe.result = call(module, stream)
    for name in twice:
        del probe.seen[name]
    return probe


def _leaf(name: str, size: int, probe: Probe, twice: set[str], generator: torch.Generator) -> Callable:
    def forward(inputs: Tensor) -> Tensor:
        outputs = torch.randn((*inputs.shape[:-1], size), generator=generator).to(inputs.dtype).requires_grad_()
        if name in probe.seen:
            twice.add(name)
        probe.seen[name] = Seen(name, inputs, outputs)
        return outputs.clone()  # some blocks add to it in place

    return forward


def _opaque(generator: torch.Generator) -> Callable:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.randn(hidden.shape, generator=generator).to(hidden.dtype)

    return forward


def _gradients(value: Tensor, weight: Tensor | None, leaves: list[Tensor]) -> list[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(leaves)
    weight = torch.ones_like(value) if weight is None else weight
    return list(torch.autograd.grad(value, leaves, weight, retain_graph=True, allow_unused=True))


def _producers(probe: Probe, seen: Seen) -> list[str] | None:
    """The matrices whose rows feed an inner consumer; None if its inputs depend on the hidden states or on nothing."""
    others = [other for other in probe.seen.values() if other.name != seen.name]
    from_stream, *from_leaves = _gradients(seen.inputs, None, [probe.hidden, *(other.outputs for other in others)])
    names = [other.name for other, gradient in zip(others, from_leaves, strict=True) if gradient is not None]
    return names if names and from_stream is None else None


def _exposed(probe: Probe, producer: str, consumer: str) -> bool:
    """Whether a producer's outputs reach anything but this consumer."""
    leaf = probe.seen[producer].outputs
    others = [seen.inputs for name, seen in probe.seen.items() if name not in (consumer, producer)]
    return any(_gradients(value, None, [leaf])[0] is not None for value in (probe.result, *others))


def _width(block: Block, seen: Seen, producers: list[Seen]) -> Width:
    leaves = [producer.outputs for producer in producers]
    reach = _one_to_one(seen.inputs, leaves)
    columns, rows = _components(seen.inputs.shape[-1], _one_by_one(seen.inputs, leaves)) if reach is None else reach
    groups = int(columns.max()) + 1
    consumer = Member(seen.name, columns)
    members = tuple(Member(producer.name, groups_of) for producer, groups_of in zip(producers, rows, strict=True))
    weights = torch.bincount(columns, minlength=groups) * block.slot(seen.name).info.shape[0]
    for member in members:
        weights += (
            torch.bincount(member.groups[member.groups >= 0], minlength=groups)
            * (block.slot(member.matrix).info.shape[1])
        )
    parent = seen.name.rpartition(".")[0]
    name = seen.name if parent == block.name else parent
    return Width(name, block.name, _kind(seen.inputs, leaves), groups, members, (consumer,), weights)


def _kind(inputs: Tensor, leaves: list[Tensor]) -> Any:
    """Neurons stay with their token; attention reads other tokens."""
    weight = torch.zeros_like(inputs)
    weight.flatten(0, -2)[-1] = 1.0
    for gradient in _gradients(inputs, weight, leaves):
        if gradient is not None and bool(gradient.flatten(0, -2)[:-1].any()):
            return "heads"
    return "neurons"


def _one_to_one(inputs: Tensor, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]] | None:
    """Column and row groups where every row reaches one column: 2·log₂ gradients instead of one for each column."""
    size = inputs.shape[-1]
    number = torch.arange(size)
    codes = [torch.zeros(leaf.shape[-1], dtype=torch.int64) for leaf in leaves]
    for bit in range(max(1, math.ceil(math.log2(size)))):
        marks = [_reached(inputs, ((number >> bit) & 1) == value, leaves) for value in (0, 1)]
        for code, off, on in zip(codes, *marks, strict=True):
            if not bool((off ^ on).all()):
                return None
            code += on.long() << bit
    if any(bool((code >= size).any()) for code in codes):
        return None
    return number, codes


def _reached(inputs: Tensor, columns: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of each leaf, which channels have a say in these columns: bool `[rows]`."""
    weight = columns.to(inputs.dtype).expand_as(inputs).contiguous()
    return [
        torch.zeros(leaf.shape[-1], dtype=torch.bool) if gradient is None else gradient.flatten(0, -2).ne(0).any(0)
        for leaf, gradient in zip(leaves, _gradients(inputs, weight, leaves), strict=True)
    ]


def _one_by_one(inputs: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Of each leaf, which columns its channels reach: bool `[columns, rows]`."""
    number = torch.arange(inputs.shape[-1])
    found = [_reached(inputs, number == column, leaves) for column in number]
    return [torch.stack(rows) for rows in zip(*found, strict=True)]


def _components(columns: int, reach: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Groups of columns that share a row, numbered in their order, and the group of every row (-1: it reaches none)."""
    together = torch.cat(reach, dim=1).float()
    linked = (together @ together.T > 0) | torch.eye(columns, dtype=torch.bool)
    label = torch.arange(columns)
    while True:
        lowest = torch.where(linked, label, columns).amin(1)
        if torch.equal(lowest, label):
            break
        label = lowest
    label = label.unique(return_inverse=True)[1]
    rows = [torch.where(one.any(0), label[one.int().argmax(0)], -1) for one in reach]
    return label, rows
