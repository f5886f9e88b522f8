"""What a packed matrix means: the definition of the format, in plain loops and in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from prunus import bitmap
from prunus.packed.matrix import GROUP, KINDS, PackedMatrix, QuantizedMatrix, row_counts


def unpack_plainly(matrix: PackedMatrix) -> list[list[float]]:
    """The matrix `[rows][columns]`, number by number. This function is the specification; for real ones it is slow.

    int8 and int4 weights are `number * scale` in float32.
    """
    dense = [[0.0] * matrix.columns for _ in range(matrix.rows)]
    next_half = 0  # int4: halves read so far; else values read so far
    for row in range(matrix.rows):
        for stored in range(matrix.columns):
            if not int(matrix.bitmap[row, stored // 8]) >> stored % 8 & 1:
                continue
            if matrix.kind == "int4":
                byte = int(matrix.values[next_half // 2])
                number = float((byte >> 4 if next_half % 2 else byte & 15) - 8)
            else:
                number = float(matrix.values[next_half])
            next_half += 1
            if matrix.scales is not None:
                number *= float(matrix.scales[row, stored // GROUP])
            column = stored if matrix.order is None else int(matrix.order[stored])
            dense[row][column] = number
        if matrix.kind == "int4":
            next_half += next_half % 2
    return dense


def numbers(matrix: PackedMatrix) -> Tensor:
    """The kept values as numbers, row after row; int8 and int4 without their scales."""
    if matrix.kind != "int4":
        return matrix.values
    halves = torch.stack([matrix.values & 15, matrix.values >> 4], 1).flatten()
    count = row_counts(matrix.bitmap)
    padded = count + count % 2
    row = torch.arange(matrix.rows, device=halves.device).repeat_interleave(padded)
    place = torch.arange(len(halves), device=halves.device) - (padded.cumsum(0) - padded)[row]
    return halves[place < count[row]].to(torch.int8) - 8


def unpack(matrix: PackedMatrix) -> Tensor:
    """The dense matrix `[rows, columns]` in its own order of columns: bfloat16 for bf16, else float32.

    The same numbers as `unpack_plainly`, which rounds products to float32 only at the end.
    """
    dtype = KINDS[matrix.kind] if matrix.scales is None else torch.float32
    dense = torch.zeros(matrix.shape, dtype=dtype, device=matrix.bitmap.device)
    dense[bitmap.unpack(matrix.bitmap, matrix.columns)] = numbers(matrix).to(dtype)
    if matrix.scales is not None:
        dense *= matrix.scales.float().repeat_interleave(GROUP, 1)[:, : matrix.columns]
    if matrix.order is None:
        return dense
    restored = torch.empty_like(dense)
    restored[:, matrix.order.long()] = dense
    return restored


def dequantize(matrix: QuantizedMatrix) -> Tensor:
    """float32 `[rows, columns]`."""
    return matrix.codes * matrix.scales.float().repeat_interleave(GROUP, 1)[:, : matrix.codes.shape[1]]
