"""Metrics, masks and allocations as their papers write them, in the plainest loops."""

from itertools import combinations
from math import sqrt

import pytest
import torch

from prunus.allocations import OWL
from prunus.gradients import LossGradientL1, LossGradientL1Published, RegionalGradient
from prunus.methods import METHODS
from prunus.metrics import GBLM, METRICS
from prunus.sites import Matrix, SiteInfo
from prunus.statistics import Gram, InputNorm, SiteStats

OUT, IN, TOKENS, SAMPLES = 5, 8, 30, 3


@pytest.fixture
def weight():
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(TOKENS, IN, generator=generator) @ torch.randn(IN, IN, generator=generator)


def gathered(x, samples=SAMPLES):
    stats = {InputNorm: InputNorm(x.shape[1]), Gram: Gram(x.shape[1])}
    for statistic in stats.values():
        statistic.update(x, samples)
    return SiteStats(stats)


def scores(name, weight, x):
    return METRICS[name](weight, gathered(x))(weight, slice(0, weight.shape[1])).tolist()


def test_magnitude(weight, x):
    w = weight.tolist()
    wanted = [[abs(w[i][j]) for j in range(IN)] for i in range(OUT)]
    assert scores("magnitude", weight, x) == wanted


def test_wanda(weight, x):
    w, t = weight.tolist(), x.tolist()
    norm = [sqrt(sum(t[k][j] ** 2 for k in range(TOKENS)) / SAMPLES) for j in range(IN)]
    for i in range(OUT):
        wanted = [abs(w[i][j]) * norm[j] for j in range(IN)]
        assert scores("wanda", weight, x)[i] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "settings, power, alpha, rounding",
    [
        ({}, 1, 100 * 128, 1e-5),
        ({"norm": "l2"}, 2, 100 * sqrt(128), 1e-5),
        ({"compat": "reference"}, 1, 100 * 3, 3 * 2**-11),  # three sums in float16
        ({"compat": "reference", "norm": "l2"}, 2, 100 * sqrt(3), 1e-5),
        ({"alpha": 7.0}, 1, 7.0, 1e-5),
    ],
)
def test_gblm(settings, power, alpha, rounding, weight, x):
    metric = GBLM(**settings)
    g = torch.randn(SAMPLES, OUT, IN, generator=torch.Generator().manual_seed(2))
    gradient = metric.kind((OUT, IN))
    for one in g:
        gradient.update(one)
    found = metric(weight, gathered(x).joined({metric.kind: gradient}, "site"))(weight, slice(0, IN))
    w, t = weight.tolist(), x.tolist()
    for i in range(OUT):
        for j in range(IN):
            norm = sqrt(sum(t[k][j] ** 2 for k in range(TOKENS)) / SAMPLES)
            mean = (sum(abs(float(g[k][i][j])) ** power for k in range(SAMPLES)) / SAMPLES) ** (1 / power)
            assert float(found[i, j]) == pytest.approx(abs(w[i][j]) * (norm + alpha * mean), rel=rounding)


def test_the_published_gradient_is_summed_in_float16(weight):
    g = torch.randn(9, OUT, IN, generator=torch.Generator().manual_seed(2)) * torch.logspace(0, -4, IN)
    gradient, wanted = LossGradientL1Published((OUT, IN)), torch.zeros(OUT, IN, dtype=torch.float16)
    for one in g:
        gradient.update(one)
        wanted = wanted + (100 * one.abs()).half()
    assert not torch.allclose(wanted.float(), 100 * g.abs().sum(0), rtol=1e-5)
    torch.testing.assert_close(gradient.mean * 900, wanted.float(), rtol=1e-6, atol=0)


def test_gblm_with_alpha_0_is_wanda_and_with_a_huge_one_ranks_by_the_gradient(weight, x):
    gradient = LossGradientL1((OUT, IN))
    gradient.update(torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2)))
    stats = gathered(x).joined({LossGradientL1: gradient}, "site")
    whole = slice(0, IN)
    assert torch.equal(GBLM(alpha=0.0)(weight, stats)(weight, whole), METRICS["wanda"](weight, stats)(weight, whole))
    ranks = GBLM(alpha=1e9)(weight, stats)(weight, whole).argsort(1)
    assert torch.equal(ranks, METRICS["taylor"](weight, stats)(weight, whole).argsort(1))


def test_wanda_plus_plus(weight, x):
    g = torch.randn(SAMPLES, OUT, IN, generator=torch.Generator().manual_seed(2))
    gradient = RegionalGradient((OUT, IN))
    for one in g:
        gradient.update(one)
    found = METRICS["regional"](weight, gathered(x).joined({RegionalGradient: gradient}, "site"))(weight, slice(0, IN))
    w, t = weight.tolist(), x.tolist()
    for i in range(OUT):
        for j in range(IN):
            norm = sqrt(sum(t[k][j] ** 2 for k in range(TOKENS)) / SAMPLES)
            root = sqrt(sum(float(g[k][i][j]) ** 2 for k in range(SAMPLES)) / SAMPLES)
            assert float(found[i, j]) == pytest.approx(abs(w[i][j]) * (100 * root + norm), rel=1e-5)


def test_ria(weight, x):
    w, t = weight.tolist(), x.tolist()
    norm = [sqrt(sum(t[k][j] ** 2 for k in range(TOKENS)) / SAMPLES) for j in range(IN)]
    for i in range(OUT):
        row = sum(abs(w[i][j]) for j in range(IN))
        wanted = []
        for j in range(IN):
            column = sum(abs(w[k][j]) for k in range(OUT))
            wanted.append((abs(w[i][j]) / column + abs(w[i][j]) / row) * norm[j] ** 0.5)
        assert scores("ria", weight, x)[i] == pytest.approx(wanted, rel=1e-5)


def test_obs(weight, x):
    hessian = 2 / SAMPLES * x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(IN)
    for i in range(OUT):
        for j in range(IN):
            wanted = weight[i, j].item() ** 2 / torch.linalg.inv(hessian[j:, j:])[0, 0].item()
            assert scores("obs", weight, x)[i][j] == pytest.approx(wanted, rel=1e-4)


def test_wanda_removes_the_lowest_half_of_every_row(weight, x):
    mask = METHODS["wanda"].prune(Matrix("a", weight, "b"), gathered(x), 0.5).mask.tolist()
    for i, row in enumerate(scores("wanda", weight, x)):
        gone = sorted(range(IN), key=lambda j: row[j])[: int(IN * 0.5)]
        assert mask[i] == [j not in gone for j in range(IN)]


def test_wanda_is_the_best_subset_if_inputs_do_not_correlate(weight):
    x = torch.diag(torch.tensor([0.3, 2, 1, 0.7, 4, 0.2, 1.5, 0.9]))
    mask = METHODS["wanda"].prune(Matrix("a", weight, "b"), gathered(x, 1), 0.5).mask
    for i in range(OUT):

        def lost(gone, i=i):
            return (weight[i, list(gone)] @ x[:, list(gone)].T).square().sum().item()

        best = min(combinations(range(IN), 4), key=lost)
        assert (~mask[i]).nonzero().flatten().tolist() == list(best)


def test_owl():
    generator = torch.Generator().manual_seed(5)
    blocks = [
        [(torch.randn(6, 8, generator=generator) ** 3, torch.randn(20, 8, generator=generator)) for _ in range(2)]
        for _ in range(4)
    ]
    ratios = []
    for block in blocks:
        flat = []
        for w, x in block:
            norm = [sqrt(sum(x[t, j].item() ** 2 for t in range(20)) / SAMPLES) for j in range(8)]
            flat += [abs(w[i, j].item()) * norm[j] for i in range(6) for j in range(8)]
        mean = sum(flat) / len(flat)
        ratios.append(100 * sum(score > 3 * mean for score in flat) / len(flat))
    span, target = 0.08, 0.7
    kept = [(ratio - min(ratios)) / (max(ratios) - min(ratios)) * 2 * span for ratio in ratios]
    wanted = [1 - (u - sum(kept) / 4 + 1 - target) for u in kept]

    class Survey:
        def __init__(self):
            self.sites = [SiteInfo(f"{b}.{i}", str(b), (6, 8)) for b in range(4) for i in range(2)]

        def measure(self, function, needs=frozenset()):
            return {
                str(b): function(
                    [Matrix(f"{b}.{i}", w, str(b)) for i, (w, _) in enumerate(block)],
                    {f"{b}.{i}": gathered(x) for i, (_, x) in enumerate(block)},
                )
                for b, block in enumerate(blocks)
            }

    assert len(set(ratios)) > 2
    for compat in ("exact", "reference"):
        budget = OWL(multiple=3, span=span, compat=compat).divide(Survey(), target)
        assert list(budget.values()) == pytest.approx([s for s in wanted for _ in range(2)], abs=1e-12)
