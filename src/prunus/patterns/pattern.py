"""What a pattern is: which masks are allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from prunus.sites import SiteInfo


class Pattern(Protocol):
    """Says which masks are allowed and picks the best one. A frozen dataclass."""

    paper: ClassVar[str]

    @property
    def align(self) -> int:
        """Columns are asked for in multiples of this, starting at a multiple of it."""
        ...

    @property
    def grouped(self) -> bool:
        """Whether every `align` columns are decided for themselves, so that an update may ask group by group."""
        ...

    def at(self, name: str) -> Pattern:
        """The pattern of the matrix with this name; itself where all are alike."""
        ...

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """The allowed mask that removes the lowest scores, exactly as many as `sparsity` says.

        Args:
            scores: `[out, cols]`, larger = keep.
            sparsity: fraction removed, in [0, 1].

        Returns:
            bool `[out, cols]`, True = kept; ties are broken by index.
        """
        ...

    def arrange(self, scores: Tensor, sparsity: float) -> Tensor | None:
        """The order in which `keep` shall be shown the columns, or None for the order in which they are.

        Args:
            scores: `[out, cols]` of all columns that are decided together.
            sparsity: fraction removed of them.

        Returns:
            int64 `[cols]`, a permutation: place p is column `order[p]`.
        """
        ...

    def portion(self, sparsity: float, shape: tuple[int, int], columns: slice) -> float:
        """The sparsity to ask for in these columns, so that slices asked one by one add up to the exact whole.

        Args:
            sparsity: of the whole matrix.
            shape: `(out, in)` of the whole matrix.
            columns: a slice with start and stop.
        """
        ...

    def check(self, site: SiteInfo) -> None:
        """Refuse a matrix that this pattern does not fit, before any work.

        Raises:
            RecipeError: for example if in_features is not a multiple of M; choose another pattern or ignore the site.
        """
        ...

    def settle(self, budget: Mapping[str, float], sizes: Mapping[str, int], target: float) -> dict[str, float]:
        """Round a budget to what the pattern can express, the total kept as near the target as that allows.

        Args:
            budget: site -> sparsity.
            sizes: site -> number of weights.
            target: sparsity of all sites together.
        """
        ...
