"""What can be chosen about DoLa, and which layers a bucket means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from prunus.errors import RecipeError, near

BUCKETS = ("low", "high")
NORMS = ("none", "final")
COMPATS = ("exact", "published")


@dataclass(frozen=True)
class Dola:
    """Decoding by contrasting layers (Chuang et al. 2023, arXiv 2309.03883).

    Layer j is the residual stream after j blocks; 0 is the embedding. The mature layer is always the last.

    Attributes:
        layers: "low", "high" or the candidates' numbers; one number alone is the static mode. The authors advise high
            for short facts and low for long reasoning.
        relative_top: tokens less likely than this share of the likeliest are out, in [0, 1]; 0 keeps all (alpha, 0.1 as
            in the paper).
        norm: "none": the head reads a premature layer as it is, as published; "final": through the model's last norm
            first, as the mature one. With "none" the premature distribution of a newer model is often far too sharp.
        compat: "exact": the Jensen-Shannon divergence. "published": what the published code computes instead, with the
            arguments of each Kullback-Leibler term exchanged and the mean over the vocabulary; it has no upper bound
            and chooses other layers.
        surviving: for a model from which blocks were removed, the original numbers of those that remain, in order;
            numbers in `layers` are then original ones; low and high count what is there. None: all count what is there.
    """

    layers: str | tuple[int, ...] = "low"
    relative_top: float = 0.1
    norm: str = "none"
    compat: str = "exact"
    surviving: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse words that are none and a share that is none.

        Raises:
            RecipeError: naming the value.
        """
        if isinstance(self.layers, str) and self.layers not in BUCKETS:
            raise RecipeError(f"DoLa's layers are low, high or numbers, not {self.layers!r}.")
        if not self.layers:
            raise RecipeError("DoLa needs at least one premature layer.")
        if not 0 <= self.relative_top <= 1:
            raise RecipeError(f"relative_top is a share in [0, 1], not {self.relative_top!r}.")
        for name, value, known in (("norm", self.norm, NORMS), ("compat", self.compat, COMPATS)):
            if value not in known:
                raise RecipeError(f"DoLa's {name} is {value!r}.{near(value, known)}")

    def candidates(self, blocks: int, *, tied: bool) -> list[int]:
        """Numbers of the premature layers, ascending.

        Args:
            blocks: how many there are now.
            tied: the head shares its weights with the embedding.

        Raises:
            RecipeError: a number outside the model.
        """
        if isinstance(self.layers, str):
            return bucket(self.layers, blocks, tied=tied)
        if self.surviving is not None and (
            len(self.surviving) != blocks or list(self.surviving) != sorted(set(self.surviving))
        ):
            raise RecipeError(
                f"surviving names {len(self.surviving)} blocks; the model has {blocks}, each named once and ascending."
            )
        limit = blocks if self.surviving is None else max(self.surviving) + 1
        wrong = [layer for layer in self.layers if not 0 <= layer < limit]
        if wrong:
            raise RecipeError(
                f"DoLa's layer {wrong[0]} is outside the model: premature layers are 0 (the embedding) to {limit - 1} "
                f"(before the last block)."
            )
        return sorted(set(self.layers)) if self.surviving is None else translate(self.layers, self.surviving)


def bucket(name: str, blocks: int, *, tied: bool) -> list[int]:
    """The published candidates: every second layer of the lower or upper half; of at most 20 beyond 40 blocks.

    Through a tied head the embedding predicts the token itself, so `low` starts at layer 2 then. The published rule
    gives an empty list for a tied model of three blocks; here the nearest layer is taken.
    """
    if name == "high":
        return list(range(blocks // 2 if blocks <= 40 else blocks - 20, blocks, 2))
    start = min(2, blocks - 1) if tied else 0
    return list(range(start, blocks // 2 if blocks <= 40 else 20, 2)) or [start]


def translate(layers: Sequence[int], surviving: Sequence[int]) -> list[int]:
    """Original layer numbers in a model that kept only the blocks `surviving`.

    The stream after j original blocks is, in what remains, the stream after those of them that survived.
    """
    return sorted({sum(block < layer for block in surviving) for layer in layers})


def parse_layers(text: str) -> str | tuple[int, ...]:
    """`low`, `high`, or numbers and ranges: `16,18,20`, `16-30` (every one), `16-30:2` (every second).

    Raises:
        RecipeError: anything else.
    """
    if text in BUCKETS:
        return text
    layers: list[int] = []
    for part in text.replace(" ", "").split(","):
        found = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4})(?::([1-9]\d{0,3}))?)?", part)
        if not found:
            raise RecipeError(f"DoLa's layers are low, high, or numbers such as 16,18,20 or 16-30:2, not {text!r}.")
        first, last, step = found[1], found[2] or found[1], found[3] or 1
        if int(last) < int(first):
            raise RecipeError(f"DoLa's layers {part!r} are an empty range; write {last}-{first}.")
        layers.extend(range(int(first), int(last) + 1, int(step)))
    return tuple(layers)
