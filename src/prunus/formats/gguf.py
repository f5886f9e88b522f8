"""`--format gguf`: one file for llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from prunus.formats.format import Settings

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from prunus.formats.gguf_layout import Layout

NEAREST = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f32"}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # llama.cpp's own numbers
BLOCK = 32  # q8_0 shares one scale among so many weights of a row


@dataclass(frozen=True)
class GGUF:
    """A file for llama.cpp: arch `llama` for one size throughout, `deci` for blocks of unequal widths."""

    line: str = "one file for llama.cpp and what builds on it"
    suffix: str | None = ".gguf"
    types: tuple[str, ...] = tuple(FILE_TYPES)
    portable: bool = False

    def write(self, source: Path, out: Path, settings: Settings) -> dict[str, Any]:
        """See `Format.write`."""
        from prunus.formats.check import probe, runnable
        from prunus.formats.gguf_check import check
        from prunus.formats.gguf_layout import lay_out
        from prunus.formats.gguf_tokens import vocabulary
        from prunus.shapes.folder import read_shapes

        shapes = read_shapes(source)
        layout = lay_out(shapes)
        words = vocabulary(source, shapes.config)
        kind = settings.type or NEAREST[str(layout.stored).removeprefix("torch.")]
        fallbacks = _write(out, layout, words, kind, source.name)
        with TemporaryDirectory(dir=out.parent) as scratch:
            reference = runnable(source, shapes, Path(scratch))
            file = Path(scratch) / "probe.safetensors"
            found = probe(reference, file, settings.trust_remote_code)
            checked = check(out, layout, reference, file, kind)
        notes = [*layout.notes, *checked.pop("notes")]
        if fallbacks:
            notes.append(
                f"{len(fallbacks)} matrices, such as {fallbacks[0]}, have rows that are no multiple of {BLOCK} and "
                "are stored as f16. `--round-to 32` when pruning avoids that."
            )
        return {
            "holds": f"arch {layout.arch}, {len(layout.tensors)} tensors as {kind}", "arch": layout.arch, "type": kind,
            "parameters": found["parameters"], "check": checked, "notes": notes, "use": "llama-cli -m OUT",
        }  # fmt: skip


def _write(out: Path, layout: Layout, words: Callable[[Any], None], kind: str, name: str) -> list[str]:
    """Write the file, one tensor in memory at a time; returns the tensors that had to be stored in another type."""
    from gguf import GGUFEndian, GGUFWriter

    writer = GGUFWriter(None, layout.arch, endianess=GGUFEndian.LITTLE)
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)
    for key, value in layout.keys.items():
        _add(writer, key.format(arch=layout.arch), value)
    words(writer)
    fallbacks = []
    for tensor in layout.tensors:
        stored = stored_type(tensor.name, tensor.shape, kind)
        if stored != kind and len(tensor.shape) > 1 and stored == "f16":
            fallbacks.append(tensor.name)
        _announce(writer, tensor.name, tensor.shape, stored)
    writer.write_header_to_file(out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, data in _data(layout, kind):
        writer.write_tensor_data(data)
        assert tensor
    writer.close()
    return fallbacks


def stored_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The type of one tensor: vectors and routers stay f32, which costs nothing and llama.cpp expects."""
    if len(shape) == 1 or "ffn_gate_inp" in name:
        return "f32"
    if kind == "q8_0" and shape[-1] % BLOCK:
        return "f16"
    return kind


def _announce(writer: Any, name: str, shape: tuple[int, ...], kind: str) -> None:
    import numpy
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    quantised = GGMLQuantizationType[kind.upper()]
    plain = {"f32": numpy.float32, "f16": numpy.float16}
    if kind in plain:
        width = numpy.dtype(plain[kind])
        count = 1
        for length in shape:
            count *= length
        writer.add_tensor_info(name, shape, width, count * width.itemsize)
        return
    stored = quant_shape_to_byte_shape(shape, quantised)
    size = 1
    for length in stored:
        size *= length
    writer.add_tensor_info(name, stored, numpy.dtype(numpy.uint8), size, raw_dtype=quantised)


def _data(layout: Layout, kind: str) -> Iterator[tuple[str, numpy.ndarray]]:
    for tensor in layout.tensors:
        yield tensor.name, encoded(tensor.read(), stored_type(tensor.name, tensor.shape, kind))


def encoded(value: Tensor, kind: str) -> numpy.ndarray:
    """The numbers of a tensor as they lie in the file."""
    import numpy
    from gguf import GGMLQuantizationType, quantize

    data = value.float().contiguous().numpy()
    if kind in ("f32", "f16"):
        return data.astype(numpy.float32 if kind == "f32" else numpy.float16)
    return quantize(data, GGMLQuantizationType[kind.upper()])


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint32(key, int(value))
