"""Matrices in the runtime's own form, multiplied with activations."""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from prunus.errors import FormatError
from prunus.packed.matrix import KINDS as DTYPES
from prunus.packed.matrix import PackedMatrix, QuantizedMatrix
from prunus.runtime.native import Native, PackedStruct

KINDS = {name: number for number, name in enumerate(DTYPES)}
DENSE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
FLOAT_INPUT, BITMAP, WINDOWS, FASTER = range(4)


class Handle:
    """A matrix in the library: made once, freed with this object.

    Attributes:
        rows: of the matrix.
        columns: of the matrix.
        native: the library that holds it.
        pointer: for other calls of the library; valid as long as this object lives.
    """

    def __init__(self, rows: int, columns: int, native: Native, pointer: int | None) -> None:
        assert pointer is not None
        self.rows, self.columns, self.native, self.pointer = rows, columns, native, pointer
        weakref.finalize(self, native.library.prunus_matrix_free, pointer)

    @property
    def bytes(self) -> int:
        """Bytes that one product with a vector reads."""
        return self.native.library.prunus_matrix_bytes(self.pointer)

    def __call__(self, x: Tensor) -> Tensor:
        """`x W^T` for `x` [..., columns] float32 on the CPU; float32 [..., rows].

        Raises:
            FormatError: the last dimension of `x` is not the number of columns.
            PrunusError: this process was forked from the one that made the matrix.
        """
        self.native.check_process()
        if x.shape[-1:] != (self.columns,):
            raise FormatError(f"The matrix has {self.columns} columns, the input has the shape {tuple(x.shape)}.")
        given = x.detach().to("cpu", torch.float32).contiguous()
        out = torch.empty(*x.shape[:-1], self.rows)
        tokens = given.numel() // self.columns
        library = self.native.library
        status = library.prunus_multiply(self.native.handle, self.pointer, given.data_ptr(), tokens, out.data_ptr())
        self.native.check(status, "A product")
        return out

    def weights(self) -> Tensor:
        """All weights as float32 [rows, columns], in stored column order: what the kernels multiply with."""
        padded = -(-self.columns // 64) * 64
        out = torch.empty(self.rows, padded)
        for row in range(self.rows):
            self.native.check(self.native.library.prunus_decode(self.pointer, row, out[row].data_ptr()), "A row")
        return out[:, : self.columns]


class Linear(Handle):
    """A packed sparse matrix, checked and turned into the layout that suits the processor.

    Args:
        packed: the matrix; it is copied, so its tensors may be dropped.
        native: the library.
        rounded: int8 and int4 values are multiplied with activations rounded to int8 (one scale per 64 columns, in
            stored order), which is the fast way; False keeps activations as they are.
        layout: "bitmap" or "windows" forces how rounded activations are met; None takes the faster one.

    Raises:
        FormatError: lengths, padding bits, scales or the column order are not valid.
    """

    def __init__(
        self, packed: PackedMatrix, native: Native, *, rounded: bool = True, layout: str | None = None
    ) -> None:
        if packed.kind not in KINDS:
            raise FormatError(f"Values of the kind {packed.kind!r} are unknown; known: {', '.join(KINDS)}.")
        tensors = _tensors(packed)
        how = FLOAT_INPUT
        if rounded and packed.kind in ("int8", "int4"):
            how = {"bitmap": BITMAP, "windows": WINDOWS}[layout] if layout else FASTER if native.expands else WINDOWS
        struct = PackedStruct(
            packed.rows, packed.columns, KINDS[packed.kind],
            *_address(tensors["bitmap"]), *_address(tensors["values"]),
            *_address(tensors["scales"], count=True), *_address(tensors["order"], count=True),
        )  # fmt: skip
        pointer = ctypes.c_void_p()
        status = native.library.prunus_matrix(ctypes.byref(struct), how, ctypes.byref(pointer))
        native.check(status, f"A packed matrix of {packed.rows} x {packed.columns} {packed.kind} values")
        super().__init__(packed.rows, packed.columns, native, pointer.value)


class DenseLinear(Handle):
    """A dense matrix: the head, embeddings, and the baseline that sparse ones are measured against.

    Args:
        weight: [rows, columns] float32 or bfloat16, multiplied as it is, or codes with scales: then activations are
            rounded to int8 as in `Linear`. Other float dtypes become float32.
        native: the library.

    Raises:
        FormatError: not a matrix, or scales that are not finite.
    """

    def __init__(self, weight: Tensor | QuantizedMatrix, native: Native) -> None:
        values, scales = (weight, None) if isinstance(weight, Tensor) else (weight.codes, weight.scales)
        if values.ndim != 2 or (scales is None) == (values.dtype == torch.int8):
            raise FormatError(f"A dense matrix cannot be made of a tensor {values.dtype} {tuple(values.shape)}.")
        if scales is None and values.dtype != torch.bfloat16:
            values = values.float()
        values = values.detach().to("cpu").contiguous()
        scales = None if scales is None else scales.detach().to("cpu", torch.float16).contiguous()
        rows, columns = values.shape
        struct = PackedStruct(
            rows, columns, DENSE_KINDS[values.dtype], None, 0, *_address(values), *_address(scales, count=True)
        )
        pointer = ctypes.c_void_p()
        status = native.library.prunus_dense(ctypes.byref(struct), ctypes.byref(pointer))
        native.check(status, f"A dense matrix {tuple(values.shape)}")
        super().__init__(rows, columns, native, pointer.value)


def _tensors(packed: PackedMatrix) -> dict[str, Tensor | None]:
    """The tensors of `packed`, contiguous on the CPU, their dtypes checked: the library sees only addresses."""
    wanted = {"bitmap": torch.uint8, "values": DTYPES[packed.kind], "scales": torch.float16, "order": torch.int32}
    found = {}
    for name, dtype in wanted.items():
        tensor = getattr(packed, name)
        if tensor is not None and tensor.dtype != dtype:
            raise FormatError(f"The {name} of a packed {packed.kind} matrix must be {dtype}, not {tensor.dtype}.")
        found[name] = None if tensor is None else tensor.detach().to("cpu").contiguous()
    return found


def _address(tensor: Tensor | None, count: bool = False) -> tuple[int | None, int]:
    """Address and size in bytes (or in elements, if `count`)."""
    if tensor is None:
        return None, 0
    return tensor.data_ptr() or None, tensor.numel() if count else tensor.numel() * tensor.element_size()
