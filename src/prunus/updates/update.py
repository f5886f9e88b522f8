"""What an update is: the masked matrix, its kept weights perhaps changed to make up for the lost ones."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from prunus.statistics import SiteStats


class Choose(Protocol):
    """The right to ask for a mask, for the weights as they are now and the columns that are about to be fixed."""

    @property
    def align(self) -> int:
        """Slices start and stop at multiples of this."""
        ...

    @property
    def grouped(self) -> bool:
        """Whether every `align` columns are decided for themselves: then they may be asked for one group at a time."""
        ...

    def __call__(self, weight: Tensor, columns: slice) -> Tensor:
        """Mask (bool, True = kept) of `weight [out, cols]`, the present values of these columns.

        Ask for every column exactly once, in any slices, and the whole matrix has its exact sparsity. Other updates
        may ask again and again for all columns.
        """
        ...


class Update(Protocol):
    """Turns a matrix and the right to choose into a sparse matrix. A frozen dataclass."""

    paper: ClassVar[str]
    needs: ClassVar[frozenset[type]]

    def __call__(self, weight: Tensor, choose: Choose, stats: SiteStats) -> tuple[Tensor, Tensor]:
        """Prune one matrix.

        Args:
            weight: `[out, in]`, never changed.
            choose: gives masks.
            stats: of its inputs; only the types in `needs` are read.

        Returns:
            The new weight `[out, in]`, exactly +0.0 where pruned, and the mask.
        """
        ...
