"""`--format dense`: a packed folder, as the Hugging Face folder that it was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.errors import RecipeError
from prunus.formats.format import Settings

SHARD = 1 << 30  # bytes collected before a file is written


@dataclass(frozen=True)
class Dense:
    """The Hugging Face folder that a packed one was made of; every bit of it, if the values were kept exactly.

    With the orders of columns that pruning found: packed again, it is what it was.
    """

    line: str = "the Hugging Face folder that a packed one was made of"
    suffix: str | None = None
    types: tuple[str, ...] = ()
    portable: bool = False

    def write(self, source: Path, out: Path, settings: Settings) -> dict[str, Any]:
        """See `Format.write`."""
        from prunus.models.checkpoint import INDEX, Checkpoint
        from prunus.models.source import is_packed
        from prunus.output import ORDERS
        from prunus.packed.folder import PackedFolder
        from prunus.packed.writing import copy_files, save_readable

        if not is_packed(source):
            raise RecipeError(f"{source} is not packed; --format dense restores what --format packed wrote.")
        packed = PackedFolder.open(source)
        out.mkdir(parents=True)
        where: dict[str, str] = {}
        waiting: dict[str, Tensor] = {}

        def flush() -> None:
            file = f"model-{len(set(where.values())) + 1:05d}.safetensors"
            save_readable(waiting, out / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(waiting, file))
            waiting.clear()

        for name in packed.entries:
            waiting[name] = packed.dense(name).contiguous()
            if sum(tensor.nbytes for tensor in waiting.values()) > SHARD:
                flush()
        if waiting:
            flush()
        copy_files(source, out, packed=False)
        orders = packed.orders()
        if orders:
            save_readable(orders, out / ORDERS)
        total = sum(Checkpoint.of_shard(out / file).bytes for file in sorted(set(where.values())))
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        found = Checkpoint.open(out)
        lost = {"int8", "int4"} & {packed.values}
        return {
            "holds": f"{len(found.tensors)} tensors, {found.bytes:,} bytes",
            "check": {"line": "every checksum of the packed folder held, and the headers of the new one do"},
            "notes": [f"The packed values were {packed.values}: rounded, and so are these."] if lost else [],
        }
