"""Budgets that people think in: parameters or bytes of the result, as a share of the blocks' weights to remove.

A factor of speed is one too; `prunus.speedup` finds its share by timing, when the run has begun.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from prunus.errors import RecipeError
from prunus.methods.shape import Fixed, Shape
from prunus.models.skeleton import parameter_count
from prunus.models.weights import Weights
from prunus.sites import Block

if TYPE_CHECKING:
    from prunus.recipe import PrunePart

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_FORMS = {
    "--params": (re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMB]?)\s*", re.IGNORECASE), "100M or 1.2B"),
    "--size": (re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)B?\s*", re.IGNORECASE), "80MB or 1.5GB"),
}


def share(part: PrunePart, method: object, weights: Weights, blocks: Sequence[Block]) -> float:
    """The share of the weights of all blocks' matrices to remove: the sparsity, or what a budget amounts to.

    Args:
        part: what was asked.
        method: of the recipe.
        weights: of the dense model.
        blocks: its blocks with their matrices.

    Raises:
        RecipeError: the budget cannot be read or reached, says what can; or the method makes nothing smaller.
    """
    speedup = None if part.speedup is None else f"{part.speedup:g}"
    given = {"--params": part.params, "--size": part.size, "--speedup": speedup}
    wishes = {option: text for option, text in given.items() if text is not None}
    asked = "sparsity" in part.model_fields_set and part.sparsity != type(part).model_fields["sparsity"].default
    own = method.own_share([_size(block) for block in blocks]) if isinstance(method, Fixed) else None
    if own is not None:
        _refuse(part, wishes, asked and part.sparsity != own, own)
        return own
    if not wishes:
        return part.sparsity
    if len(wishes) + asked > 1:
        named = [*wishes, *(["--sparsity"] if asked else [])]
        raise RecipeError(f"{' and '.join(named)} are different budgets; give one.")
    ((option, text),) = wishes.items()
    if not isinstance(method, Shape):
        raise RecipeError(
            f"{option} needs a method that makes tensors smaller, and {part.method} only sets weights to zero. "
            "Use --sparsity, or a method such as flap, obs-sp or shortgpt."
        )
    if option == "--speedup":
        if not {*method.touches} <= {"heads", "neurons"}:
            raise RecipeError(
                f"--speedup is for methods that remove heads, neurons or blocks, such as flap or shortgpt. What "
                f"{part.method} removes does not make a token faster in a way that stand-ins show; use --sparsity, "
                "--params or --size."
            )
        return 0.0  # found by timing, once the work has begun: `prunus.speedup`
    wanted = number(option, text)
    if option == "--params":
        whole, inside = parameter_count(weights.model), sum(map(_size, blocks))
    else:
        whole, inside = weights.checkpoint.bytes, _bytes(weights, blocks)
    if not whole - inside < wanted <= whole:
        raise RecipeError(
            f"{option} {text} cannot be reached: the model has {_text(whole)}, of which {_text(inside)} lie in "
            f"matrices of its blocks, so ask for more than {_text(whole - inside)} and at most {_text(whole)}."
        )
    return (whole - wanted) / inside


def _refuse(part: PrunePart, wishes: Mapping[str, str], asked: bool, own: float) -> None:
    """See that no budget, nor a sparsity that was `asked` for, contradicts what the method's settings fix."""
    named = [f"{option} {text}" for option, text in wishes.items()] + asked * [f"--sparsity {part.sparsity:g}"]
    if named:
        raise RecipeError(
            f"{part.method} removes {own:.4g} of the blocks by its settings, whatever {named[0]} says. Leave that out, "
            "or use another method, such as shortgpt."
        )


def _size(block: Block) -> int:
    return sum(info.size for info in block.infos)


def number(option: str, text: str) -> int:
    """`100M` or `80MB` as a number.

    Raises:
        RecipeError: it is none.
    """
    form, example = _FORMS[option]
    match = form.fullmatch(text)
    if not match:
        raise RecipeError(f"{option} {text!r} is no number; write it as {example}.")
    return round(float(match[1]) * _UNITS[match[2].upper()])


def _bytes(weights: Weights, blocks: Sequence[Block]) -> int:
    """Of the matrices of all blocks, as they lie on disk."""
    own = {slot.parameter for block in blocks for slot in block.slots}
    stored = weights.checkpoint.tensors
    return sum(stored[name].bytes for name, targets in weights.targets.items() if own.intersection(targets))


def _text(value: float) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}"
