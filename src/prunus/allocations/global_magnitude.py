"""One magnitude threshold for the whole model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunus.allocations.allocation import Survey
from prunus.allocations.ranking import lowest
from prunus.patterns.selection import count, share

_LOG = logging.getLogger("prunus")


@dataclass(frozen=True)
class GlobalMagnitude:
    """Each matrix loses what it holds of the ⌊s·N + 1e-9⌋ smallest |W| of all matrices; ties go in module order.

    Exact, in two passes over the weights and without sorting. With the magnitude metric and `pattern.group=matrix` this
    is global magnitude pruning; other metrics only take over its sparsities. Matrices on a smaller scale lose more,
    perhaps everything.
    """

    paper: ClassVar[str] = "Han et al. 2015, arXiv:1506.02626"
    needs = frozenset[type]()
    foreseeable: ClassVar[bool] = False

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity, k_i / n_i with whole k_i."""
        below, tied, missing = lowest(survey, count(sum(site.size for site in survey.sites), sparsity), _magnitude)
        budget = {}
        for site, certain, ties in zip(survey.sites, below, tied, strict=True):
            more = min(ties, missing)
            missing -= more
            budget[site.name] = share(certain + more, site.size)
            if budget[site.name] > 0.99:
                _LOG.warning(
                    "%s: a global magnitude threshold removes %.2f %% of it.", site.name, 100 * budget[site.name]
                )
        return budget


def _magnitude(weight: Tensor) -> Tensor:
    return weight.float().abs()
