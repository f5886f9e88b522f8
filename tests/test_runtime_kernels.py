"""Every kernel of every instruction set that this machine has, against plain float64 products."""

from __future__ import annotations

import functools

import pytest
import torch

from prunus.errors import FormatError, RecipeError
from prunus.packed.matrix import PackedMatrix
from prunus.packed.pack import quantize_dense
from prunus.runtime import native as runtime
from prunus.runtime.kernels import DenseLinear, Linear

pytestmark = pytest.mark.skipif(bool(runtime.absence()), reason=runtime.absence() or "built")

SHAPES = [(1, 1), (3, 17), (16, 64), (33, 65), (40, 130), (17, 128), (50, 300), (64, 577)]
DENSITIES = [0.0, 0.3, 0.8]
ISAS = runtime.runnable()


def mask_of(rows: int, columns: int, density: float, seed: int) -> torch.Tensor:
    """Random, with an empty and a full row where there is room."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    if rows > 2:
        mask[1], mask[2] = False, True
    return mask


@functools.cache
def case(shape: tuple[int, int], density: float, kind: str, seed: int):
    """A packed matrix (every second one permuted), its float64 weights and the activations, both in stored order."""
    rows, columns = shape
    noise = torch.Generator().manual_seed(seed)
    order = torch.randperm(columns, generator=noise).int() if seed % 2 else None
    packed, weight = pack(mask_of(rows, columns, density, seed), kind, seed, order)
    x = torch.randn(70, columns, generator=noise)  # more than a tile of tokens, and a part of one
    return packed, weight, x, x if order is None else x[:, order.long()]


CASES = [(shape, density, seed) for seed, shape in enumerate(SHAPES) for density in DENSITIES]


def pack(mask: torch.Tensor, kind: str, seed: int, order: torch.Tensor | None = None):
    """A packed matrix made by plain loops, and the float64 weights that it stands for, in stored column order."""
    rows, columns = mask.shape
    noise = torch.Generator().manual_seed(seed)
    groups = -(-columns // 128)
    bits = torch.zeros(rows, -(-columns // 8), dtype=torch.uint8)
    weight = torch.zeros(rows, columns, dtype=torch.float64)
    scales = (torch.rand(rows, groups, generator=noise) * 0.1 + 0.01).half() if kind in ("int8", "int4") else None
    values: list = []
    low, high = (-128, 128) if kind == "int8" else (-8, 8)
    for row in range(rows):
        kept = mask[row].nonzero().flatten().tolist()
        for column in kept:
            bits[row, column // 8] |= 1 << (column % 8)
        if scales is None:
            numbers = torch.randn(len(kept), generator=noise).to(torch.bfloat16 if kind == "bf16" else torch.float32)
            weight[row, kept] = numbers.double()
            values.append(numbers)
            continue
        drawn = torch.randint(low, high, (len(kept),), generator=noise)
        weight[row, kept] = drawn.double() * scales.double()[row, [column // 128 for column in kept]]
        codes = drawn.tolist()
        if kind == "int8":
            values.append(torch.tensor(codes, dtype=torch.int8))
        else:
            codes = [code + 8 for code in codes] + ([0] if len(codes) % 2 else [])
            pairs = [codes[i] | codes[i + 1] << 4 for i in range(0, len(codes), 2)]
            values.append(torch.tensor(pairs, dtype=torch.uint8))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}[kind]
    flat = torch.cat(values) if values else torch.empty(0, dtype=dtype)
    return PackedMatrix(rows, columns, kind, bits, flat, scales, order), weight


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations as int8 times the scale of their 64 columns, in float64."""
    out = x.double().clone()
    for first in range(0, x.shape[-1], 64):
        part = x[..., first : first + 64]
        largest = part.abs().amax(-1, keepdim=True)
        inverse = torch.where(largest > 0, 127.0 / largest, torch.zeros(()))
        out[..., first : first + 64] = (part * inverse).round().double() * (largest / 127.0).double()
    return out


def close(result: torch.Tensor, expected: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, error: float) -> None:
    """Off by at most `error` times the sum of the absolute products."""
    size = x.double().abs() @ weight.abs().T + 1e-30
    assert ((result.double() - expected).abs() / size).max() < error


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4"])
def test_packed_matrices_multiply_as_their_weights_do(isa, kind):
    native = runtime.open_native(isa, 2)
    for shape, density, seed in CASES:
        packed, weight, x, stored = case(shape, density, kind, seed)
        linear = Linear(packed, native, rounded=False)
        for count in (3, 70):
            close(linear(x[:count]), stored[:count].double() @ weight.T, weight, stored[:count], 1e-6)
        assert torch.equal(linear.weights(), weight.float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("layout", ["bitmap", "windows"])
def test_rounded_activations_are_the_only_loss(isa, kind, layout):
    native = runtime.open_native(isa, 2)
    for shape, density, seed in CASES:
        packed, weight, x, stored = case(shape, density, kind, seed)
        linear = Linear(packed, native, layout=layout)
        for count in (3, 70):
            close(linear(x[:count]), rounded(stored[:count]) @ weight.T, weight, stored[:count], 1e-6)
        assert torch.equal(linear.weights(), weight.float())


@pytest.mark.parametrize("isa", ISAS)
def test_dense_matrices_multiply_as_their_weights_do(isa):
    native = runtime.open_native(isa, 2)
    for seed, (rows, columns) in enumerate(SHAPES):
        x = torch.randn(20, columns, generator=torch.Generator().manual_seed(seed))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 100))
        for given in (weight, weight.bfloat16()):
            linear = DenseLinear(given, native)
            for count in (2, 20):
                close(linear(x[:count]), x[:count].double() @ given.double().T, given.double(), x[:count], 1e-6)
            assert torch.equal(linear.weights(), given.float())
        rounded_weight = quantize_dense(weight)
        scales = rounded_weight.scales.repeat_interleave(128, 1)[:, :columns]
        exact = rounded_weight.codes.double() * scales.double()
        assert (exact - weight.double()).abs().max() <= weight.abs().max() / 127 * 0.51
        linear = DenseLinear(rounded_weight, native)
        for count in (2, 20):
            close(linear(x[:count]), rounded(x[:count]) @ exact.T, exact, x[:count], 1e-6)
        assert torch.equal(linear.weights(), exact.float())


@pytest.mark.parametrize("isa", ISAS)
def test_the_largest_numbers_do_not_overflow(isa):
    native = runtime.open_native(isa, 1)
    for kind, low in (("int8", -128), ("int4", -8)):
        for layout in ("bitmap", "windows"):
            packed, weight = pack(torch.ones(16, 256, dtype=torch.bool), kind, 0)
            extreme = torch.full_like(packed.values, -128 if kind == "int8" else 0)
            packed = PackedMatrix(16, 256, kind, packed.bitmap, extreme, packed.scales)
            weight = low * packed.scales.double().repeat_interleave(128, 1)
            x = torch.full((1, 256), -1.0)
            close(Linear(packed, native, layout=layout)(x), x.double() @ weight.T, weight, x, 1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_numbers(threads):
    packed, _ = pack(mask_of(200, 130, 0.3, 1), "bf16", 1)
    x = torch.randn(4, 130, generator=torch.Generator().manual_seed(1))
    one = Linear(packed, runtime.open_native("", 1))(x)
    assert torch.equal(Linear(packed, runtime.open_native("", threads))(x), one)


def damaged():
    packed, _ = pack(mask_of(5, 20, 0.4, 3), "int8", 3)
    parts = (packed.bitmap, packed.values, packed.scales)
    bitmap, values, scales = parts
    assert scales is not None
    more, beyond, wild = bitmap.clone(), bitmap.clone(), scales.clone()
    more[0, 0] ^= 1
    beyond[4, 2] |= 0x80
    wild[2, 0] = float("nan")
    order = torch.arange(20, dtype=torch.int32)
    twice, outside = order.clone(), order.clone()
    twice[3], outside[3] = 4, 20
    yield "do(es)? not fit the bitmap", (bitmap, values[:-1], scales, None)
    yield "do(es)? not fit the bitmap", (bitmap[:, :2].contiguous(), values, scales, None)
    yield "do(es)? not fit the bitmap", (more, values, scales, None)
    yield "do(es)? not fit the bitmap", (bitmap, values, scales[:4], None)
    yield "do(es)? not fit the bitmap", (bitmap, values, None, None)
    yield "behind the last column", (beyond, values, scales, None)
    yield "not a finite number", (bitmap, values, wild, None)
    yield "not a permutation", (bitmap, values, scales, twice)
    yield "not a permutation", (bitmap, values, scales, outside)
    yield "not a permutation", (bitmap, values, scales, order[:-1])
    yield "must be torch.int8", (bitmap, values.float(), scales, None)


@pytest.mark.parametrize(("words", "parts"), damaged())
@pytest.mark.parametrize("layout", ["bitmap", "windows"])
def test_damaged_matrices_are_refused_before_a_kernel_sees_them(words, parts, layout):
    bitmap, values, scales, order = parts
    with pytest.raises(FormatError, match=words):
        Linear(PackedMatrix(5, 20, "int8", bitmap, values, scales, order), runtime.open_native("", 1), layout=layout)


def test_an_input_of_another_width_is_refused():
    packed, _ = pack(mask_of(5, 20, 0.4, 3), "fp32", 3)
    with pytest.raises(FormatError, match="20 columns"):
        Linear(packed, runtime.open_native("", 1))(torch.zeros(21))


def test_more_threads_than_the_machine_gives_are_not_taken_for_an_instruction_set(monkeypatch):
    class Library:
        prunus_close = staticmethod(lambda handle: None)

        def prunus_open(self, isa, threads):
            return 1 if threads == 1 else None

    monkeypatch.setattr(runtime, "_library", Library)
    with pytest.raises(RecipeError, match="900 threads; set PRUNUS_THREADS"):
        runtime.open_native("", 900)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("PRUNUS_ISA", "avx3")
    with pytest.raises(RecipeError, match=r"avx3.*Known"):
        runtime.available()
    monkeypatch.setenv("PRUNUS_ISA", "neon" if "avx2" in ISAS else "avx2")
    with pytest.raises(RecipeError, match=r"cannot run.*portable"):
        runtime.available()
    monkeypatch.setenv("PRUNUS_ISA", "portable")
    monkeypatch.setenv("PRUNUS_THREADS", "0")
    with pytest.raises(RecipeError, match="PRUNUS_THREADS"):
        runtime.available()
    monkeypatch.setenv("PRUNUS_THREADS", "3")
    assert runtime.describe() == "portable kernels, 3 threads"
