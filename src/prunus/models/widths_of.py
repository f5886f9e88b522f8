"""Widths of all blocks of a model, each make of block looked at once, with the narrowed = masked check as judge."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prunus.capture import Call
from prunus.edits import blank, narrow
from prunus.errors import ModelError
from prunus.models.width import find_widths, make, relocated
from prunus.sites import Block, Kind, Width
from prunus.stream import Batch, Stream

# Largest difference between a narrowed block's outputs and a masked one's, over their largest size.
NARROWED = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def attach_widths(stream: Stream, probe: Batch, kinds: Sequence[Kind]) -> list[str]:
    """Give every block of the first tower its widths of these kinds.

    Args:
        stream: its blocks are changed.
        probe: a few tokens, with which blocks are called.
        kinds: which are wanted.

    Returns:
        What was found and cannot be used, a sentence each.

    Raises:
        ModelError: a wanted kind is in no block; says why.
    """
    stream.calls([probe])
    assert probe.hidden is not None
    known: dict[tuple, tuple[Block, list[Width]]] = {}
    refusals: list[str] = []
    for block in stream.blocks:
        if block.name not in probe.calls:
            continue
        key = make(block)
        if key not in known:
            found, reasons = find_widths(block, probe.calls[block.name], probe.hidden)
            sound, more = _judged(stream, block, found, probe.calls[block.name], probe.hidden)
            known[key] = (block, sound)
            refusals += [*reasons, *more]
        block.widths = [width for width in relocated(known[key][1], known[key][0], block) if width.kind in kinds]
    missing = [kind for kind in kinds if not any(w.kind == kind for block in stream.blocks for w in block.widths)]
    if missing:
        other: dict[str, str] = {"heads": "neurons", "neurons": "heads"}
        why = "; ".join(refusals) or "its blocks hold none"
        raise ModelError(
            f"The {missing[0]} of {type(stream.model).__name__} cannot be removed ({why}). "
            f"--set method.kinds={other[missing[0]]} leaves them alone."
        )
    return refusals


def difference(narrowed: Tensor, masked: Tensor) -> float:
    """Largest difference over the largest size."""
    return float((narrowed - masked).abs().max() / masked.abs().max().clamp_min(1e-30))


@torch.no_grad()
def _judged(
    stream: Stream, block: Block, widths: list[Width], call: Call, hidden: Tensor
) -> tuple[list[Width], list[str]]:
    """The widths whose removal by half computes what masking computes, and why the others do not."""
    stream.weights.load(stream.weights.sources(block.name))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(hidden.shape, generator=generator).to(stream.device, hidden.dtype)
    sound, refusals = [], []
    for width in widths:
        if width.groups == 1:
            sound.append(width)
            continue
        reason = _differs(block, width, call, inputs)
        if reason:
            refusals.append(f"{width.name}: {reason}")
        else:
            sound.append(width)
    stream.weights.drop(block.module)
    return sound, refusals


def _differs(block: Block, width: Width, call: Call, inputs: Tensor) -> str | None:
    """Remove every other group from a copy; None if it computes what masking does, else what is wrong."""
    twin = copied(block)
    keep = torch.arange(width.groups) % 2 == 0
    blank(twin, width, keep)
    masked = call(twin.module, inputs)
    try:
        narrow(twin, width, keep)
        narrowed = call(twin.module, inputs)
    except (RuntimeError, ValueError, IndexError) as error:
        return f"its class does not run narrowed: {str(error).splitlines()[0][:100]}"
    found = difference(narrowed, masked)
    return None if found <= NARROWED[inputs.dtype] else f"narrowed it computes something else than masked ({found:.2g})"


def copied(block: Block) -> Block:
    """A block of its own with the same weights."""
    module = copy.deepcopy(block.module)
    parts = dict(module.named_modules())
    paths = {id(part): name for name, part in block.module.named_modules()}
    slots = [replace(slot, module=parts[paths[id(slot.module)]]) for slot in block.slots]
    return replace(block, module=module, slots=slots)
