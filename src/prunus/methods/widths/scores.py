"""How much a channel is worth: one number for each column of the matrix that reads it, larger = more worth keeping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from prunus.sites import Matrix, Width
from prunus.statistics import InputMoments, InputNorm, RunningFluctuation, SiteStats


class Score(Protocol):
    """A frozen dataclass that scores the channels of a width."""

    @property
    def needs(self) -> frozenset[type]:
        """Statistics that it reads."""
        ...

    def __call__(self, width: Width, matrices: Mapping[str, Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """Float32 `[channels]`, as many as its consumer has columns.

        Args:
            width: whose channels.
            matrices: all matrices of the block, by name.
            stats: of their inputs, by name.
        """
        ...


@dataclass(frozen=True)
class Fluctuation:
    """IFV, WIFV or WIFN of FLAP (An et al. 2024, arXiv:2312.11983, §4.1): how little a constant could stand in.

    IFV: variance of the input; WIFV: times the squared norm of its column; WIFN: Wanda's score averaged over rows. The
    published code squares the scores of attention, not those of the MLP, which decides how the two share the cut.

    Attributes:
        metric: `WIFV`, `IFV` or `WIFN`.
        compat: `reference`: the published running sum, which leaves out the first sequence, instead of the variance.
    """

    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    compat: Literal["exact", "reference"] = "exact"

    @property
    def needs(self) -> frozenset[type]:
        """The variance of inputs, or their norm."""
        if self.metric == "WIFN":
            return frozenset({InputNorm})
        return frozenset({RunningFluctuation if self.compat == "reference" else InputMoments})

    def __call__(self, width: Width, matrices: Mapping[str, Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """Float32 `[channels]`."""
        name = width.consumer.matrix
        weight, known = matrices[name].weight.float(), stats[name]
        if self.metric == "WIFN":
            score = (weight.abs() * known[InputNorm].norm).mean(0)
        else:
            exact = self.compat == "exact"
            score = known[InputMoments].variance if exact else known[RunningFluctuation].fluctuation
            score = score if self.metric == "IFV" else score * weight.square().sum(0)
        return score.square() if width.kind == "heads" else score


@dataclass(frozen=True)
class WandaMean:
    """mean_i |W_ij|·‖X_j‖₂: Wanda's score, averaged over the rows of the consumer (Wanda-sp in FLAP's code)."""

    @property
    def needs(self) -> frozenset[type]:
        """Norms of inputs."""
        return frozenset({InputNorm})

    def __call__(self, width: Width, matrices: Mapping[str, Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """Float32 `[channels]`."""
        name = width.consumer.matrix
        return (matrices[name].weight.float().abs() * stats[name][InputNorm].norm).mean(0)


@dataclass(frozen=True)
class ColumnNorm:
    """‖W_:j‖₂ of the consumer: data-free (magnitude-sp in FLAP's code)."""

    @property
    def needs(self) -> frozenset[type]:
        """None."""
        return frozenset()

    def __call__(self, width: Width, matrices: Mapping[str, Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """Float32 `[channels]`."""
        return torch.linalg.vector_norm(matrices[width.consumer.matrix].weight.float(), dim=0)
