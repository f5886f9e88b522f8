"""What a checkpoint weighs on disk."""

from __future__ import annotations

from pathlib import Path


def weight_bytes(folder: Path) -> int:
    """Bytes of all safetensors files of a model folder; zeros in ordinary tensors weigh as much as any number."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
