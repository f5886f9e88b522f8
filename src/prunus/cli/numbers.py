"""Numbers as a user types them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunus.errors import RecipeError


def numbers(given: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """`{"top_k": "5"}` -> `{"top_k": 5}`.

    Args:
        given: option -> what was typed.
        kinds: option -> int or float; an option that it lacks is left as it is.

    Raises:
        RecipeError: something that is no number.
    """
    read = {}
    for name, value in given.items():
        kind = kinds.get(name, str)
        try:
            read[name] = kind(value)
        except ValueError as problem:
            wanted = "a whole number" if kind is int else "a number"
            raise RecipeError(f"--{name.replace('_', '-')} takes {wanted}, not {value!r}.") from problem
    return read
