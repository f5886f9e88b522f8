"""llama.cpp, through the package llama-cpp-python, on the same weights with the zeros in place."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from prunus.errors import PrunusError


class Llama:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        threads = int(os.environ["PRUNUS_THREADS"])
        try:
            self.model: Any = llama_cpp.Llama(
                str(file), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False
            )
        except (ValueError, AssertionError) as problem:
            raise PrunusError(f"llama.cpp cannot load {file.name}: {problem}") from None
        # Its embedding is dequantised row by row; as a tied head it is read whole, so the file is an upper bound.
        self.file_bytes = self.bytes_per_token = file.stat().st_size

    def prefill(self, ids: list[int]) -> float:
        """See `Runner.prefill`."""
        self.model.reset()
        begun = time.perf_counter()
        self.model.eval(ids)
        return time.perf_counter() - begun

    def decode(self, ids: list[int], tokens: int) -> float:
        """See `Runner.decode`; the tokens are given, so that no sampler of its own is timed."""
        self.model.reset()
        self.model.eval(ids)
        begun = time.perf_counter()
        for number in range(tokens):
            self.model.eval([ids[number % len(ids)]])
        return (time.perf_counter() - begun) / tokens


def open(folder: Path, variant: str) -> Llama:
    """`folder` holds the files that `prepare` wrote; `variant` is one of them."""
    return Llama(folder / f"model-{variant}.gguf")


def prepare(source: Path, folder: Path, variants: list[str]) -> None:
    """Write one GGUF file for each variant: f16 from the model's folder, the others by llama.cpp's own quantiser.

    Raises:
        PrunusError: GGUF cannot carry the model, or llama.cpp cannot quantise it.
    """
    import ctypes

    import llama_cpp  # pyright: ignore[reportMissingImports]

    from prunus.formats import FORMATS, Settings

    FORMATS["gguf"].write(source, folder / "model-f16.gguf", Settings(type="f16"))
    kinds = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
    for variant in variants:
        if variant == "f16":
            continue
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype, how.nthread = kinds[variant], 1
        read, made = (str(folder / f"model-{name}.gguf").encode() for name in ("f16", variant))
        if llama_cpp.llama_model_quantize(read, made, ctypes.byref(how)):
            raise PrunusError(f"llama.cpp could not quantise the model to {variant}.")
