"""What `prunus export` can write: one row here, one file beside it."""

from __future__ import annotations

from prunus.formats.dense import Dense
from prunus.formats.format import Format, Settings
from prunus.formats.gguf import GGUF
from prunus.formats.hf import HuggingFace
from prunus.formats.packed import Packed

FORMATS: dict[str, Format] = {
    "hf": HuggingFace(),
    "gguf": GGUF(),
    "packed": Packed(),
    "dense": Dense(),
}

__all__ = ["FORMATS", "Format", "Settings"]
