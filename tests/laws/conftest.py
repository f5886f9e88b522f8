"""What the laws are tested on: small matrices with correlated, unequal inputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prunus.gradients import LossGradientL1, LossGradientL1Published, LossGradientL2, RegionalGradient, WeightGradient
from prunus.sites import Matrix
from prunus.statistics import Gram, InputMoments, InputNorm, SiteStats

SAMPLES = 2
ALL = (InputNorm, InputMoments, Gram, LossGradientL1, LossGradientL1Published, LossGradientL2, RegionalGradient)


def inputs(tokens: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[tokens, features]`: neighbours correlate, features differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    for j in range(1, features):
        x[:, j] = 0.7 * x[:, j - 1] + 0.7 * x[:, j]
    return (x * torch.linspace(0.5, 2, features, dtype=torch.float64)).to(dtype)


def gradient(kind: type, x: Tensor, rows: int = 12) -> WeightGradient:
    """As if every output had the same derivative: the gradients of two samples, each half of the tokens."""
    made = kind((rows, x.shape[1]))
    for part in x.chunk(SAMPLES) if len(x) else ():
        made.update(part.float().sum(0).expand(rows, -1) / 100)
    return made


def statistics(x: Tensor, needs: frozenset[type] | None = None, double: bool = False) -> SiteStats:
    """All statistics of `x`, or those in `needs`, as if it were two samples."""
    made = {}
    for kind in ALL if needs is None else needs:
        if kind.source != "inputs":
            made[kind] = gradient(kind, x)
            continue
        made[kind] = Gram(x.shape[1], dtype=torch.float64) if kind is Gram and double else kind(x.shape[1])
        if len(x):
            made[kind].update(x, SAMPLES)
    return SiteStats(made, "model.layers.3.mlp.up_proj")


def matrix(weight: Tensor) -> Matrix:
    """A site with these weights."""
    return Matrix("model.layers.3.mlp.up_proj", weight, "model.layers.3")


@pytest.fixture
def weight() -> Tensor:
    """`[12, 24]`, float32."""
    return torch.randn(12, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x() -> Tensor:
    """`[100, 24]`."""
    return inputs(100, 24)


@pytest.fixture
def gather() -> Callable[..., SiteStats]:
    """`statistics`, for tests that need several."""
    return statistics


@pytest.fixture
def site() -> Callable[[Tensor], Matrix]:
    """`matrix`, likewise."""
    return matrix


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """`inputs`, likewise."""
    return inputs
