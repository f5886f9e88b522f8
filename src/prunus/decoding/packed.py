"""The engine `packed`: the compiled runtime, on packed folders and, packed on the fly, on ordinary ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunus.errors import PrunusError, RecipeError
from prunus.models.source import check_folder

# Share of zeros among the weights that were pruned from which on the packed engine is taken without being asked for.
WORTH = 0.4


def suits(folder: Path, *, device: str, dtype: str) -> bool:
    """Whether an ordinary folder is one that prunus made sparse and that the kernels can run here.

    Args:
        folder: of the model.
        device: asked for.
        dtype: asked for.
    """
    from prunus.packed.running import uncovered
    from prunus.runtime.native import available

    if device != "cpu" or dtype not in ("auto", "float32") or _sparsity(folder) < WORTH:
        return False
    try:
        return available() is not None and uncovered(folder) is None
    except PrunusError:
        return False  # the engine that is taken instead says what is wrong with the folder


def _sparsity(folder: Path) -> float:
    """Share of zeros in the matrices that were pruned, as the record beside them says; 0 without one."""
    try:
        found = json.loads((folder / "prunus.json").read_text("utf-8"))["result"]
        if "matrix_weights" in found:  # recovered since
            return float(found["zeros"]["after"] / found["matrix_weights"])
        return float(found["parameters"]["zeros"] / found["parameters"]["sites"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return 0.0


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
