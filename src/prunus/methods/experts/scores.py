"""What an expert is worth, from one pass of the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from prunus.methods.experts.seen import Seen


class ExpertScore(Protocol):
    """A frozen dataclass that gives every expert a score, larger = more worth keeping."""

    def __call__(self, seen: Seen) -> Tensor:
        """Float64 `[experts]`; an expert that no token reached is worth 0."""
        ...


@dataclass(frozen=True)
class RouterWeighted:
    """Mean of g_j(x)·‖f_j(x)‖₂ over the tokens routed to j (REAP, Lasby et al. 2025, eq. 9).

    g is the weight that the model itself multiplies by, after renormalising where it does.
    """

    def __call__(self, seen: Seen) -> Tensor:
        """See the class."""
        return seen.weighted / seen.count.clamp_min(1)


@dataclass(frozen=True)
class Frequency:
    """How many tokens are routed to the expert."""

    def __call__(self, seen: Seen) -> Tensor:
        """See the class."""
        return seen.count


@dataclass(frozen=True)
class OutputNorm:
    """Σ ‖f_j(x)‖₂ over the tokens routed to the expert, without the router's weight."""

    def __call__(self, seen: Seen) -> Tensor:
        """See the class."""
        return seen.norm
