"""Presets: whole choices under one word; docs/choose.md has what was measured of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prunus.errors import RecipeError, near

# What a preset decides alone: another metric with its update would be another choice under the same word.
_ITS_OWN = ("method", "metric", "update")


@dataclass(frozen=True)
class Preset:
    """A method with its settings and an allocation.

    Attributes:
        purpose: when to take it, in a few words.
        method: a key of `METHODS`.
        allocation: a key of `ALLOCATIONS`.
        update: a key of `UPDATES`, where it is not the method's own.
        settings: as in a recipe.
    """

    purpose: str
    method: str
    allocation: str = "uniform"
    update: str | None = None
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def fill(self, name: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """What was asked, completed by the preset.

        Args:
            name: of the preset.
            asked: the `prune` part of a recipe. Another allocation, pattern or setting than the preset's stands.

        Raises:
            RecipeError: if another method, metric or update was asked for too.
        """
        own = {"method": self.method, "metric": None, "update": self.update}
        for axis in _ITS_OWN:
            if asked.get(axis) not in (None, own[axis]):
                made = self.method + (f" with update {self.update}" if self.update else "")
                raise RecipeError(
                    f"preset {name} is method {made} and contradicts {axis} {asked[axis]!r}; leave one out"
                )
        allocation = asked.get("allocation") or self.allocation
        settings = {
            key: value
            for key, value in self.settings.items()
            if allocation == self.allocation or not key.startswith("allocation.")
        }
        given = {key: value for key, value in asked.items() if value is not None}
        given |= {"update": self.update} if self.update else {}
        return {**given, "method": self.method, "allocation": allocation,
                "settings": {**settings, **(asked.get("settings") or {})}}  # fmt: skip


PRESETS: dict[str, Preset] = {
    "fast": Preset("one pass over a little text, no matrix is inverted", "wanda"),
    "balanced": Preset(
        "the kept weights are refitted to what the dense ones gave, and blocks with outliers keep more",
        "wanda", allocation="owl", update="lsq", settings={"update.tolerance": 0.1},
    ),
    "best": Preset("weights and mask found together; some three times the time of SparseGPT", "alps"),
}  # fmt: skip


def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        RecipeError: there is none; the message has the nearest name.
    """
    if name not in PRESETS:
        raise RecipeError(f"there is no preset {name!r}.{near(name, PRESETS)}")
    return PRESETS[name]
