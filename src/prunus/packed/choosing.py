"""What is done to scores before a token is chosen: transformers' own parts, in transformers' order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from prunus.errors import RecipeError

# Argument of `generate` -> the part that it asks for, and the value that asks for none, as None does.
ALWAYS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "repetition_penalty": (lambda value: RepetitionPenaltyLogitsProcessor(float(value)), 1),
    "suppress_tokens": (SuppressTokensLogitsProcessor, []),
}
DRAWING: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "temperature": (lambda value: TemperatureLogitsWarper(float(value)), 1),
    "top_k": (lambda value: TopKLogitsWarper(int(value)), 0),
    "top_p": (lambda value: TopPLogitsWarper(float(value)), 1),
    "min_p": (lambda value: MinPLogitsWarper(float(value)), 0),
}


def processors(options: Mapping[str, Any]) -> LogitsProcessorList:
    """The parts that these arguments of `generate` ask for; those of `DRAWING` only with `do_sample`.

    Raises:
        RecipeError: a value out of range.
    """
    found = LogitsProcessorList()
    for name, (make, nothing) in (ALWAYS | (DRAWING if options.get("do_sample") else {})).items():
        value = options.get(name)
        if value is None or value == nothing:
            continue
        try:
            found.append(make(value))
        except (TypeError, ValueError) as problem:
            raise RecipeError(f"Tokens cannot be chosen with {name}={value!r}: {problem}.") from None
    return found
