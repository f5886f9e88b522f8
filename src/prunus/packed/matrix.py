"""One matrix in the packed format: where its weights are, and what they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.errors import FormatError

GROUP = 128  # stored columns that share a scale
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}  # dtype of `values`
SCALED = frozenset({"int8", "int4"})


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix `[rows, columns]` without its zeros; immutable, and not checked: see `check`.

    Attributes:
        rows: outputs.
        columns: inputs.
        kind: of the values: a name of `KINDS`.
        bitmap: uint8 `[rows, ceil(columns / 8)]`; bit j % 8, counted from the lowest, of byte j // 8 is stored
            column j: 1 = kept. Bits beyond the last column are 0.
        values: kept values, row after row, in the order of their stored columns. float32, bfloat16 or int8
            `[kept]`; for int4 uint8 `[sum over rows of ceil(kept in row / 2)]`: two codes a byte, the first in the low
            half, each row begins a byte, an odd row's last high half is 0. Code c in 0..15 is the number c - 8.
        scales: float16 `[rows, ceil(columns / 128)]` for int8 and int4: what a number is multiplied by, one for every
            128 stored columns of a row. None for the others.
        order: int32 `[columns]`: stored column j is column `order[j]` of the matrix. None: as it was.
    """

    rows: int
    columns: int
    kind: str
    bitmap: Tensor
    values: Tensor
    scales: Tensor | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.rows, self.columns

    @property
    def bytes(self) -> int:
        """What its tensors weigh."""
        parts = (self.bitmap, self.values, self.scales, self.order)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def check(matrix: PackedMatrix, name: str) -> None:
    """See that a kernel can be given this matrix: every length, index and scale.

    Args:
        matrix: whatever a file held.
        name: for the message.

    Raises:
        FormatError: naming the first thing that is wrong.
    """
    if matrix.kind not in KINDS:
        raise FormatError(f"{name}: values of kind {matrix.kind!r}; known are {', '.join(KINDS)}.")
    if matrix.rows < 1 or matrix.columns < 1:
        raise FormatError(f"{name}: a matrix of {matrix.rows} x {matrix.columns} is none.")
    _check_tensor(matrix.bitmap, torch.uint8, (matrix.rows, -(-matrix.columns // 8)), f"{name}.bitmap")
    if matrix.columns % 8 and int((matrix.bitmap[:, -1] >> matrix.columns % 8).max()):
        raise FormatError(f"{name}.bitmap: marks columns beyond the last, {matrix.columns - 1}.")
    kept = row_counts(matrix.bitmap)
    count = int(((kept + 1) // 2 if matrix.kind == "int4" else kept).sum())
    _check_tensor(matrix.values, KINDS[matrix.kind], (count,), f"{name}.values")
    if matrix.values.is_floating_point() and not torch.isfinite(matrix.values).all():
        raise FormatError(f"{name}.values: holds NaN or infinite weights.")
    if matrix.kind == "int4":
        _check_halves(matrix.values, kept, name)
    _check_scales(matrix, name)
    _check_order(matrix, name)


def row_counts(bitmap: Tensor) -> Tensor:
    """Bits that are 1 in each row, int64 `[rows]`."""
    table = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=bitmap.device)
    return table[bitmap.int()].sum(1, dtype=torch.int64)


def _check_scales(matrix: PackedMatrix, name: str) -> None:
    if (matrix.scales is None) == (matrix.kind in SCALED):
        raise FormatError(f"{name}: {matrix.kind} values {'need' if matrix.kind in SCALED else 'have no'} scales.")
    if matrix.scales is not None:
        _check_tensor(matrix.scales, torch.float16, (matrix.rows, -(-matrix.columns // GROUP)), f"{name}.scales")
        _check_positive(matrix.scales, name)


def _check_positive(scales: Tensor, name: str) -> None:
    if not (torch.isfinite(scales) & (scales >= 0)).all():
        raise FormatError(f"{name}.scales: a scale is NaN, infinite or negative.")


def _check_order(matrix: PackedMatrix, name: str) -> None:
    if matrix.order is None:
        return
    _check_tensor(matrix.order, torch.int32, (matrix.columns,), f"{name}.order")
    whole = torch.arange(matrix.columns, dtype=torch.int32, device=matrix.order.device)
    if not torch.equal(matrix.order.sort().values, whole):
        raise FormatError(f"{name}.order: does not name every column from 0 to {matrix.columns - 1} once.")


def _check_halves(values: Tensor, kept: Tensor, name: str) -> None:
    """The unused half byte of a row with an odd count is 0, so that equal matrices have equal bytes."""
    ends = ((kept + 1) // 2).cumsum(0) - 1
    if (values[ends[kept % 2 == 1]] >> 4).any():
        raise FormatError(f"{name}.values: the unused half of a row's last byte is not 0.")


def _check_tensor(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], name: str) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(
            f"{name}: is {tensor.dtype} {list(tensor.shape)}, the format asks {dtype} {list(shape)}. The file is "
            "damaged or not a packed model; export it again."
        )


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix without zeros worth leaving out (an embedding, a head) as whole numbers and scales.

    Attributes:
        codes: int8 `[rows, columns]`, from -127 to 127.
        scales: float16 `[rows, ceil(columns / 128)]`: what a code is multiplied by, one for every 128 columns of a row.
    """

    codes: Tensor
    scales: Tensor


def check_quantized(matrix: QuantizedMatrix, shape: tuple[int, int], name: str) -> None:
    """See that codes and scales are those of a matrix of this shape.

    Raises:
        FormatError: naming the first thing that is wrong.
    """
    _check_tensor(matrix.codes, torch.int8, shape, f"{name}.codes")
    _check_tensor(matrix.scales, torch.float16, (shape[0], -(-shape[1] // GROUP)), f"{name}.scales")
    _check_positive(matrix.scales, name)
