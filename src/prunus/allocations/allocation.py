"""What an allocation is: how the wanted sparsity is divided over the sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from prunus.sites import Matrix, SiteInfo
from prunus.statistics import SiteStats

Measure = Callable[[list[Matrix], Mapping[str, SiteStats]], Tensor]
"""`measure(matrices of one block, site -> statistics) -> Tensor`."""


class Survey(Protocol):
    """A walk over the dense model, one block in memory at a time."""

    @property
    def sites(self) -> list[SiteInfo]:
        """All matrices to be pruned, in module order."""
        ...

    def measure(self, function: Measure, needs: frozenset[type] = frozenset()) -> dict[str, Tensor]:
        """`function` of each block, by block name. Without `needs` only weights are read; no data, no forward pass.

        The matrices are given in the order of `sites`.
        """
        ...


class Allocation(Protocol):
    """Divides a sparsity over the sites. A frozen dataclass.

    Attributes:
        paper: where it is from.
        needs: statistics that `divide` measures.
        foreseeable: True if `divide` looks at the sites alone, so that a plan can say what it will decide.
    """

    paper: ClassVar[str]
    needs: ClassVar[frozenset[type]]
    foreseeable: ClassVar[bool]

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity, for every site.

        Args:
            survey: the dense model.
            sparsity: fraction of the weights of all sites together to remove, in [0, 1).

        Raises:
            RecipeError: if the target cannot be reached; says by how much.
        """
        ...
