"""The engine `packed`: the compiled runtime, on packed folders and, packed on the fly, on ordinary ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunus.errors import RecipeError
from prunus.models.source import check_folder


def check(folder: Path, *, trust_remote_code: bool) -> None:
    """See `EngineModule.check`."""
    check_folder(folder, trust_remote_code=trust_remote_code)


def load(folder: Path, *, device: str, dtype: str, trust_remote_code: bool) -> Any:
    """See `EngineModule.load`."""
    from prunus.decoding.stock import Stock
    from prunus.models.source import is_packed
    from prunus.packed.model import load as load_packed
    from prunus.packed.running import PackedModel, open_model
    from prunus.runtime.native import require

    if device != "cpu" or dtype not in ("auto", "float32"):
        raise RecipeError(
            f"The packed engine runs on the CPU in float32, not on {device} in {dtype}; leave both out, or take "
            "--engine transformers."
        )
    if not is_packed(folder):
        require()
        return open_model(folder)
    model = load_packed(folder)
    return model if isinstance(model, PackedModel) else Stock(model)
