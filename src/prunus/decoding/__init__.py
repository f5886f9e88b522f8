"""Text from a model, token by token.

An engine is what computes the tokens. A new one is a module with a function `load` and one row of `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from prunus.errors import RecipeError, near

if TYPE_CHECKING:
    from prunus.decoding.dola.options import Dola
    from prunus.decoding.sampling import Sampling

# Name -> module; imported when chosen, because most need PyTorch.
ENGINES: dict[str, str] = {
    "transformers": "prunus.decoding.stock",
    "packed": "prunus.decoding.packed",
}


class Engine(Protocol):
    """A model that is loaded and can continue a text."""

    def stream(self, ids: Sequence[int], how: Sampling) -> Iterator[int]:
        """The ids that follow `ids`, one by one, each as soon as it is known; an end-of-text token is not given out.

        Args:
            ids: the prompt, at least one token, special tokens included.
            how: at most `how.max_new_tokens` ids are given.

        Raises:
            RecipeError: for a way of choosing tokens that this engine lacks.
        """
        ...


@runtime_checkable
class Contrasting(Protocol):
    """An engine that can also contrast layers; one that cannot simply lacks the method."""

    def contrast(self, ids: Sequence[int], how: Sampling, dola: Dola) -> Iterator[tuple[int, int]]:
        """As `Engine.stream`, each id with the premature layer that it was contrasted with."""
        ...


class EngineModule(Protocol):
    """What a module named in `ENGINES` provides."""

    def check(self, folder: Path, *, trust_remote_code: bool) -> None:
        """Refuse a folder that this engine cannot read, without reading weights.

        Raises:
            PrunusError: with what is missing and what to do.
        """
        ...

    def load(self, folder: Path, *, device: str, dtype: str, trust_remote_code: bool) -> Engine:
        """The model in `folder`, ready to continue texts.

        Raises:
            PrunusError: a folder that this engine cannot read, or a device or dtype that it cannot use.
        """
        ...


def find_engine(name: str) -> EngineModule:
    """The engine's module.

    Raises:
        RecipeError: an unknown name, with the nearest.
    """
    if name not in ENGINES:
        raise RecipeError(f"Unknown engine {name!r}.{near(name, ENGINES)}")
    return cast(EngineModule, import_module(ENGINES[name]))
