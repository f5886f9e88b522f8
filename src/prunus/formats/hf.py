"""`--format hf`: a Hugging Face folder."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from prunus.errors import FormatError, ModelError, RecipeError
from prunus.formats.format import Settings

if TYPE_CHECKING:
    from prunus.shapes.folder import Shapes
    from prunus.shapes.stock import Stock


@dataclass(frozen=True)
class HuggingFace:
    """A folder for transformers: of a stock class where one fits, else with a small modelling file inside."""

    line: str = "a Hugging Face folder, for transformers and what builds on it"
    suffix: str | None = None
    types: tuple[str, ...] = ()
    portable: bool = True

    def write(self, source: Path, out: Path, settings: Settings) -> dict[str, Any]:
        """See `Format.write`."""
        from prunus.formats.check import probe, runnable
        from prunus.recovery.masks import FILE as MASKS
        from prunus.verify import verify

        shapes = _shapes(source)
        # Links are followed: the hub's cache is made of them.
        shutil.copytree(source, out, ignore=shutil.ignore_patterns(".*"))
        notes, kind = ([], "float32") if shapes is None else _settle(shapes, out, settings.portable)
        if _layout(out) != _layout(source):
            (out / MASKS).unlink(missing_ok=True)  # it speaks of other matrices; recovery reads the zeros instead
        trusted = settings.trust_remote_code or not _stock(out)
        with TemporaryDirectory(dir=out.parent) as scratch:
            file = Path(scratch) / "probe.safetensors"
            found = probe(runnable(source, shapes, Path(scratch)), file, settings.trust_remote_code)
            checked = verify(out, file, kind, "cpu", trusted)
        lost = [name for name in checked["unexpected"] if name.endswith(".bias")]
        if lost:
            raise FormatError(
                f"Loading the export would drop {len(lost)} biases, first {lost[0]}. Nothing was written."
            )
        name = _architecture(out)
        line = f"reloaded in a fresh process, largest difference of a logit {checked['max_difference']:.2g}"
        trust = "" if _stock(out) else ", trust_remote_code=True"
        use = f'transformers.AutoModelForCausalLM.from_pretrained("OUT"{trust})'
        return {
            "holds": f"{name}, {_weights(out):,} numbers", "class": name, "stock": _stock(out), "use": use,
            "check": {"line": line, **checked}, "notes": notes, "parameters": found["parameters"],
        }  # fmt: skip


def _layout(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors on disk."""
    from prunus.models.checkpoint import Checkpoint

    return {name: tuple(stored.shape) for name, stored in Checkpoint.open(folder).tensors.items()}


def _shapes(source: Path) -> Shapes | None:
    """The sizes of all blocks; None for models of several towers, which nothing here has narrowed."""
    from prunus.models.discover import find_blocks
    from prunus.models.skeleton import skeleton
    from prunus.shapes.folder import read_shapes

    try:
        return read_shapes(source)
    except ModelError:
        find_blocks(skeleton(source))
        return None


def _settle(shapes: Shapes, out: Path, portable: bool) -> tuple[list[str], str]:
    """Make `out` load; returns what the user should know, and the dtype in which it computes what the source does."""
    from prunus.shapes.multiply import multiply_folder

    if not (shapes.ranks and portable):
        return _describe(shapes, out, portable), "float32"
    before = _weights(out)
    multiplied, kind = multiply_folder(out, shapes)
    after = _weights(out)
    note = (
        f"The two factors of {len(shapes.ranks)} matrices were multiplied: {after / before - 1:.1%} more numbers "
        f"({before:,} -> {after:,}), no more speed than the dense model"
    )
    rounding = "" if kind.itemsize >= 4 else f", and products are rounded to {str(kind).removeprefix('torch.')}"
    return [note + rounding + ".", *_describe(multiplied, out, portable)], str(kind).removeprefix("torch.")


def _describe(shapes: Shapes, out: Path, portable: bool) -> list[str]:
    """Make config.json fit the tensors in `out`; returns what the user should know."""
    from prunus.shapes.stock import find_stock
    from prunus.shapes.write import add_zeros, own_class, write_config

    if shapes.plain:
        write_config(out, shapes.written)
        return []
    reason = "blocks differ in their widths"
    if shapes.uniform:
        try:
            stock = find_stock(shapes, shapes.common or {})
            write_config(out, stock.config)
            add_zeros(out, shapes, stock)
            return _notes(stock)
        except FormatError as problem:
            reason = str(problem)
    if portable:
        return _padded(shapes, out)
    write_config(out, own_class(shapes))
    if shapes.ranks:
        return [
            f"{len(shapes.ranks)} matrices are products of two, which no stock class holds, so a small modelling file "
            "lies in the folder: transformers loads it with trust_remote_code=True, prunus.load without. --portable "
            "multiplies them back: a stock class of the dense model's size."
        ]
    return [
        f"No stock class fits ({reason}), so a small modelling file lies in the folder: transformers loads it with "
        "trust_remote_code=True, prunus.load without. --portable writes a stock class instead, where one can hold it; "
        "--format gguf carries unequal blocks of Llama-like models."
    ]


def _padded(shapes: Shapes, out: Path) -> list[str]:
    """Fill the blocks in `out` up to one width."""
    from prunus.shapes.pad import pad_folder, pad_to_stock
    from prunus.shapes.write import add_zeros, write_config

    before = _weights(out)
    try:
        stock, widths = pad_to_stock(shapes)
    except FormatError as reason:
        raise RecipeError(
            f"--portable: no stock class holds this model ({reason}). What would: --format hf without --portable, "
            "whose modelling file costs trust_remote_code=True and every tool that knows stock classes only; --format "
            "gguf for Llama-like models; or pruning again to equal widths, without bias compensation."
        ) from reason
    pad_folder(out, shapes, widths)
    write_config(out, stock.config)
    add_zeros(out, shapes, stock)
    after = _weights(out)
    return [
        *_notes(stock),
        f"The blocks differ in width, so narrower ones were filled up with zeros: {after / before - 1:.1%} more "
        f"numbers than the model needs ({before:,} -> {after:,}), and no more speed than its widest block allows.",
    ]


def _notes(stock: Stock) -> list[str]:
    notes = []
    if stock.relabelled:
        notes.append(
            f"The model is called {stock.config['model_type']} now instead of {stock.relabelled}: the same function, "
            "whose class allows this shape."
        )
    if stock.zeros:
        count = sum(math.prod(shape) for shape in stock.zeros.values())
        notes.append(f"The class has biases that the model does not; {count:,} zeros stand there.")
    return notes


def _stock(folder: Path) -> bool:
    from prunus.models.modelling import ours

    return not ours(folder)


def _architecture(folder: Path) -> str:
    from prunus.models.source import read_config

    return (read_config(folder).get("architectures") or ["?"])[0]


def _weights(folder: Path) -> int:
    from prunus.models.checkpoint import Checkpoint

    return sum(math.prod(stored.shape) for stored in Checkpoint.open(folder).tensors.values())
