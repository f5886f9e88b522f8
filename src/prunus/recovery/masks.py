"""Which weights are kept, written down: a bit for each weight of each matrix, beside the weights.

A kept weight may be zero (underflow, a dead channel), and a zero may have been made by rounding; so the masks are never
inferred from the weights once there is a registry. For a checkpoint without one they are taken from the zeros, once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from prunus.bitmap import pack, unpack
from prunus.errors import FormatError
from prunus.sites import Block, Matrix, SiteInfo

# Not named *.safetensors: readers take every such file for weights. Its contents are safetensors all the same.
FILE = "prunus.masks"

# Groups that N:M patterns have in practice, and by how much the kept share of one may exceed the matrix's.
GROUPS = (2, 4, 8, 16, 32)
NEAR = 0.01


@dataclass
class Masks:
    """The kept weights of every matrix.

    Attributes:
        packed: matrix name → uint8 `[out, ceil(in / 8)]`, bit j of a byte for column 8·byte + j, 1 = kept.
        columns: matrix name → number of its columns.
        derived: True if they were taken from the zeros of a checkpoint without a registry.
    """

    packed: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, int] = field(default_factory=dict)
    derived: bool = False

    def add(self, name: str, keep: Tensor) -> None:
        """Remember a mask, bool `[out, in]`, True = kept."""
        self.packed[name], self.columns[name] = pack(keep).cpu(), keep.shape[1]

    def keep(self, name: str, device: torch.device | None = None) -> Tensor:
        """The mask of a matrix, bool `[out, in]`, True = kept."""
        return unpack(self.packed[name].to(device or "cpu"), self.columns[name])

    def bits(self, info: SiteInfo, device: torch.device) -> Tensor:
        """The packed mask of a matrix on a device; on meta only its shape, whether or not there is a mask."""
        if device.type == "meta":
            return torch.empty(info.shape[0], -(-info.shape[1] // 8), dtype=torch.uint8, device=device)
        return self.packed[info.name].to(device)

    @property
    def removed(self) -> int:
        """Number of weights that are not kept, in all matrices."""
        return sum(map(self.gone, self.packed))

    def gone(self, name: str) -> int:
        """Number of weights of a matrix that are not kept."""
        return self.size(name) - int(self.keep(name).sum())

    def size(self, name: str) -> int:
        """Number of weights of a matrix."""
        return self.packed[name].shape[0] * self.columns[name]

    @property
    def shares(self) -> dict[str, float]:
        """Matrix name → share of its weights that is not kept."""
        return {name: self.gone(name) / self.size(name) for name in self.packed if self.size(name)}

    def keep_all(self, names: Iterable[str]) -> None:
        """Every weight of these matrices is kept, whatever it is now."""
        for name in names:
            self.add(name, torch.ones(self.packed[name].shape[0], self.columns[name], dtype=torch.bool))

    def pattern(self, name: str) -> str | None:
        """The N:M that explains the mask of a matrix, or None; see `pattern_of`."""
        return pattern_of(self.keep(name))

    def write(self, path: Path) -> None:
        """Write the registry (the caller renames it into place).

        The number of columns stands in the metadata, since a byte holds eight.
        """
        tensors = {name: bits.contiguous() for name, bits in self.packed.items()}
        path.write_bytes(save(tensors, metadata={"columns": json.dumps(self.columns)}))

    @classmethod
    def read(cls, path: Path) -> Masks:
        """Read a registry.

        Raises:
            FormatError: the file is not one.
        """
        raw = path.read_bytes()
        try:
            length = int.from_bytes(raw[:8], "little")
            columns = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["columns"])
            found = cls(load(raw), {str(name): int(count) for name, count in columns.items()})
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            raise FormatError(
                f"{path} is not a registry of masks. Remove it, and the masks are taken from the zeros of the weights."
            ) from None
        for name, bits in found.packed.items():
            right = bits.dtype == torch.uint8 and bits.ndim == 2 and name in found.columns
            if not right or bits.shape[1] != -(-found.columns[name] // 8):
                raise FormatError(f"{path}: the mask of {name} is damaged. Copy the file again, or remove it.")
        return found


def pattern_of(keep: Tensor) -> str | None:
    """The N:M pattern with the smallest M that accounts for the zeros of a mask, such as "2:4"; None if none does.

    Every M consecutive inputs keep at most N, and N / M is at most `NEAR` above the kept share.
    """
    density = float(keep.float().mean())
    for group in GROUPS:
        if keep.shape[1] % group == 0:
            most = int(keep.unflatten(1, (-1, group)).sum(-1).max())
            if most < group and most / group - density <= NEAR:
                return f"{most}:{group}"
    return None


def take(blocks: Iterable[Block], masks: Masks | None, load_block) -> Masks:
    """The masks of a model: those of its registry, checked against the weights, or those of its zeros.

    Args:
        blocks: all blocks.
        masks: what the registry holds; None without one.
        load_block: `load_block(block)` loads it, and drops it when called again with None.

    Raises:
        FormatError: the registry does not belong to these weights.
    """
    found = masks or Masks(derived=True)
    for block in blocks:
        load_block(block)
        for matrix in block.matrices():
            if masks is None:
                found.add(matrix.name, matrix.weight != 0)
            else:
                _check(matrix, masks)
        load_block(None)
    return found


def _check(matrix: Matrix, masks: Masks) -> None:
    """See that a registry belongs to a matrix: the same shape, and zeros wherever nothing is kept."""
    cure = f"Remove {FILE} from the folder, and the masks are taken from the zeros of the weights."
    bits = masks.packed.get(matrix.name)
    if bits is None or (bits.shape[0], masks.columns[matrix.name]) != tuple(matrix.weight.shape):
        raise FormatError(f"{FILE} holds no mask of the shape of {matrix.name}; it is of another model. {cure}")
    alive = int(matrix.weight[~masks.keep(matrix.name, matrix.weight.device)].count_nonzero())
    if alive:
        raise FormatError(f"{FILE} says that {alive:,} weights of {matrix.name} are removed, but they are not. {cure}")


def clear(matrix: Matrix, masks: Masks) -> None:
    """Set every weight that is not kept to +0.0, in place; also what became NaN there, and -0.0."""
    matrix.weight.masked_fill_(~masks.keep(matrix.name, matrix.weight.device), 0.0)


def violations(matrix: Matrix, masks: Masks) -> tuple[int, int]:
    """Weights of a matrix that should be +0.0 and are: `(removed, removed and +0.0 to the bit)`."""
    gone = matrix.weight[~masks.keep(matrix.name, matrix.weight.device)]
    return gone.numel(), int(((gone == 0) & ~torch.signbit(gone)).sum())
