"""What can run on this machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import prunus
from prunus import memory
from prunus.runtime.native import available, describe, runnable

# Optional package -> what it is for.
EXTRAS = {
    "llama-cpp-python": "baselines of bench: pip install 'prunus[llama]'",
    "datasets": "texts of the hub: pip install 'prunus[data]'",
    "pyarrow": "parquet files: pip install 'prunus[data]'",
}


def doctor() -> dict[str, Any]:
    """`kernels` (in words), `isa`, `runnable`, `threads`, `processors`, `memory_bytes`, `versions`, `extras`.

    Raises:
        RecipeError: PRUNUS_ISA or PRUNUS_THREADS cannot be used here.
    """
    native = available()
    packages = ("torch", "transformers", "safetensors", "tokenizers")
    return {
        "kernels": describe(),
        "isa": native.isa if native else None,
        "runnable": runnable(),
        "threads": native.threads if native else None,
        "processors": os.cpu_count(),
        "memory_bytes": memory.available(),
        "versions": {
            "prunus": prunus.__version__,
            "python": platform.python_version(),
            **{name: _version(name) or "missing" for name in packages},
        },
        "extras": {name: {"version": _version(name), "for": purpose} for name, purpose in EXTRAS.items()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
