"""The same sparsity everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.allocations.allocation import Survey


@dataclass(frozen=True)
class Uniform:
    """s_i = s for every matrix: what the papers of the metrics do."""

    paper: ClassVar[str] = ""
    needs = frozenset[type]()
    foreseeable: ClassVar[bool] = True

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> the wanted sparsity."""
        return dict.fromkeys((site.name for site in survey.sites), sparsity)
