"""The errors that are a user's to mend: each says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PrunusError(Exception):
    """A mistake in what was asked or given; the command line prints it as one sentence and exits with 2."""


class RecipeError(PrunusError):
    """What was asked cannot be done: an unknown name, a value out of range, parts that do not fit."""


class ModelError(PrunusError):
    """The model cannot be read, or is of a kind that cannot be pruned safely."""


class CalibrationError(PrunusError):
    """The calibration or evaluation text is missing, too short, or not text."""


class FormatError(PrunusError):
    """A file does not hold what its format promises."""


def guess(name: str, known: Iterable[str]) -> str:
    """The nearest known names as a question that begins with a space; empty if none is near."""
    matches = get_close_matches(name, sorted(known), n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def near(name: str, known: Iterable[str]) -> str:
    """The end of an "unknown name" message: the nearest known names, then all of them.

    Args:
        name: what the user wrote.
        known: the names that would have been right.

    Returns:
        A sentence that begins with a space, such as `` Did you mean 'wanda'? Known: magnitude, wanda.``
    """
    known = sorted(known)
    return f"{guess(name, known)} Known: {', '.join(known)}."
