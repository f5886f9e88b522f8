"""Any weight may go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, get_args

from torch import Tensor

from prunus.errors import RecipeError, near
from prunus.patterns.selection import count, keep_highest, keep_highest_overall, kth_lowest, share
from prunus.sites import SiteInfo

Group = Literal["row", "matrix"]
Compat = Literal["exact", "reference"]


@dataclass(frozen=True)
class Unstructured:
    """Removes the ⌊n·s + 1e-9⌋ lowest scores of every row, or of the whole matrix; ties go by index.

    Attributes:
        group: what competes: `row` (each output for itself, as Wanda) or `matrix` (as magnitude and SparseGPT).
        compat: `reference` selects as the published codes do. For rows that is ⌊n·s⌋ of a binary product. For
            matrices it is every score not above the one at position ⌊n·s⌋ in ascending order: one weight too many,
            and with bfloat16 weights up to 0.25 % more, because all ties go.
        whole: matrices with names like this glob are of group `matrix`, the others of `group`. ECoFLaP ranks a vision
            tower so and its language model by rows (Sung et al. 2024, section 3).
    """

    group: Group = "row"
    compat: Compat = "exact"
    whole: str = ""

    paper: ClassVar[str] = ""

    def __post_init__(self) -> None:
        """Check the names.

        Raises:
            RecipeError: for an unknown group or compat.
        """
        for field, value, known in (("group", self.group, Group), ("compat", self.compat, Compat)):
            if value not in get_args(known):
                raise RecipeError(f"pattern.{field} is {value!r}.{near(str(value), get_args(known))}")

    @property
    def align(self) -> int:
        """Any column may be asked for alone."""
        return 1

    @property
    def grouped(self) -> bool:
        """There are no groups of columns."""
        return False

    def at(self, name: str) -> Unstructured:
        """With the group of this matrix."""
        return replace(self, group="matrix") if self.whole and fnmatchcase(name, self.whole) else self

    def keep(self, scores: Tensor, sparsity: float) -> Tensor:
        """The mask `[out, cols]` without the lowest scores. In `exact` the count per group is exact."""
        size = scores.shape[1] if self.group == "row" else scores.numel()
        if self.group == "row":
            pruned = count(size, sparsity) if self.compat == "exact" else int(size * sparsity)
            return keep_highest(scores, pruned)
        if self.compat == "exact":
            return keep_highest_overall(scores, count(size, sparsity))
        # Position ⌊n·s⌋ of the sorted scores is past the end for s = 1, where the published code fails.
        return scores > kth_lowest(scores.reshape(1, -1), min(int(size * sparsity) + 1, size))

    def arrange(self, scores: Tensor, sparsity: float) -> Tensor | None:
        """The order does not matter."""

    def portion(self, sparsity: float, shape: tuple[int, int], columns: slice) -> float:
        """`exact` carries the remainder from slice to slice; `reference` rounds each slice for itself."""
        if self.compat == "reference":
            return sparsity
        lines = 1 if self.group == "row" else shape[0]
        start, stop = lines * columns.start, lines * columns.stop
        return share(count(stop, sparsity) - count(start, sparsity), stop - start)

    def check(self, site: SiteInfo) -> None:
        """Every matrix will do."""

    def settle(self, budget: Mapping[str, float], sizes: Mapping[str, int], target: float) -> dict[str, float]:
        """Every sparsity can be expressed to within one weight, so the budget stays as it is.

        Raises:
            RecipeError: if `whole` names no matrix.
        """
        if self.whole and not any(fnmatchcase(name, self.whole) for name in budget):
            raise RecipeError(f"pattern.whole {self.whole!r} matches no matrix.{near(self.whole, budget)}")
        return dict(budget)
