"""The mask is refined by swaps that bring each output's mean back; kept weights stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from prunus.errors import RecipeError, near
from prunus.statistics import InputMoments, SiteStats
from prunus.updates.keep import zeroed
from prunus.updates.update import Choose

Compat = Literal["exact", "reference"]

_PART = 2**22  # weights at a time: sorting them takes some 40 bytes for each


@dataclass(frozen=True)
class DSnoT:
    """Swaps pruned for kept weights until Σ_{j pruned} W_ij·μ_j is near 0 (Zhang et al. 2024, arXiv:2310.08915, §3).

    D_ij = W_ij·μ_j is what a weight adds to the mean of its output, e_i the sum of D over the pruned weights of a row.
    While |e| exceeds the threshold, the pruned weight with the largest D/var (largest towards e) comes back, and of the
    kept ones whose D has the other sign the one with the smallest Wanda score |W|·‖X‖ goes. The swap that would turn
    the sign of e is not made and ends the row. Each row keeps its count; with N:M both come from the same group.

    |e| never grows, but it is the mean of the output alone that is mended. With zero cycles the update is `keep`.

    Attributes:
        cycles: swaps per row at most, at least 0; 50 as in the published code.
        threshold: of |e|, at least 0, in the units of an output summed over the tokens of a sample; 0.1 as in the
            paper.
        variance_power: of var in the choice of what comes back, at least 0; 1 as in the paper, 0 leaves it out.
        compat: `reference` swaps as the published code does: in rows without looking at the sign of e, which then
            swings around 0; with N:M whatever the sign of D of the kept weight.
    """

    cycles: int = 50
    threshold: float = 0.1
    variance_power: float = 1.0
    compat: Compat = "exact"

    paper: ClassVar[str] = "Zhang et al. 2024, arXiv:2310.08915"
    needs: ClassVar[frozenset[type]] = frozenset({InputMoments})
    neighbours: ClassVar[bool] = True  # swaps stay within groups of neighbouring columns

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: if a number is negative or infinite, or compat is unknown.
        """
        published = {"cycles": 50, "threshold": 0.1, "variance_power": 1}
        for name, usual in published.items():
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise RecipeError(
                    f"update.{name} is {value:g}; it must be at least 0 (the published code uses {usual})."
                )
        if self.compat not in get_args(Compat):
            raise RecipeError(f"update.compat is {self.compat!r}.{near(self.compat, get_args(Compat))}")

    def __call__(self, weight: Tensor, choose: Choose, stats: SiteStats) -> tuple[Tensor, Tensor]:
        """The weight `[out, in]` in its own dtype, +0.0 where the refined mask is False, and that mask."""
        mask = choose(weight, slice(0, weight.shape[1]))
        if self.cycles and not stats.unseen:
            rows = max(1, _PART // weight.shape[1])
            parts = zip(weight.split(rows), mask.split(rows), strict=True)
            mask = torch.cat([self._refined(*part, stats[InputMoments], choose.align) for part in parts])
        return zeroed(weight, mask), mask

    def _refined(self, weight: Tensor, mask: Tensor, moments: InputMoments, group: int) -> Tensor:
        """The mask of some rows after all swaps, a fresh tensor."""
        mask = mask.contiguous()
        signed = weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous()
        worth = signed * moments.mean
        error = (worth * ~mask).sum(1, dtype=torch.float64)
        # The row's own sign makes every error positive; only the published code may leave this side of 0.
        worth *= error.sign().to(worth.dtype)[:, None]
        both = self.compat == "reference" and group == 1
        sides = [self._swaps(signed, worth * side, mask, moments, group) for side in ((1, -1) if both else (1,))]
        back, gone, gain = (torch.stack(parts) for parts in zip(*sides, strict=True))
        made = self._walk(error.abs(), gain, both)
        return _swapped(mask, back, gone, made)

    def _swaps(
        self, weight: Tensor, worth: Tensor, mask: Tensor, moments: InputMoments, group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The swaps that lower a positive error, each row's in the order in which they are made.

        No weight is moved twice, so the n-th to come back in a group always meets the n-th to go, and the order is
        known beforehand.

        Args:
            weight: `[out, in]`.
            worth: D, likewise.
            mask: before the first swap.
            moments: of the inputs.
            group: columns within which a swap must stay, 1 for the whole row.

        Returns:
            Columns that come back, columns that go, and D of the first minus D of the second (NaN: no such swap), each
            `[out, cycles]`.
        """
        goes = mask if self.compat == "reference" and group > 1 else mask & (worth < 0)
        chance = torch.where(~mask & (worth > 0), worth / moments.variance.pow(self.variance_power), -torch.inf)
        cost = torch.where(goes, weight.abs() * moments.norm, torch.inf)
        width = group if group > 1 else mask.shape[1]
        chance, back = _first(chance, width, self.cycles, descending=True)
        cost, gone = _first(cost, width, self.cycles, descending=False)
        possible = (chance > -torch.inf) & (cost < torch.inf)
        # The best of all groups; of equals the first.
        order = chance.where(possible, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, : self.cycles]
        gain = (worth.gather(1, back).double() - worth.gather(1, gone)).where(possible, torch.nan)
        return back.gather(1, order), gone.gather(1, order), gain.gather(1, order)

    def _walk(self, error: Tensor, gain: Tensor, both: bool) -> Tensor:
        """Which swaps are made, bool `[sides, out, swaps]`: from both sides of 0, or until the sign would turn."""
        made = torch.zeros_like(gain, dtype=torch.bool)
        place = torch.zeros(gain.shape[:2], dtype=torch.int64, device=gain.device)
        rows = torch.arange(len(error), device=gain.device)
        active = torch.ones_like(error, dtype=torch.bool)
        for _ in range(gain.shape[2]):
            side = (error < 0).long()
            at = place[side, rows]
            after = error - gain[side, rows, at] * (1 - 2 * side)
            active = active & (error.abs() > self.threshold) & after.isfinite() & (both | (after > 0))
            if not bool(active.any()):
                break
            made[side, rows, at] = active
            place[side, rows] = at + active
            error = torch.where(active, after, error)
        return made


def _first(values: Tensor, group: int, most: int, descending: bool) -> tuple[Tensor, Tensor]:
    """The first `most` of every group of columns in sorted order, and their columns, both `[out, groups·most]`."""
    ordered, columns = values.unflatten(1, (-1, group)).sort(dim=2, descending=descending, stable=True)
    columns += torch.arange(0, values.shape[1], group, device=values.device)[:, None]
    return ordered[:, :, :most].flatten(1), columns[:, :, :most].flatten(1)


def _swapped(mask: Tensor, back: Tensor, gone: Tensor, made: Tensor) -> Tensor:
    """A copy of the mask after the swaps that were made."""
    swapped = mask.clone()
    rows = torch.arange(len(mask), device=mask.device)[:, None].expand_as(back)[made]
    swapped[rows, back[made]] = True
    swapped[rows, gone[made]] = False
    return swapped
