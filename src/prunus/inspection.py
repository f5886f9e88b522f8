"""Where the zeros of a checkpoint are, read from its files alone: any architecture, whoever pruned it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunus.models.checkpoint import Checkpoint, Stored
from prunus.progress import Progress, Silent

if TYPE_CHECKING:
    from torch import dtype as Dtype

# Largest group of consecutive inputs that is tried, unless `prunus.json` names a larger one.
LARGEST_GROUP = 64
# A tensor under a numbered module, as in `model.layers.3.mlp.up_proj.weight`; the first number is the block's.
NUMBERED = re.compile(r"^((?:.*?\.)?\d+)\.(.+)$")
# Slices of a 3-D tensor narrower than this are the taps of a convolution, not an expert.
NARROWEST_EXPERT = 8
# Bits of the sign, and of infinity (above it, NaN), in formats that are looked at as integers.
BITS: dict[Dtype, tuple[Dtype, int, int]] = {
    torch.float32: (torch.int32, 0x7FFFFFFF, 0x7F800000),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float64: (torch.int64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    torch.float8_e5m2: (torch.uint8, 0x7F, 0x7C),
    torch.float8_e4m3fn: (torch.uint8, 0x7F, 0x7E),
}
# A pattern explains a matrix's zeros if it keeps at most this much more than the matrix does.
EXPLAINED = 0.01
# Values looked at together: bounds the temporary memory to a few times this many bytes.
CHUNK = 1 << 24


@dataclass
class Count:
    """What was seen in one tensor or in several."""

    size: int = 0
    zeros: int = 0
    negative_zeros: int = 0
    nan: int = 0
    infinite: int = 0

    def __iadd__(self, other: Count) -> Count:
        """Sum field by field."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.size if self.size else 0.0


def inspect(folder: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Sparsity per block and matrix, N:M patterns that hold, and provenance, of a folder of safetensors.

    Tensors are read one at a time by their names on disk; memory is bounded by the largest of them.

    Args:
        folder: a local checkpoint.
        progress: told about every tensor.

    Returns:
        `model`, `parameters`, `zeros`, `sparsity` (share of all parameters), `negative_zeros`, `nan`, `infinite`,
        `pruned_share` (sparsity of the matrices inside blocks), `blocks` with `name, parameters, sparsity, patterns,
        matrices[]`, `outside` (large tensors outside blocks), `provenance` (`prunus.json`, or None), `other_dtypes`.

    Raises:
        ModelError: there are no safetensors in the folder.
        FormatError: a file is truncated or is not what it promises.
    """
    folder = Path(folder)
    checkpoint = Checkpoint.open(folder)
    provenance = _provenance(folder)
    named = _named_group(provenance)
    progress = progress or Silent()
    progress.stage("inspect", len(checkpoint.tensors))
    total, rows, outside, other = Count(), [], [], set()
    # In the order of the shards, so that each file is read once from front to back.
    for name, tensor in checkpoint.read(checkpoint.tensors):
        stored = checkpoint.tensors[name]
        if stored.dtype not in BITS:
            other.add(str(stored.dtype).removeprefix("torch."))
        else:
            count = _count(tensor)
            total += count
            if _is_matrix(name, stored):
                rows.append(_row(name, tensor, count, named))
            elif tensor.ndim >= 2:
                outside.append({"name": name, "shape": list(stored.shape), "sparsity": count.sparsity})
        progress.advance(name)
    blocks = _blocks(rows)
    inside = sum(block["parameters"] for block in blocks)
    return {
        "model": str(folder),
        "parameters": total.size,
        "zeros": total.zeros,
        "sparsity": total.sparsity,
        "negative_zeros": total.negative_zeros,
        "nan": total.nan,
        "infinite": total.infinite,
        "pruned_share": sum(row["zeros"] for row in rows) / inside if inside else 0.0,
        "blocks": blocks,
        "outside": outside,
        "other_dtypes": sorted(other),
        "provenance": provenance,
    }


def _is_matrix(name: str, stored: Stored) -> bool:
    if not NUMBERED.match(name) or len(stored.shape) not in (2, 3):
        return False
    return len(stored.shape) == 2 or min(stored.shape[1:]) >= NARROWEST_EXPERT


def _row(name: str, tensor: Tensor, count: Count, named: int) -> dict[str, Any]:
    """One matrix, or one stack of experts whose patterns are those that hold in every expert."""
    match = NUMBERED.match(name)
    assert match is not None
    patterns, axis = _patterns(tensor.unsqueeze(0) if tensor.ndim == 2 else tensor, count, named)
    row = {"name": name, "block": match[1], "shape": list(tensor.shape), **vars(count)}
    return {**row, "sparsity": count.sparsity, "patterns": patterns, "axis": axis}


def _count(tensor: Tensor) -> Count:
    """Zeros of both signs and values that are no numbers, from the bits, so that no format is rounded."""
    kind, magnitude, infinity = BITS[tensor.dtype]
    flat = tensor.reshape(-1)
    count = Count(size=flat.numel())
    for part in flat.split(CHUNK) if flat.numel() else ():
        bits = part.view(kind)
        zeros = part.numel() - int(torch.count_nonzero(bits & magnitude))
        count.zeros += zeros
        count.negative_zeros += zeros - (part.numel() - int(torch.count_nonzero(bits))) if zeros else 0
        if int((bits & magnitude).max()) >= infinity:
            count.nan += int(((bits & magnitude) > infinity).sum())
            count.infinite += int(((bits & magnitude) == infinity).sum())
    if tensor.dtype == torch.float8_e4m3fn:
        count.infinite = 0  # it has none: the bits named above are its largest number
    return count


def _patterns(stack: Tensor, count: Count, named: int) -> tuple[list[str], str | None]:
    """The tightest N of each M that holds in all of `[matrices, out, in]`, and along which stored axis.

    A weight is usually stored `[out, in]`, so inputs run along the last axis; `Conv1D` (GPT-2) and some experts are
    stored the other way. The other axis is tried when the first does not explain all the zeros.
    """
    if not 0 < count.zeros < count.size:
        return [], None
    explained = 1 - count.sparsity + EXPLAINED
    columns = _kept(stack, named)
    if min(columns.values(), default=1.0) > explained:
        rows = _kept(stack.transpose(1, 2), named)
        if min(rows.values(), default=1.0) <= explained:
            return _written(rows), "rows"
    return _written(columns), "columns" if columns else None


def _written(kept: Mapping[int, float]) -> list[str]:
    return [f"{round(share * group)}:{group}" for group, share in kept.items()]


def groups(columns: int, named: int = 0) -> list[int]:
    """Every M from 2 to `LARGEST_GROUP`, and `named`, that divides a row of `columns`, ascending."""
    tried = {*range(2, LARGEST_GROUP + 1), named}
    return sorted(group for group in tried if 1 < group <= columns and columns % group == 0)


def _kept(stack: Tensor, named: int) -> dict[int, float]:
    """For every M that some N below M fits: N / M."""
    worst = dict.fromkeys(groups(stack.shape[2], named), 0)
    for matrix in stack:
        _fullest(matrix, worst)
        if all(most >= group for group, most in worst.items()):
            break
    return {group: most / group for group, most in worst.items() if most < group}


def _fullest(matrix: Tensor, worst: dict[int, int]) -> None:
    """Raise `worst[M]` to the largest number of non-zeros among M inputs in a row."""
    for rows in matrix.split(max(1, CHUNK // matrix.shape[1])):
        one = (rows != 0).to(torch.uint8) if rows.dtype.itemsize > 1 else (rows.view(torch.uint8) & 0x7F != 0).byte()
        counts = {1: one}
        for group in [group for group, most in worst.items() if most < group]:
            # From the largest group that divides this one, as few numbers as possible are summed.
            part = max(smaller for smaller in counts if group % smaller == 0)
            kind = torch.uint8 if group <= LARGEST_GROUP else torch.int32
            counts[group] = counts[part].unflatten(1, (-1, group // part)).sum(-1, dtype=kind)
            worst[group] = max(worst[group], int(counts[group].max()))


def tightest(patterns: list[str]) -> list[str]:
    """Without those that follow from another: 2:4 implies 4:8 and 6:12, but says nothing about groups of 6."""
    pairs = [tuple(map(int, pattern.split(":"))) for pattern in patterns]
    return [
        f"{kept}:{group}"
        for kept, group in pairs
        if not any(small < group and not group % small and few * group // small <= kept for few, small in pairs)
    ]


def _blocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows gathered by block, in natural order (2 before 10)."""
    names = dict.fromkeys(row["block"] for row in rows)
    return [_block(name, [row for row in rows if row["block"] == name]) for name in sorted(names, key=_natural)]


def _block(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: _natural(row["name"]))
    size, zeros = sum(row["size"] for row in rows), sum(row["zeros"] for row in rows)
    pruned = [set(row["patterns"]) for row in rows if row["zeros"]]
    common = set.intersection(*pruned) if pruned else set()
    return {
        "name": name,
        "parameters": size,
        "sparsity": zeros / size if size else 0.0,
        "patterns": sorted(common, key=lambda pattern: int(pattern.split(":")[1])),
        "matrices": [{key: value for key, value in row.items() if key != "block"} for row in rows],
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _provenance(folder: Path) -> Mapping[str, Any] | None:
    """What `prunus.json` says about the making; None if there is none or it is not ours to read."""
    try:
        record = json.loads((folder / "prunus.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _named_group(record: Mapping[str, Any] | None) -> int:
    """M of the N:M pattern that `prunus.json` names; 0 if it names none."""
    part: Any = record
    for key in ("recipe", "prune", "pattern"):
        part = part.get(key) if isinstance(part, Mapping) else None
    found = re.fullmatch(r"\d{1,6}:(\d{1,6})", part) if isinstance(part, str) else None
    return int(found[1]) if found else 0


def matrices(result: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every matrix of an `inspect` result."""
    for block in result["blocks"]:
        yield from block["matrices"]
