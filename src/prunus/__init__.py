"""Prune Hugging Face language models, one block at a time, on any machine.

The public names are those of `__all__`; everything else may change. They are loaded when first used, so that
`import prunus` and `prunus --help` do not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.api import catalogue, evaluate, export, inspect, load, plan, prune, run
    from prunus.decoding.dola.generate import dola_generate
    from prunus.errors import CalibrationError, FormatError, ModelError, PrunusError, RecipeError
    from prunus.recipe import Recipe, load_recipe

__version__ = "0.1.0"

_PLACES = {
    **dict.fromkeys(("catalogue", "evaluate", "export", "inspect", "load", "plan", "prune", "run"), "prunus.api"),
    "dola_generate": "prunus.decoding.dola.generate",
    **dict.fromkeys(("Recipe", "load_recipe"), "prunus.recipe"),
    **dict.fromkeys(("PrunusError", "RecipeError", "ModelError", "CalibrationError", "FormatError"), "prunus.errors"),
}

__all__ = [
    "CalibrationError",
    "FormatError",
    "ModelError",
    "PrunusError",
    "Recipe",
    "RecipeError",
    "__version__",
    "catalogue",
    "dola_generate",
    "evaluate",
    "export",
    "inspect",
    "load",
    "load_recipe",
    "plan",
    "prune",
    "run",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name not in _PLACES:
        raise AttributeError(f"module 'prunus' has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
