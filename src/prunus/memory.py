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

from torch import nn

from prunus.sites import Block


def predict(
    model: nn.Module, blocks: Sequence[Block], *, bytes_per_value: int, stored_bytes_per_value: int, grams: bool,
    tokens: int, batch_tokens: int,
) -> dict[str, int]:
    """The terms of the peak, in bytes.

    Args:
        model: its parameters may be on the meta device.
        blocks: all blocks, with their sites.
        bytes_per_value: of the dtype that blocks are computed in.
        stored_bytes_per_value: of the dtype on disk.
        grams: whether the method keeps an `[in, in]` matrix for every distinct input.
        tokens: all calibration tokens of this process.
        batch_tokens: tokens in one forward pass.

    Returns:
        `{"interpreter": …, "outside": …, "block": …, "statistics": …, "matrix": …, "hidden": …, "activations": …,
        "peak": …}`; `peak` is the sum of `interpreter` and the larger of `outside` and all the others.
    """
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    outside = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values() if id(p) not in inside)
    values = max(sum(p.numel() for p in block.module.parameters()) for block in blocks)
    largest = max(info.size for block in blocks for info in block.infos)
    width = max((info.shape[1] for block in blocks for info in block.infos if info.shape[1] <= _hidden(model)), default=1)
    features = max(sum(sum(info.shape) for info in block.infos if ".experts." not in info.name) for block in blocks)
    terms = {
        "outside": outside * bytes_per_value,
        # The block itself, and its tensors once more while they are written.
        "block": values * (bytes_per_value + stored_bytes_per_value),
        "statistics": max(_grams(block) for block in blocks) * 4 if grams else 0,
        # Scores, the copy that selection works on, and the mask.
        "matrix": largest * 4 * 3,
        # In front of the block, behind the dense block, behind the pruned block.
        "hidden": 3 * tokens * width * bytes_per_value,
        "activations": 2 * batch_tokens * features * bytes_per_value,
    }
    interpreter = current()
    together = sum(size for name, size in terms.items() if name != "outside")
    return {"interpreter": interpreter, **terms, "peak": interpreter + max(terms["outside"], together)}


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
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available() -> int:
    """Memory that this machine can still give, bytes; the whole of it where the system does not say."""
    return _read("/proc/meminfo", "MemAvailable") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _status(field: str) -> int | None:
    """A field of Linux's process status; unlike getrusage it does not count the parent before exec."""
    return _read("/proc/self/status", field)


def _read(file: str, field: str) -> int | None:
    path = Path(file)
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _hidden(model: nn.Module) -> int:
    config = model.config.get_text_config()
    return getattr(config, "hidden_size", None) or max(getattr(config, "d_model", 0), getattr(config, "n_embd", 0)) or 1


def _grams(block: Block) -> int:
    """Values in the `[in, in]` sums of a block; matrices side by side with the same inputs share one."""
    total, last = 0, None
    for info in block.infos:
        parent, columns = info.name.rpartition(".")[0], info.shape[1]
        if last != (parent, columns):
            total += columns * columns
        last = (parent, columns)
    return total
