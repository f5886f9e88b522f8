"""The kept weights stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.statistics import SiteStats
from prunus.updates.update import Choose


@dataclass(frozen=True)
class Keep:
    """W ∘ mask: ask once, zero the rest."""

    paper: ClassVar[str] = ""
    needs: ClassVar[frozenset[type]] = frozenset()

    def __call__(self, weight: Tensor, choose: Choose, stats: SiteStats) -> tuple[Tensor, Tensor]:
        """The weight `[out, in]` in its own dtype, +0.0 where the mask is False, and the mask."""
        mask = choose(weight, slice(0, weight.shape[1]))
        return weight.masked_fill(~mask, 0.0), mask
