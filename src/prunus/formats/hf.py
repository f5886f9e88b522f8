"""`--format hf`: a Hugging Face folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prunus.errors import RecipeError
from prunus.formats.format import Settings
from prunus.models.source import read_config


@dataclass(frozen=True)
class HuggingFace:
    """A folder for transformers: of a stock class where one fits, else with a small modelling file inside."""

    line: str = "a Hugging Face folder, for transformers and what builds on it"
    suffix: str | None = None
    types: tuple[str, ...] = ()
    portable: bool = True

    def write(self, source: Path, out: Path, settings: Settings) -> dict[str, Any]:
        """See `Format.write`."""
        from prunus.formats.check import probe
        from prunus.verify import verify

        if "auto_map" in read_config(source) and settings.portable:
            raise RecipeError(f"{source} has code of its own, so no stock class is known to fit it.")
        shutil.copytree(source, out)
        with TemporaryDirectory(dir=out.parent) as scratch:
            file = Path(scratch) / "probe.safetensors"
            found = probe(source, file, settings.trust_remote_code)
            checked = verify(out, file, "float32", "cpu", settings.trust_remote_code)
        holds = f"{found['class']}, {found['parameters']:,} parameters"
        line = f"reloaded by stock transformers, largest difference of a logit {checked['max_difference']:.2g}"
        return {"holds": holds, "check": {"line": line, **checked}, "notes": []}
