"""What an allocation is: how the wanted sparsity is divided over the sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

from torch import Tensor

from prunus.progress import Progress
from prunus.sites import Matrix, SiteInfo
from prunus.statistics import SiteStats
from prunus.trials import Trial, Whole

Measure = Callable[[list[Matrix], Mapping[str, SiteStats]], Tensor]
"""`measure(matrices of one block, site -> statistics) -> Tensor`."""


class Survey(Protocol):
    """A walk over the dense model, one block in memory at a time."""

    @property
    def sites(self) -> list[SiteInfo]:
        """All matrices to be pruned, in module order."""
        ...

    @property
    def progress(self) -> Progress:
        """Told about long work; `measure` and `trials` do so themselves."""
        ...

    def measure(self, function: Measure, needs: frozenset[type] = frozenset()) -> dict[str, Tensor]:
        """`function` of each block, by block name. Without `needs` only weights are read; no data, no forward pass.

        The matrices are given in the order of `sites`.
        """
        ...

    def trials(self, trial: Trial, samples: int) -> dict[str, Tensor]:
        """`trial` of each block, by block name, with the whole dense model in memory; see `prunus.trials`."""
        ...

    def whole(self, samples: int) -> AbstractContextManager[Whole]:
        """The whole dense model in memory, and the losses of so many calibration samples."""
        ...

    def recall(self, name: str) -> Any:
        """What `remember` kept under this name, also in an earlier, killed run; None if there is none."""
        ...

    def remember(self, name: str, value: Any) -> Any:
        """Keep a JSON value until the run is over; returns it as the first of several processes has it."""
        ...


class Allocation(Protocol):
    """Divides a sparsity over the sites. A frozen dataclass.

    Attributes:
        paper: where it is from.
        foreseeable: True if `divide` looks at the sites alone, so that a plan can say what it will decide.
    """

    paper: ClassVar[str]
    foreseeable: ClassVar[bool]

    @property
    def needs(self) -> frozenset[type]:
        """Types of statistics that `divide` measures."""
        ...

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity, for every site.

        Args:
            survey: the dense model.
            sparsity: fraction of the weights of all sites together to remove, in [0, 1).

        Raises:
            RecipeError: if the target cannot be reached; says by how much.
        """
        ...
