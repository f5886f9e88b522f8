"""llama.cpp, through the package llama-cpp-python, on the same weights with the zeros in place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from prunus.errors import PrunusError
from prunus.formats.llama_model import leave_unpacked

# Variant -> the constant of llama.cpp that asks for it.
TYPES = {
    "q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
    "q3_k": "LLAMA_FTYPE_MOSTLY_Q3_K_M",
    "q2_k": "LLAMA_FTYPE_MOSTLY_Q2_K",
}
SUPER = 256  # weights of a row that the types of this name share scales among; other rows are stored in other types
CONTEXT = 2048  # positions, unless the texts are longer


class Llama:
    """A GGUF file in llama.cpp, which repacks quantised weights for the processor's instructions if it may."""

    def __init__(self, file: Path, *, repack: bool) -> None:
        import llama_cpp  # pyright: ignore[reportMissingImports]

        threads, positions = int(os.environ["PRUNUS_THREADS"]), int(os.environ["PRUNUS_POSITIONS"])
        if not repack:
            leave_unpacked(llama_cpp)
        try:
            self.model: Any = llama_cpp.Llama(
                str(file), n_ctx=max(CONTEXT, positions), n_threads=threads, n_threads_batch=threads, verbose=False
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
    """`folder` holds the files that `prepare` wrote; `variant` is one of them, `q8_0 plain` the same not repacked."""
    kind, _, plain = variant.partition(" ")
    return Llama(folder / f"model-{kind}.gguf", repack=not plain)


def prepare(source: Path, folder: Path, variant: str) -> str:
    """Write the GGUF file of a variant: f16 from the model's folder, the others from it by llama.cpp's own quantiser.

    Returns:
        What is to be said of the file, empty if it is what its name says.

    Raises:
        PrunusError: GGUF cannot carry the model, or llama.cpp cannot quantise it.
    """
    full, file = (folder / f"model-{name}.gguf" for name in ("f16", variant))
    note = _full(source, full)
    if variant != "f16":
        # In a process of its own: it writes pages to the terminal, and a fault would end ours.
        command = [sys.executable, "-P", "-m", "prunus.bench.llama", str(full), str(file), variant]
        if subprocess.run(command, capture_output=True, check=False).returncode or not file.exists():
            raise PrunusError(f"llama.cpp could not quantise the model to {variant}.")
    return "; ".join(filter(None, (note, _fallbacks(file) if variant.endswith("_k") else "")))


def _full(source: Path, file: Path) -> str:
    """Write the f16 file, once; returns what is to be said of it and of whatever is made of it.

    For a measurement of speed a file serves from which llama.cpp computes other logits, as long as that is said: it
    holds the model's weights, and 16-bit arithmetic may be all there is to it.
    """
    from prunus.formats import FORMATS, Settings
    from prunus.formats.gguf_check import OtherLogits

    told, part = file.with_suffix(".note"), file.with_name("part.gguf")
    if not file.exists():
        try:
            FORMATS["gguf"].write(source, part, Settings(type="f16"))
        except OtherLogits as problem:
            told.write_text(problem.what, encoding="utf-8")
        part.replace(file)  # only when it is whole: the other variants are made of it
    return told.read_text("utf-8") if told.exists() else ""


def _fallbacks(file: Path) -> str:
    """Which matrices of a file of k-quants are of other types, because their rows are no multiple of `SUPER`."""
    from gguf import GGUFReader

    kinds = [
        (tensor.tensor_type.name, int(tensor.shape[0])) for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1
    ]
    others = Counter(kind for kind, columns in kinds if columns % SUPER)
    if not others:
        return ""
    types = ", ".join(f"{count} {kind}" for kind, count in others.most_common())
    return (
        f"{others.total()} of {len(kinds)} matrices have rows that are no multiple of {SUPER}, and llama.cpp stored "
        f"them in larger types instead ({types})"
    )


def main() -> int:
    """Quantise: FILE OUT VARIANT."""
    import ctypes

    import llama_cpp  # pyright: ignore[reportMissingImports]

    source, out, variant = sys.argv[1:]
    how: Any = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.nthread = getattr(llama_cpp, TYPES[variant]), 1
    quantise: Any = llama_cpp.llama_model_quantize
    return quantise(source.encode(), out.encode(), ctypes.byref(how))


if __name__ == "__main__":
    sys.exit(main())
