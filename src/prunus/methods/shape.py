"""What a method that makes shapes smaller is: it removes whole widths' groups or whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from prunus.edits import Narrow, Split
from prunus.sites import Block, Kind, SiteInfo
from prunus.statistics import SiteStats
from prunus.stream import Step

# `visit(one block, its statistics) -> value`, or None if nothing is to be kept for the block itself.
Visit = Callable[[Step, Mapping[str, SiteStats]], Tensor | None]


@dataclass(frozen=True, eq=False)
class Plan:
    """What is decided before the first cut.

    Attributes:
        dropped: names of blocks that go.
        keep: width → bool `[groups]`, True = kept.
        count: width → how many groups stay; which ones is decided when its block is reached.
        facts: width → what was learned about it from the dense model.
        ranks: matrix → its rank, of those that become two.
        reports: block → JSON values that its report holds beside the usual.
    """

    dropped: frozenset[str] = frozenset()
    keep: Mapping[str, Tensor] = field(default_factory=dict)
    count: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Blocks(Protocol):
    """The dense model, as a method may look at it before the first cut: see `prunus.survey.Survey`."""

    @property
    def blocks(self) -> list[Block]:
        """All blocks in model order, with their widths."""
        ...

    def visit(self, function: Visit, needs: frozenset[type] = frozenset(), *, text: bool = True) -> dict[str, Tensor]:
        """`function` of each block, by block name; without `text` blocks are loaded but not run on it."""
        ...

    def whole(self, samples: int) -> Any:
        """The whole dense model in memory, and the losses of so many calibration samples."""
        ...

    def refusal(self, heads: int | None) -> str:
        """Why so many groups of heads in each block (None: as they are) cannot be; empty if they can."""
        ...

    def recall(self, name: str) -> Any:
        """What `remember` kept under this name, also in an earlier, killed run; None if there is none."""
        ...

    def remember(self, name: str, value: Any) -> Any:
        """Keep a JSON value until the run is over."""
        ...


@runtime_checkable
class Shape(Protocol):
    """A method that removes whole groups of channels, ranks or whole blocks. A frozen dataclass."""

    @property
    def paper(self) -> str:
        """Where it was published."""
        ...

    @property
    def touches(self) -> tuple[Kind, ...]:
        """Kinds of widths that it narrows; none for a method that removes blocks."""
        ...

    @property
    def needs(self) -> frozenset[type]:
        """All statistics that it reads."""
        ...

    @property
    def gathers(self) -> frozenset[type]:
        """Those that it reads while blocks are pruned one after the other."""
        ...

    def check(self, info: SiteInfo) -> None:
        """See that a matrix suits the method."""
        ...

    def plan(self, survey: Blocks, sparsity: float) -> Plan:
        """Decide what can be decided before the first cut.

        Args:
            survey: the dense model.
            sparsity: share of the weights of all blocks' matrices to remove, in [0, 1).

        Raises:
            RecipeError: the sparsity cannot be reached; says what can.
        """
        ...

    def narrow(self, block: Block, stats: Mapping[str, SiteStats], plan: Plan) -> Sequence[Narrow | Split]:
        """The edits of one loaded block.

        Args:
            block: with its widths; not changed.
            stats: of its matrices, those in `gathers`.
            plan: what `plan` decided.
        """
        ...


@runtime_checkable
class Fixed(Protocol):
    """A method whose own settings may say how much goes, so that no budget is asked for."""

    def own_share(self, sizes: Sequence[int]) -> float | None:
        """The share of the blocks that goes by its settings, in [0, 1); None: the sparsity decides.

        Args:
            sizes: weights in the matrices of each block.
        """
        ...


@runtime_checkable
class Uneven(Protocol):
    """A method that may give blocks different shapes, and can also give all of them one that stock classes hold."""

    @property
    def bias(self) -> bool:
        """Whether it gives biases to matrices."""
        ...

    def even(self) -> Shape:
        """The same method, with one shape for all blocks.

        Raises:
            RecipeError: its settings ask for different ones.
        """
        ...
