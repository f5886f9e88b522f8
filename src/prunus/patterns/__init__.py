"""Patterns: which masks are allowed. A new one is a file here and a row in `PATTERNS`."""

from __future__ import annotations

import re
from collections.abc import Callable

from prunus.errors import RecipeError
from prunus.patterns.capped import Capped
from prunus.patterns.nm import NM
from prunus.patterns.pattern import Pattern
from prunus.patterns.unstructured import Unstructured


def _unstructured(text: str) -> Pattern | None:
    """`unstructured` leaves the choice of row or matrix to the method."""
    return None


def _nm(text: str) -> Pattern:
    """`N:M` with N kept of every M."""
    n, m = map(int, text.split(":"))
    if n > m > 0:
        raise RecipeError(f"Pattern {text!r} keeps {n} of every {m}: N:M names what stays first. Did you mean {m}:{n}?")
    return NM(n, m)


def _capped(text: str) -> Pattern:
    """`capped:K/M` with at most K kept of every M."""
    k, m = map(int, text.removeprefix("capped:").split("/"))
    return Capped(k, m)


# What the text looks like -> how it is read.
PATTERNS: dict[str, Callable[[str], Pattern | None]] = {
    r"unstructured": _unstructured,
    r"\d+:\d+": _nm,
    r"capped:\d+/\d+": _capped,
}


def parse(text: str) -> Pattern | None:
    """A pattern from a recipe; None where the method's own one is to stay.

    Args:
        text: `unstructured`, `N:M` with N kept of every M consecutive inputs, or `capped:K/M` with at most K.

    Raises:
        RecipeError: if it is none of them, or not 1 <= N < M.
    """
    for form, read in PATTERNS.items():
        if re.fullmatch(form, text.strip(), flags=re.ASCII):
            return read(text.strip())
    raise RecipeError(
        f"Pattern {text!r} is not known. Write unstructured, or N:M in whole numbers with N kept of every M, such as"
        " 2:4 or 4:8, or capped:K/M with at most K kept of every M, such as capped:6/16."
    )


__all__ = ["NM", "PATTERNS", "Capped", "Pattern", "Unstructured", "parse"]
