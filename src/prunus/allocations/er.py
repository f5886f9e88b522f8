"""Sparsities from the shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from prunus.allocations.allocation import Survey
from prunus.allocations.project import HIGHEST, reachable, scale


@dataclass(frozen=True)
class ErdosRenyi:
    """1 - s_i = min(1, t·(in + out) / (in·out)), t such that the total is met (Evci et al. 2020).

    Each matrix keeps weights in proportion to its rows and columns, as a random bipartite graph keeps edges: large
    matrices are pruned more, and none beyond 99 %. Knows nothing of the weights; a baseline for those that do.
    """

    paper: ClassVar[str] = "Mocanu et al. 2018, arXiv:1707.04780; Evci et al. 2020, arXiv:1911.11134"
    needs = frozenset[type]()
    foreseeable: ClassVar[bool] = True

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity; equal shapes get equal ones.

        Raises:
            RecipeError: if the target is above 0.99.
        """
        reachable(sparsity, 0.0, HIGHEST)
        raw = {site.name: sum(site.shape) / site.size for site in survey.sites}
        sizes = {site.name: site.size for site in survey.sites}
        densities = scale(raw, sizes, 1 - sparsity, low=1 - HIGHEST, high=1.0)
        return {name: 1 - density for name, density in densities.items()}
