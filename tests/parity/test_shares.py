"""LAMP, Erdős–Rényi and DLP as their papers write them, in the plainest loops."""

import math

import pytest
import torch

from prunus.allocations import DLP, LAMP, ErdosRenyi
from prunus.allocations.lamp import lamp
from prunus.allocations.ranking import kth_lowest
from prunus.patterns.selection import count
from prunus.sites import Matrix, SiteInfo
from prunus.statistics import InputNorm, SiteStats


class Survey:
    """Block -> matrix -> (weight, inputs)."""

    def __init__(self, blocks):
        self.blocks = {b: {f"{b}.{m}": pair for m, pair in matrices.items()} for b, matrices in blocks.items()}
        self.sites = [
            SiteInfo(name, b, tuple(weight.shape))
            for b, block in self.blocks.items()
            for name, (weight, _) in block.items()
        ]

    def measure(self, function, needs=frozenset()):
        return {
            b: function([Matrix(name, weight, b) for name, (weight, _) in block.items()], self._stats(block))
            for b, block in self.blocks.items()
        }

    def _stats(self, block):
        norms = {name: InputNorm(weight.shape[1]) for name, (weight, _) in block.items()}
        for name, (_, x) in block.items():
            if len(x):
                norms[name].update(x, 2)
        return {name: SiteStats({InputNorm: norm}) for name, norm in norms.items()}


def model(shapes, seed=0):
    """Blocks whose weights have ever heavier tails."""
    generator = torch.Generator().manual_seed(seed)
    return Survey({
        f"b{b}": {
            f"m{i}": (
                torch.randn(*shape, generator=generator) ** (b % 3 + 1),
                torch.randn(40, shape[1], generator=generator),
            )
            for i, shape in enumerate(block)
        }
        for b, block in enumerate(shapes)
    })  # fmt: skip


UNEVEN = [[(8, 16)], [(4, 4), (10, 20)], [(40, 16), (16, 40)], [(6, 7)]]


def plain_lamp(weight):
    """Scores in ascending order of magnitude."""
    squares = sorted(w * w for w in weight.double().flatten().tolist())
    return [square / sum(squares[u:]) if square else 0.0 for u, square in enumerate(squares)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lamp_scores_are_those_of_a_plain_loop_and_the_largest_is_one(dtype):
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :4] = 0
    assert lamp(weight).tolist() == pytest.approx(plain_lamp(weight), rel=1e-6)
    assert lamp(weight).max() == lamp(weight * 1000)[-1] == 1
    assert not lamp(torch.zeros(3, 4)).any()
    assert lamp(torch.ones(2, 2)).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1])


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.37, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(3))
def test_lamp_is_one_threshold_on_the_scores_of_all_matrices(sparsity, seed):
    survey = model(UNEVEN, seed)
    scored = [
        (score, name)
        for block in survey.blocks.values()
        for name, (weight, _) in block.items()
        for score in plain_lamp(weight)
    ]
    gone = [name for _, name in sorted(scored)[: count(len(scored), sparsity)]]
    budget = LAMP().divide(survey, sparsity)
    assert {site.name: count(site.size, budget[site.name]) for site in survey.sites} == {
        site.name: gone.count(site.name) for site in survey.sites
    }


def test_erdos_renyi_densities_are_proportional_and_sum_to_the_budget():
    survey = model([[(8, 16), (16, 8)], [(40, 20)], [(100, 100)]])
    for sparsity in (0.3, 0.7, 0.9):
        budget = ErdosRenyi().divide(survey, sparsity)
        kept = {site.name: 1 - budget[site.name] for site in survey.sites}
        raw = {site.name: (site.shape[0] + site.shape[1]) / (site.shape[0] * site.shape[1]) for site in survey.sites}
        size = {site.name: site.size for site in survey.sites}
        # What would be denser than all is whole, and the rest shares what is left.
        whole = {name for name in kept if kept[name] == 1}
        rest = [name for name in kept if name not in whole]
        left = (1 - sparsity) * sum(size.values()) - sum(size[name] for name in whole)
        factor = left / sum(size[name] * raw[name] for name in rest)
        assert [kept[name] for name in rest] == pytest.approx([factor * raw[name] for name in rest])
        assert all(factor * raw[name] >= 1 for name in whole)
        assert sum(size[name] * kept[name] for name in kept) == pytest.approx((1 - sparsity) * sum(size.values()))


@pytest.mark.parametrize("compat", ["exact", "reference"])
def test_dlp(compat):
    survey = model([[(6, 8), (5, 8)]] * 4, seed=3)
    medians = []
    for sites in survey.blocks.values():
        scores = []
        for weight, x in sites.values():
            norm = [math.sqrt(sum(x[t, j].item() ** 2 for t in range(len(x))) / 2) for j in range(8)]
            scores += [abs(weight[i, j].item()) * norm[j] for i in range(len(weight)) for j in range(8)]
        medians.append(sorted(scores)[(len(scores) - 1) // 2])
    importance = [1 - median / sum(medians) for median in medians]
    low, high = min(importance), max(importance)
    kept = [(value - low) / (high - low) * 2 * 0.1 for value in importance]
    wanted = [1 - (value - sum(kept) / 4 + 1 - 0.6) for value in kept]
    budget = DLP(span=0.1, compat=compat).divide(survey, 0.6)
    assert list(budget.values()) == pytest.approx([s for s in wanted for _ in range(2)], abs=1e-6)


def test_dlp_leaves_out_experts_without_tokens_and_counts_a_block_of_them_as_average():
    generator = torch.Generator().manual_seed(0)
    seen = [(torch.randn(9, 8, generator=generator) * size, torch.randn(30, 8)) for size in (1.0, 3.0)]
    unseen = (torch.randn(9, 8) * 1000, torch.zeros(0, 8))
    survey = Survey({"a": {"m": seen[0], "e": unseen}, "b": {"m": seen[1]}, "c": {"e": unseen}})
    found = survey.measure(DLP().median, frozenset({InputNorm}))
    assert found["a"] == Survey({"a": {"m": seen[0]}}).measure(DLP().median, frozenset({InputNorm}))["a"]
    assert found["c"].isnan()
    budget = DLP(compat="reference").divide(survey, 0.5)
    assert budget["c.e"] == pytest.approx((budget["a.m"] + budget["b.m"]) / 2)


@pytest.mark.parametrize("kind", ["spread", "near", "equal", "zeros"])
def test_the_kth_lowest_is_that_of_sorting(kind):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(3, 50 + i, generator=generator).abs() for i in range(4)]
    shapes = {"spread": lambda p: p**9, "near": lambda p: 1 + p * 1e-5, "equal": torch.ones_like, "zeros": torch.relu_}
    parts = [shapes[kind](part - 1 if kind == "zeros" else part) for part in parts]
    ordered = torch.cat([part.flatten() for part in parts]).sort().values
    for k in (1, 2, 100, len(ordered) // 2, len(ordered)):
        assert kth_lowest(lambda: iter(parts), k) == ordered[k - 1]
