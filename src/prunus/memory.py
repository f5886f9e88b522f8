"""Peak memory: predicted before a run from shapes alone, and measured after it.

    peak = interpreter and libraries
         + max(what lies outside of blocks, largest block + its statistics + work on its largest matrix + hidden states)

None of the terms grows with the depth of the model (architecture, "one block at a time").
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from prunus.models.checkpoint import Checkpoint
from prunus.models.skeleton import parameter_count
from prunus.sites import Block
from prunus.statistics import Gram

# What the libraries load while they work, after the first look at the process; measured.
LATER = 64 << 20


def predict(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    checkpoint: Checkpoint,
    *,
    needs: frozenset[type],
    tokens: int,
    batch_tokens: int,
    length: int,
) -> dict[str, int]:
    """The terms of the peak, in bytes.

    Args:
        model: in the dtype that blocks are computed in; its parameters may be on the meta device.
        blocks: all blocks, with their sites.
        checkpoint: its files.
        needs: statistics that any part of the run reads.
        tokens: all calibration tokens of this process.
        batch_tokens: tokens in one forward pass.
        length: tokens in one sample, the unit of a backward pass.

    Returns:
        `{"interpreter": …, "outside": …, "block": …, "statistics": …, "gradients": …, "matrix": …, "hidden": …,
        "activations": …, "peak": …}`; `peak` is `interpreter` + the larger of `outside` and the sum of all others.
    """
    computed = model.dtype.itemsize
    stored = max(tensor.dtype.itemsize for tensor in checkpoint.tensors.values())
    per_block = [sum(parameter.numel() for parameter in block.module.parameters()) for block in blocks]
    infos = [info for block in blocks for info in block.infos]
    features = max(sum(sum(info.shape) for info in block.infos if ".experts." not in info.name) for block in blocks)
    gradients = sum(kind.source in ("loss", "output") for kind in needs)
    copies = max((kind.copies for kind in needs if kind.source == "trials"), default=0)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)
    terms = {
        # Read and converted, or read and written; under a loss the logits, their softmax and their gradient.
        "outside": (parameter_count(model) - sum(per_block)) * (computed + stored)
        + (3 * length * vocabulary * 4 if any(kind.source == "loss" for kind in needs) else 0)
        # The whole model at once, with the logits of a batch.
        + (copies * parameter_count(model) * computed + bool(copies) * 3 * batch_tokens * vocabulary * 4),
        "block": max(per_block) * (computed + stored),
        "statistics": max(_grams(block) for block in blocks) * 4 if Gram in needs else 0,
        # One gradient, the sums over samples, and what the backward pass of a sample keeps.
        "gradients": (max(per_block) * 4 * (1 + gradients) + 2 * length * features * computed if gradients else 0),
        # Scores, the copy that selection works on, and the mask.
        "matrix": max(info.size for info in infos) * 4 * 3,
        # In front of the block, behind the dense block, behind the pruned block.
        "hidden": 3 * tokens * _width(model) * computed,
        # Of the inputs and outputs of all matrices of a block about half are alive at once.
        "activations": batch_tokens * features * computed // 2,
    }
    interpreter = current() + LATER
    together = sum(size for name, size in terms.items() if name != "outside")
    return {"interpreter": interpreter, **terms, "peak": interpreter + max(terms["outside"], together)}


def scratch(model: PreTrainedModel, blocks: Sequence[Block], needs: frozenset[type], tokens: int) -> int:
    """Bytes on disk, besides the result, while a run lasts: gradients of the loss, and the inputs of all blocks.

    Args:
        model: in the dtype that blocks are computed in.
        blocks: all blocks, with their sites.
        needs: statistics that any part of the run reads.
        tokens: all calibration tokens.
    """
    kinds = sum(kind.source == "loss" for kind in needs)
    sites = sum(info.size for block in blocks for info in block.infos)
    inputs = tokens * _width(model) * model.dtype.itemsize * (len(blocks) + 1)
    return kinds * 4 * sites + inputs if kinds else 0


def release() -> None:
    """Give freed memory back to the system, where the C library is glibc; it would otherwise be kept and add up."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def current() -> int:
    """Resident memory of this process now, bytes."""
    return _status("VmRSS") or peak()


def peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def available() -> int:
    """Memory that this machine, or the container on it, can still give; the whole where the system does not say."""
    whole = _read("/proc/meminfo", "MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        whole = min(whole, max(int(limit.read_text()) - int(used.read_text()), 0))
    return whole


def _status(field: str) -> int | None:
    """A field of Linux's process status; unlike getrusage it does not count the parent before exec."""
    return _read("/proc/self/status", field)


def _read(file: str, field: str) -> int | None:
    path = Path(file)
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _width(model: PreTrainedModel) -> int:
    """Size of the residual stream; transformers' configurations name it in one of three ways."""
    config = model.config.get_text_config()
    return next((size for name in ("hidden_size", "d_model", "n_embd") if (size := getattr(config, name, 0))), 1)


def _grams(block: Block) -> int:
    """Values in the `[in, in]` sums of a block; matrices side by side with the same inputs share one."""
    total, last = 0, None
    for info in block.infos:
        parent, columns = info.name.rpartition(".")[0], info.shape[1]
        if last != (parent, columns):
            total += columns * columns
        last = (parent, columns)
    return total
