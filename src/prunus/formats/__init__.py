"""What `prunus export` can write: one row here, one file beside it."""

from __future__ import annotations

from prunus.formats.dense import Dense
from prunus.formats.format import Format, Settings
from prunus.formats.hf import HuggingFace
from prunus.formats.packed import Packed

FORMATS: dict[str, Format] = {
    "hf": HuggingFace(),
    "packed": Packed(),
    "dense": Dense(),
}

__all__ = ["FORMATS", "Format", "Settings"]
