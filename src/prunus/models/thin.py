"""Two thin linear layers in place of one: how they are built, found and judged."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunus.capture import Call
from prunus.edits import Split
from prunus.errors import ModelError, RecipeError
from prunus.models.width import make
from prunus.models.widths_of import NARROWED, copied, difference
from prunus.sites import Block, SiteInfo, Slot
from prunus.stream import Batch, Stream

# Names of the two layers inside the module that replaces a matrix: x -> A·x -> B·(A·x) + bias.
INNER, OUTER = "inner", "outer"
Shape = tuple[int, ...]


def thin(dense: nn.Module, rank: int) -> nn.Sequential:
    """A·, then B·: layers of a dense one's sizes, dtype and bias; their weights are on the meta device."""
    weight = dense.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape[::-1] if isinstance(dense, Conv1D) else weight.shape
    inner = nn.Linear(columns, rank, bias=False, device="meta", dtype=weight.dtype)
    outer = nn.Linear(rank, rows, bias=False, device="meta", dtype=weight.dtype)
    bias = dense.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    outer.register_parameter("bias", bias)
    return nn.Sequential(OrderedDict([(INNER, inner), (OUTER, outer)])).requires_grad_(False)


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Let `module` stand at a dotted path below `root`."""
    parent, _, last = path.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def insert(block: Block, name: str, rank: int) -> nn.Sequential:
    """Put two empty layers in the place of a matrix; the slots of the block follow."""
    slot = block.slot(name)
    rows, columns = slot.info.shape
    pair = thin(slot.module, rank)
    put(block.module, name.removeprefix(f"{block.name}."), pair)
    place = block.slots.index(slot)
    block.slots[place : place + 1] = [
        Slot(SiteInfo(where, block.name, shape), f"{where}.weight", pair.get_submodule(part), "weight", None, False)
        for part, shape in ((INNER, (rank, columns)), (OUTER, (rows, rank)))
        for where in (f"{name}.{part}",)
    ]
    return pair


def split(block: Block, edit: Split) -> None:
    """Put the two factors of an edit, already rounded to the dtype on disk, in the place of their matrix."""
    weight = block.slot(edit.name).matrix().weight
    fill(insert(block, edit.name, edit.rank), edit.inner.to(weight), edit.outer.to(weight))


def fill(pair: nn.Sequential, inner: Tensor, outer: Tensor) -> None:
    """Give two layers their weights."""
    for part, value in ((INNER, inner), (OUTER, outer)):
        pair.get_submodule(part).weight = nn.Parameter(value, requires_grad=False)


def paired(shapes: Mapping[str, Shape], model: nn.Module) -> dict[str, int]:
    """Module -> rank, of those whose two factors lie in a checkpoint.

    Args:
        shapes: name of a tensor -> its shape.
        model: of the class without factors. Where it has no matrix, tensors of these names are something else.
    """
    ends, whole = f".{INNER}.weight", model.state_dict()
    found = {name.removesuffix(ends): shape[0] for name, shape in shapes.items() if name.endswith(ends)}
    found = {name: rank for name, rank in found.items() if f"{name}.weight" in whole}
    return {name: rank for name, rank in found.items() if shapes.get(f"{name}.{OUTER}.weight", ())[1:] == (rank,)}


def multiplied(shapes: Mapping[str, Shape], ranks: Iterable[str], model: nn.Module) -> dict[str, Shape]:
    """Shapes as if the factors of these matrices were multiplied: names of the model's own class."""
    found = dict(shapes)
    for path in ranks:
        shape = (found.pop(f"{path}.{OUTER}.weight")[0], found.pop(f"{path}.{INNER}.weight")[1])
        found[f"{path}.weight"] = shape[::-1] if isinstance(model.get_submodule(path), Conv1D) else shape
        if f"{path}.{OUTER}.bias" in found:
            found[f"{path}.bias"] = found.pop(f"{path}.{OUTER}.bias")
    return found


def refuse_split(blocks: Iterable[Block]) -> None:
    """See that no matrix of the model is a factor already.

    Raises:
        RecipeError: one is.
    """
    names = {slot.info.name for block in blocks for slot in block.slots}
    ends = f".{INNER}"
    found = sorted(name for name in names if name.endswith(ends) and f"{name.removesuffix(ends)}.{OUTER}" in names)
    if found:
        raise RecipeError(
            f"{found[0].removesuffix(ends)} is a product of two matrices already, and a method that changes shapes "
            "begins with whole ones. Start from the dense model, or multiply the factors back: prunus export MODEL NEW "
            "--portable."
        )


@torch.no_grad()
def attach_thin(stream: Stream, probe: Batch) -> list[str]:
    """Give every block the names of its matrices that can be split: those whose block then still computes the same.

    Args:
        stream: its blocks are changed.
        probe: a few tokens, with which blocks are called.

    Returns:
        What cannot be split, a sentence for each kind.

    Raises:
        ModelError: nothing can be.
    """
    stream.calls([probe])
    known: dict[tuple, tuple[str, set[str]]] = {}
    reasons: list[str] = []
    for block in stream.blocks:
        if block.name not in probe.calls:
            continue
        key = make(block)
        if key not in known:
            found, more = _judged(stream, block, probe)
            known[key] = (block.name, found)
            reasons += more
        model, names = known[key]
        block.thin = frozenset(block.name + name.removeprefix(model) for name in names)
    if not any(block.thin for block in stream.blocks):
        why = "; ".join(reasons) or "its blocks hold none"
        raise ModelError(f"No matrix of {type(stream.model).__name__} can become two: {why}.")
    return reasons


def _judged(stream: Stream, block: Block, probe: Batch) -> tuple[set[str], list[str]]:
    """Names of the matrices of a block that can be split, and why the others cannot."""
    assert probe.hidden is not None
    stream.weights.load(stream.weights.sources(block.name))
    inputs = torch.randn(probe.hidden.shape, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(stream.device, probe.hidden.dtype)
    call = probe.calls[block.name]
    whole = call(block.module, inputs)
    found, reasons = set(), []
    if any(slot.expert is not None for slot in block.slots):
        reasons.append(f"{block.name}: experts lie in one tensor for all, which stays as it is")
    for slot in block.slots:
        if slot.expert is not None:
            continue
        reason = "its tensor is made of others while it is loaded"
        if f"{slot.info.name}.weight" == slot.parameter and not stream.weights.is_converted(slot.parameter):
            reason = _differs(block, slot, call, inputs, whole)
        if reason:
            reasons.append(f"{slot.info.name} stays whole: {reason}")
        else:
            found.add(slot.info.name)
    stream.weights.drop(block.module)
    return found, reasons


def _differs(block: Block, slot: Slot, call: Call, inputs: Tensor, whole: Tensor) -> str:
    """Split a matrix of a copy into itself and the identity; empty if that computes the same, else what is wrong."""
    twin = copied(block)
    weight = twin.slot(slot.info.name).matrix().weight
    pair = thin(twin.slot(slot.info.name).module, slot.info.shape[1])
    fill(pair, torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight.clone())
    try:
        put(twin.module, slot.info.name.removeprefix(f"{block.name}."), pair)
        found = difference(call(twin.module, inputs), whole)
    except (RuntimeError, ValueError, IndexError, AttributeError, TypeError) as error:
        return f"its module does more than multiply ({str(error).splitlines()[0][:100]})"
    return "" if found <= NARROWED[inputs.dtype] else f"its module does more than multiply (difference {found:.2g})"
