"""The compiled library, loaded once per process through ctypes, and the C structures that it shares with Python.

The library is one file beside this module, built by CMake when the package is installed where a C++ compiler is. Where
there is none, `available()` is None and `absence()` says why; everything else then runs on PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from prunus.errors import FormatError, PrunusError, RecipeError, near

LIBRARY = "libprunus_runtime.so"
ABI = 1
ISAS = ("portable", "avx2", "avx512", "neon")

# Status codes of csrc/matrix.h. What a damaged file can cause says so; the rest would be a mistake of ours.
MESSAGES = {
    -1: "an argument is out of range",
    -2: "the number of values or scales does not fit the bitmap and the shape",
    -3: "the bitmap has bits behind the last column",
    -4: "a scale is not a finite number",
    -5: "the column order is not a permutation of the columns",
    -6: "there is not enough memory",
    -7: "the layout needs instructions that this processor lacks",
    -8: "the context is full",
    -9: "a token is outside of the vocabulary",
    -10: "the shapes of the matrices do not fit together",
}


class PackedStruct(Structure):
    """`struct Packed` of csrc/matrix.h."""

    _fields_ = (
        ("rows", c_int64),
        ("columns", c_int64),
        ("kind", c_int32),
        ("bitmap", c_void_p),
        ("bitmap_bytes", c_int64),
        ("values", c_void_p),
        ("values_bytes", c_int64),
        ("scales", c_void_p),
        ("scales_count", c_int64),
        ("order", c_void_p),
        ("order_count", c_int64),
    )


MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
NORMS = ("attention_norm", "post_attention_norm", "mlp_norm", "post_mlp_norm", "q_norm", "k_norm")


class LayerStruct(Structure):
    """`struct LayerPlan` of csrc/decode.h."""

    _fields_ = (
        *((name, c_void_p) for name in MATRICES),
        *((f"{name}_bias", c_void_p) for name in MATRICES),
        *((name, c_void_p) for name in NORMS),
        ("cos", c_void_p),
        ("sin", c_void_p),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "rotary", "window")),
        *((name, c_float) for name in ("norm_eps", "qk_eps", "scale", "softcap")),
        ("activation", c_int32),
        ("reserved", c_int32),
    )


class ModelStruct(Structure):
    """`struct ModelPlan` of csrc/decode.h."""

    _fields_ = (
        ("layers", POINTER(LayerStruct)),
        *((name, c_int64) for name in ("layer_count", "hidden", "vocabulary", "context")),
        ("embedding", c_void_p),
        ("head", c_void_p),
        ("norm", c_void_p),
        ("head_bias", c_void_p),
        *((name, c_float) for name in ("norm_eps", "embedding_scale", "logit_softcap", "reserved")),
    )


SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "prunus_abi": (c_int32, ()),
    "prunus_open": (c_void_p, (c_char_p, c_int32)),
    "prunus_isa": (c_char_p, (c_void_p,)),
    "prunus_threads": (c_int32, (c_void_p,)),
    "prunus_expands": (c_int32, (c_void_p,)),
    "prunus_matrix": (c_int32, (POINTER(PackedStruct), c_int32, POINTER(c_void_p))),
    "prunus_dense": (c_int32, (POINTER(PackedStruct), POINTER(c_void_p))),
    "prunus_matrix_free": (None, (c_void_p,)),
    "prunus_matrix_bytes": (c_int64, (c_void_p,)),
    "prunus_matrix_slots": (c_int32, (c_void_p,)),
    "prunus_multiply": (c_int32, (c_void_p, c_void_p, c_void_p, c_int64, c_void_p)),
    "prunus_decode": (c_int32, (c_void_p, c_int64, c_void_p)),
    "prunus_model": (c_int32, (c_void_p, POINTER(ModelStruct), POINTER(c_void_p))),
    "prunus_model_free": (None, (c_void_p,)),
    "prunus_step": (c_int32, (c_void_p, c_int64, c_void_p)),
    "prunus_prefill": (c_int32, (c_void_p, c_void_p, c_int64, c_void_p, c_int32)),
    "prunus_crossover": (c_double, (c_void_p,)),
    "prunus_rewind": (c_int32, (c_void_p, c_int64)),
    "prunus_position": (c_int64, (c_void_p,)),
    "prunus_bytes_per_token": (c_int64, (c_void_p,)),
}


@dataclass(frozen=True)
class Native:
    """The loaded library with its thread pool.

    Attributes:
        library: the functions of `SIGNATURES`.
        handle: of the pool and the chosen kernels; lives as long as the process.
        isa: instruction set that was chosen.
        threads: of the pool, the calling one included.
        process: that opened it; a child made by fork has no threads of the pool.
        expands: one instruction expands bytes by a bitmap, so quantised values may be read straight from bitmaps; else
            windows of 16 columns are always built from them.
    """

    library: ctypes.CDLL
    handle: int
    isa: str
    threads: int
    expands: bool
    process: int

    def check_process(self) -> None:
        """See that the pool's threads are there; without them a product would wait for ever.

        Raises:
            PrunusError: this process was forked from the one that opened the library.
        """
        if os.getpid() != self.process:
            raise PrunusError(
                "The model was loaded before this process was forked, and the engine's threads did not come along. "
                "Load it in this process, or start processes by 'spawn'."
            )

    def check(self, status: int, what: str) -> None:
        """Turn a status of the library into an error.

        Raises:
            FormatError: the status is not 0; `what` says of which matrix or model.
        """
        if status:
            raise FormatError(f"{what}: {MESSAGES.get(status, f'unknown status {status}')}.")


def available() -> Native | None:
    """The library with as many threads as this process may use, or None where it was not built.

    `PRUNUS_ISA` forces an instruction set (portable, avx2, avx512, neon), `PRUNUS_THREADS` the number of threads.

    Raises:
        RecipeError: one of the two variables is not usable here.
    """
    return open_native(os.environ.get("PRUNUS_ISA", ""), _threads())


@functools.cache
def open_native(isa: str, threads: int) -> Native | None:
    """The library with given kernels ("" = the fastest that this processor runs); a pool for each combination.

    Raises:
        RecipeError: unknown instruction set, one that this processor or this build lacks, or too many threads.
    """
    if isa and isa not in ISAS:
        raise RecipeError(f"PRUNUS_ISA={isa!r} is unknown.{near(isa, ISAS)}")
    library = _library()
    if isinstance(library, str):
        return None
    handle = library.prunus_open(isa.encode(), threads)
    if not handle:
        can = runnable()
        if isa and isa not in can:
            raise RecipeError(f"PRUNUS_ISA={isa!r} cannot run on this processor. It runs: {', '.join(can)}.")
        raise RecipeError(f"The machine does not give this process {threads} threads; set PRUNUS_THREADS to fewer.")
    name = library.prunus_isa(handle).decode()
    threads, expands = library.prunus_threads(handle), bool(library.prunus_expands(handle))
    return Native(library, handle, name, threads, expands, os.getpid())


def runnable() -> list[str]:
    """The instruction sets that this build has and this processor runs."""
    library = _library()
    if isinstance(library, str):
        return []
    found = []
    for isa in ISAS:
        handle = library.prunus_open(isa.encode(), 1)
        if handle:
            found.append(isa)
            library.prunus_close(c_void_p(handle))
    return found


def absence() -> str:
    """Why there is no library; empty if there is one."""
    library = _library()
    return library if isinstance(library, str) else ""


def describe() -> str:
    """What runs, in a few words: `avx512 kernels, 2 threads`, or why PyTorch does."""
    native = available()
    if native is None:
        return f"no compiled kernels ({absence()}); PyTorch runs instead"
    return f"{native.isa} kernels, {native.threads} thread{'s' if native.threads > 1 else ''}"


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library with typed functions, or the reason why there is none."""
    path = Path(__file__).parent / LIBRARY
    if not path.is_file():
        return "the package was installed without a C++ compiler; install GCC or Clang and install prunus again"
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as problem:
        return f"{path.name} cannot be loaded ({problem}); install prunus again"
    if library.prunus_abi() != ABI:
        return f"{path.name} is of another version of prunus; install prunus again"
    # Not in SIGNATURES: only `runnable` closes what it opened.
    library.prunus_close.restype, library.prunus_close.argtypes = None, (c_void_p,)
    # A child made by fork has no threads: it opens its own pool.
    os.register_at_fork(after_in_child=open_native.cache_clear)
    return library


def _threads() -> int:
    """`PRUNUS_THREADS`, else the processors that this process may use (SMT siblings counted once).

    Raises:
        RecipeError: not a whole number of at least 1.
    """
    asked = os.environ.get("PRUNUS_THREADS")
    if asked is None:
        return _processors()
    if not asked.isdecimal() or not 1 <= int(asked) <= 1024:
        raise RecipeError(f"PRUNUS_THREADS={asked!r} is not a number of threads; give 1 to 1024.")
    return int(asked)


@functools.cache
def _processors() -> int:
    """Physical cores that this process may use: two threads on one core would fight over its vector units."""
    try:
        usable = os.sched_getaffinity(0)
    except AttributeError:  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in usable:
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            siblings = str(cpu)
        cores.add(siblings.strip())
    return max(1, len(cores))


def require() -> Native:
    """`available()`, or an error for what only the compiled library can do.

    Raises:
        PrunusError: there is no library; the reason and the cure are given.
    """
    native = available()
    if native is None:
        raise PrunusError(f"The packed engine is not available: {absence()}.")
    return native
