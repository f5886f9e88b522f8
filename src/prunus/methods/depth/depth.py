"""Blocks in the order in which they go, and how many: what all methods for depth have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prunus.edits import Narrow
from prunus.errors import RecipeError
from prunus.methods.shape import Blocks, Plan
from prunus.sites import Block, BlockSite, Kind, SiteInfo
from prunus.statistics import SiteStats


class Ranking(Protocol):
    """A frozen dataclass that says which blocks go first."""

    @property
    def needs(self) -> frozenset[type]:
        """Statistics that it reads."""
        ...

    def order(self, survey: Blocks, sites: Sequence[BlockSite], count: int) -> list[str]:
        """Names of at least `count` blocks, the first to go first.

        Args:
            survey: the dense model.
            sites: the blocks that may go, in model order.
            count: how many will go.
        """
        ...


@dataclass(frozen=True)
class Depth:
    """Whole blocks go; those that stay are as they were, so every tool that reads the model reads the result.

    Attributes:
        ranking: which blocks go first.
        keep: blocks to keep, counted. 0: as many as `share` or the sparsity leaves.
        share: of the blocks to remove, in [0, 1), whatever the sparsity; 0: the sparsity decides.
        first: blocks at the beginning that must stay, at least 0.
        last: blocks at the end that must stay, at least 0.
        paper: where it was published.
    """

    ranking: Ranking
    keep: int = 0
    share: float = 0.0
    first: int = 0
    last: int = 0
    paper: str = ""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: a number is below 0.
        """
        for name in ("keep", "first", "last"):
            if getattr(self, name) < 0:
                raise RecipeError(f"method.{name} is {getattr(self, name)}; it must be at least 0.")
        if not 0 <= self.share < 1:
            raise RecipeError(f"method.share is {self.share:g}; it must be in [0, 1).")

    @property
    def touches(self) -> tuple[Kind, ...]:
        """No width."""
        return ()

    @property
    def needs(self) -> frozenset[type]:
        """What the ranking reads."""
        return self.ranking.needs

    @property
    def gathers(self) -> frozenset[type]:
        """Nothing: blocks that stay are not touched."""
        return frozenset()

    def check(self, info: SiteInfo) -> None:
        """Any matrix will do."""

    def plan(self, survey: Blocks, sparsity: float) -> Plan:
        """The blocks that go.

        Raises:
            RecipeError: no block would be left, the wanted number cannot be reached with those that may go, or a block
                is ignored as a whole.
        """
        spared = next((block.name for block in survey.blocks if block.ignored and not block.slots), None)
        if spared is not None:
            raise RecipeError(
                f"--ignore leaves no matrix of {spared}, and whole blocks go, that one among them. Leave it out; --set "
                "method.first= and --set method.last= say how many blocks at either end must stay."
            )
        blocks = [BlockSite(block.name, sum(info.size for info in block.infos)) for block in survey.blocks]
        towers = {block.tower for block in survey.blocks}
        if len(towers) > 1:
            raise RecipeError(f"Blocks are dropped from one tower; name it with --blocks: {', '.join(sorted(towers))}.")
        free = blocks[self.first : max(self.first, len(blocks) - self.last)]
        count = self._count(blocks, free, sparsity)
        if not count:
            return Plan()
        return Plan(dropped=frozenset(self.ranking.order(survey, free, count)[:count]))

    def own_share(self, sizes: Sequence[int]) -> float | None:
        """See `prunus.methods.shape.Fixed`."""
        if self.keep:
            return 1 - min(self.keep, len(sizes)) / len(sizes)
        return self.share or None

    def narrow(self, block: Block, stats: Mapping[str, SiteStats], plan: Plan) -> list[Narrow]:
        """Nothing: what stays is not touched."""
        return []

    def _count(self, blocks: Sequence[BlockSite], free: Sequence[BlockSite], sparsity: float) -> int:
        """How many go: the nearest to the sparsity, for blocks of one size."""
        if self.keep > len(blocks):
            raise RecipeError(f"method.keep is {self.keep}, and the model has {len(blocks)} blocks.")
        count = len(blocks) - self.keep if self.keep else round(sparsity * len(blocks))
        most = min(len(free), len(blocks) - 1)
        if count > most:
            smallest = sorted(site.weights for site in free)[: max(most, 0)]
            reach = sum(smallest) / sum(site.weights for site in blocks)
            raise RecipeError(
                f"{count} of {len(blocks)} blocks would go, and at most {max(most, 0)} can: ask for a sparsity of 0 to "
                f"{int(1000 * reach) / 1000:g}."
            )
        return count
