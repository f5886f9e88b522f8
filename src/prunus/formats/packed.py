"""`--format packed`: what was kept, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.errors import FormatError, RecipeError
from prunus.formats.format import Settings


@dataclass(frozen=True)
class Packed:
    """A folder that is smaller by what was pruned, for `prunus generate`, `prunus bench` and `prunus.load`."""

    line: str = "bitmaps and kept values, smaller by what was pruned; prunus runs it"
    suffix: str | None = None
    types: tuple[str, ...] = ("lossless", "bf16", "int8", "int4")
    portable: bool = False

    def write(self, source: Path, out: Path, settings: Settings) -> dict[str, Any]:
        """See `Format.write`."""
        from prunus.models.source import is_packed
        from prunus.packed.folder import PackedFolder
        from prunus.packed.writing import write

        if is_packed(source):
            raise RecipeError(f"{source} is packed already. Export it with --format dense first.")
        values = settings.type or "lossless"
        notes = write(source, out, values, settings.trust_remote_code)
        packed = PackedFolder.open(out)
        found = compare(source, packed)
        if not found["weights"]:
            notes.append("No matrix of this model has zeros worth leaving out; prune it first, or take --values int8.")
        return {
            "holds": f"{found['matrices']} matrices as {values}, {found['bytes_per_weight']:.3f} bytes per weight",
            "values": values, "notes": notes,
            "check": {"line": f"read back; {_difference(found)}", **found},
            "use": f"prunus generate {out.name.removeprefix('.').removesuffix('.prunus-export')} --prompt TEXT",
        }  # fmt: skip


def compare(source: Path, packed: Any) -> dict[str, Any]:
    """Read the packed folder back, tensor by tensor, beside what it was made of.

    Returns:
        `matrices` and `weights` packed, `bytes_per_weight` of those, `relative_error` (largest of a tensor, squared
        norm of the difference over that of the tensor, rooted), `exact` (every value of every tensor equal).

    Raises:
        FormatError: what was written is not what was meant.
    """
    from prunus.models.checkpoint import Checkpoint
    from prunus.packed.folder import to_dense
    from prunus.packed.matrix import PackedMatrix

    matrices = weights = size = 0
    worst, exact = 0.0, True
    checkpoint = Checkpoint.open(source)
    for name, original in checkpoint.read(checkpoint.tensors):
        found = packed.read(name)
        if isinstance(found, PackedMatrix):
            matrices, weights, size = matrices + 1, weights + original.numel(), size + found.bytes
        back = to_dense(found, packed.entries[name])
        if torch.equal(back, original):
            continue
        exact = False
        error = float((back.float() - original.float()).norm() / original.float().norm())
        worst = max(worst, error)
        if packed.values == "lossless" or not error < 0.5:
            raise FormatError(f"{name} reads back with a relative error of {error:.2g}; please report this model.")
    return {
        "matrices": matrices, "weights": weights, "bytes_per_weight": size / weights if weights else 0.0,
        "relative_error": worst, "exact": exact,
    }  # fmt: skip


def _difference(found: dict[str, Any]) -> str:
    if found["exact"]:
        return "every value is the same"
    return f"largest relative error of a tensor {found['relative_error']:.2g}"
