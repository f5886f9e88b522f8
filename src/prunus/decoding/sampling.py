"""How the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prunus.errors import RecipeError


@dataclass(frozen=True)
class Sampling:
    """The choice of each next token; greedy unless a temperature is given.

    Attributes:
        max_new_tokens: at most so many, at least 1.
        temperature: logits are divided by it; 0: always the likeliest token.
        top_p: draw from the smallest set of tokens that has this probability together, in (0, 1].
        top_k: draw from so many likeliest tokens, at least 1; None: from all.
        repetition_penalty: logits of tokens that were seen are divided (positive) or multiplied (negative) by it, at
            least 1 (Keskar et al. 2019).
        seed: of the draw.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and draws without a temperature.

        Raises:
            RecipeError: naming the number.
        """
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or a number above it"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "repetition_penalty": (1 <= self.repetition_penalty < math.inf, "at least 1"),
            "seed": (0 <= self.seed < 2**63, "a whole number of at least 0"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise RecipeError(f"{name} is {rule}, not {getattr(self, name)!r}.")
        idle = [name for name in ("top_p", "top_k", "seed") if getattr(self, name) != getattr(Sampling, name)]
        if self.temperature == 0 and idle:
            raise RecipeError(
                f"{idle[0]} has no effect at temperature 0, where the likeliest token is always taken; give a "
                f"temperature, such as 0.8, or leave {idle[0]} out."
            )
