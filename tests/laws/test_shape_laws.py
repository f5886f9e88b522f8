"""Laws of scores, structures and eliminations of widths, with the published counts as examples."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from prunus.errors import RecipeError
from prunus.gradients import LossGradientL2, LossGradientSum
from prunus.methods.widths.elimination import eliminate, refit
from prunus.methods.widths.scores import ColumnNorm, Fluctuation, WandaMean
from prunus.methods.widths.structures import adaptive, grouped, highest, uniform_counts
from prunus.methods.widths.taylor import TaylorScore
from prunus.ranges import ranges, read_ranges
from prunus.sites import Matrix, Member, Width
from prunus.statistics import InputMoments, InputNorm, RunningFluctuation, SiteStats


def attention(name: str, hidden: int, heads: int, groups: int, size: int) -> Width:
    """A width of heads of a Llama block."""
    queries = torch.arange(heads * size) // (heads // groups * size)
    keys = torch.arange(groups * size) // size
    rows = (Member(f"{name}.q", queries), Member(f"{name}.k", keys), Member(f"{name}.v", keys))
    weights = torch.full((groups,), hidden * size * (2 * heads // groups + 2))
    return Width(name, name, "heads", groups, rows, (Member(f"{name}.o", queries),), weights)


def mlp(name: str, hidden: int, neurons: int) -> Width:
    own = torch.arange(neurons)
    rows = (Member(f"{name}.gate", own), Member(f"{name}.up", own))
    return Width(
        name, name, "neurons", neurons, rows, (Member(f"{name}.down", own),), torch.full((neurons,), 3 * hidden)
    )


# All parameters, blocks, hidden, heads, groups, size of a head, neurons, share, first, last → parameters left
# (LLM-Pruner's logs).
GOLDEN = {
    "LLaMA-7B": (6_738_415_616, 32, 4096, 32, 32, 128, 11008, 0.25, 4, 2, 5_422_977_024),
    "LLaMA-7B half": (6_738_415_616, 32, 4096, 32, 32, 128, 11008, 0.60, 3, 1, 3_350_188_032),
    "Llama-3-8B": (8_030_261_248, 32, 4096, 32, 8, 128, 14336, 0.25, 4, 2, 6_612_586_496),
    "TinyLlama": (1_100_048_384, 22, 2048, 32, 4, 64, 5632, 0.25, 4, 4, 945_907_712),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_llm_pruner_leaves_the_published_number_of_parameters(name):
    parameters, blocks, hidden, heads, groups, size, neurons, share, first, last, left = GOLDEN[name]
    widths = [attention("a", hidden, heads, groups, size), mlp("m", hidden, neurons)]
    counts = uniform_counts(widths, 0, share, 0, "local", "reference")
    gone = sum((width.groups - counts[width.name]) * int(width.weights[0]) for width in widths)
    assert parameters - (blocks - first - last) * gone == left


def test_the_price_of_a_head_is_that_of_its_weights():
    assert float(attention("a", 4096, 32, 32, 128).weights[0] / mlp("m", 4096, 8).weights[0]) == pytest.approx(512 / 3)
    assert float(attention("a", 4096, 32, 8, 128).weights[0] / mlp("m", 4096, 8).weights[0]) == pytest.approx(1280 / 3)


@pytest.fixture
def widths():
    return [attention("a0", 32, 4, 2, 8), mlp("m0", 32, 48), attention("a1", 32, 4, 2, 8), mlp("m1", 32, 48)]


@pytest.fixture
def scores(widths):
    generator = torch.Generator().manual_seed(0)
    return {width.name: torch.randn(width.groups, generator=generator) for width in widths}


def removed(widths, masks):
    return sum(int(width.weights[~masks[width.name]].sum()) for width in widths)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.7])
def test_one_threshold_meets_the_budget_within_one_unit(widths, scores, share):
    total = sum(int(width.weights.sum()) for width in widths)
    masks = adaptive(widths, scores, round(share * total), None, "exact")
    assert 0 <= removed(widths, masks) - round(share * total) < int(widths[0].weights[0])
    assert all(mask.any() for mask in masks.values())


def test_more_sparsity_removes_more_of_the_same(widths, scores):
    total = sum(int(width.weights.sum()) for width in widths)
    low, high = (adaptive(widths, scores, round(share * total), None, "exact") for share in (0.2, 0.5))
    assert all(bool((low[name] | ~high[name]).all()) for name in low)


def test_the_reference_also_removes_the_unit_at_the_threshold():
    equal = [mlp("m", 32, 5)]
    keep = adaptive(equal, {"m": torch.arange(5.0)}, 2 * 96, None, "reference")["m"]
    assert keep.tolist() == [False, False, False, True, True]  # five of equal price, 0.4: two are kept, not three
    assert adaptive(equal, {"m": torch.arange(5.0)}, 2 * 96, None, "exact")["m"].sum() == 3


def test_so_many_heads_then_neurons(widths, scores):
    total = sum(int(width.weights.sum()) for width in widths)
    masks = adaptive(widths, scores, total // 2, 1, "exact")
    assert sum(int((~masks[name]).sum()) for name in ("a0", "a1")) == 1
    assert abs(removed(widths, masks) - total // 2) <= 96
    with pytest.raises(RecipeError, match="0 to 2 groups of heads"):
        adaptive(widths, scores, total // 2, 3, "exact")


def test_uniform_counts_fill_up_with_neurons_what_whole_heads_leave(widths):
    total = sum(int(width.weights.sum()) for width in widths)
    exact = uniform_counts(widths, round(0.3 * total), 0.3, 0, "UL-UM", "exact")
    published = uniform_counts(widths, round(0.3 * total), 0.3, 0, "UL-UM", "reference")
    assert exact["a0"] == published["a0"] == 2  # int(0.3 · 2) = 0 go
    assert published["m0"] == 48 - 14
    gone = sum((width.groups - exact[width.name]) * int(width.weights[0]) for width in widths)
    assert abs(gone - 0.3 * total) <= 96
    with pytest.raises(RecipeError, match="at least one must stay"):
        uniform_counts(widths, total, 0.999, 0, "local", "reference")


def test_standardised_scores_do_not_know_the_scale_of_their_width(widths):
    channels = torch.rand(32, generator=torch.Generator().manual_seed(1))
    for factor in (10.0, 0.1):
        assert torch.allclose(
            grouped(channels, widths[0], "AL-AM"), grouped(factor * channels, widths[0], "AL-AM"), atol=1e-5
        )
    standard = (channels - channels.mean()) / channels.std()
    assert torch.allclose(grouped(channels, widths[0], "AL-AM"), standard.unflatten(0, (2, 16)).mean(1), atol=1e-6)
    assert torch.allclose(grouped(channels, widths[0], "UL-UM"), channels.unflatten(0, (2, 16)).sum(1))
    assert torch.equal(grouped(torch.ones(32), widths[0], "AL-AM"), torch.zeros(2))


def known(weight, x, kinds, samples=3):
    stats = {kind: kind(x.shape[1]) for kind in kinds}
    for kind in kinds:
        stats[kind].update(x, samples)
    return {"m.down": Matrix("m.down", weight, "m")}, {"m.down": SiteStats(stats)}


def test_fluctuation_is_the_published_sum_in_closed_form():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(2)) * torch.arange(1, 7) + 3
    statistic = RunningFluctuation(6)
    statistic.update(x[:40], 2)
    statistic.update(x[40:], 1)
    chunks, total = x.double().chunk(3), torch.zeros(6, dtype=torch.float64)
    for k in (2, 3):
        mean = torch.cat(chunks[:k]).mean(0)
        total += (k - 1) / k * (chunks[k - 1] - mean).square().sum(0)
    assert torch.allclose(statistic.fluctuation.double(), total / 2, rtol=1e-5)
    assert torch.allclose(statistic.token_mean, x.mean(0), atol=1e-6)


def test_fluctuation_scores_are_their_formulas():
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(3)) + 2
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    matrices, stats = known(weight, x, (InputMoments, InputNorm))
    width = mlp("m", 4, 6)
    variance = x.var(0, correction=0)
    assert torch.allclose(Fluctuation("IFV")(width, matrices, stats), variance, rtol=1e-4)
    assert torch.allclose(Fluctuation()(width, matrices, stats), variance * weight.square().sum(0), rtol=1e-4)
    energy = (weight.abs() * (x.square().sum(0) / 3).sqrt()).mean(0)
    assert torch.allclose(Fluctuation("WIFN")(width, matrices, stats), energy, rtol=1e-4)
    assert torch.allclose(WandaMean()(width, matrices, stats), energy, rtol=1e-4)
    assert torch.allclose(ColumnNorm()(width, matrices, {}), weight.norm(dim=0))
    shifted = known(weight, x + 5, (InputMoments, InputNorm))
    assert torch.allclose(Fluctuation("IFV")(width, *shifted), variance, rtol=1e-4), "a constant does not fluctuate"
    assert not torch.allclose(Fluctuation("WIFN")(width, *shifted), energy, rtol=1e-2)


@pytest.mark.parametrize("order", ["first", "second", "mixed", "vector"])
def test_taylor_scores_are_their_formulas_over_all_rows_and_columns_of_a_group(order):
    generator = torch.Generator().manual_seed(5)
    width = attention("a", 6, 4, 2, 3)
    shapes = {"a.q": (12, 6), "a.k": (6, 6), "a.v": (6, 6), "a.o": (6, 12)}
    matrices, stats, expected = {}, {}, torch.zeros(2)
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator)
        gradients = [torch.randn(shape, generator=generator) for _ in range(2)]
        sums = {kind: kind(shape) for kind in (LossGradientSum, LossGradientL2)}
        for one in gradients:
            sums[LossGradientSum].update(one)
            sums[LossGradientL2].update(one)
        matrices[name], stats[name] = Matrix(name, weight, "a"), SiteStats(sums)
        mean = (gradients[0] + gradients[1]) / 2
        square = (gradients[0] ** 2 + gradients[1] ** 2) / 2
        for group in range(2):
            per = shape[1] // 2 if name == "a.o" else shape[0] // 2
            part = (slice(None), slice(group * per, (group + 1) * per))
            part = part if name == "a.o" else part[::-1]
            w, g, a = weight[part], mean[part], square[part]
            axis = 0 if name == "a.o" else 1
            expected[group] += {
                "first": (w * g).abs().sum(), "second": (w**2 * a).abs().sum(),
                "mixed": (w * g - w**2 * a / 2).abs().sum(), "vector": (w * g).sum(axis).abs().sum(),
            }[order]  # fmt: skip
    found = grouped(TaylorScore(order)(width, matrices, stats), width, "local")
    assert torch.allclose(found, expected, rtol=1e-4)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(64, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double()
    return torch.randn(5, 8, generator=generator), x, x.T @ x


def test_refit_is_least_squares(problem):
    weight, x, hessian = problem
    kept = torch.tensor([True, False, True, True, False, True, True, True])
    fitted = refit(weight, hessian, kept)
    best = torch.linalg.lstsq(x[:, kept], x @ weight.double().T).solution.T
    assert torch.allclose(fitted[:, kept].double(), best, atol=1e-5)
    assert not fitted[:, ~kept].any()


def test_the_first_column_to_go_is_the_one_that_least_squares_misses_least(problem):
    weight, x, hessian = problem
    found = eliminate(weight, hessian, torch.arange(8), torch.ones(5), 1, 8)

    def error(gone):
        kept = torch.ones(8, dtype=torch.bool)
        kept[list(gone)] = False
        return float((x @ (refit(weight, hessian, kept).double() - weight.double()).T).square().sum())

    losses = [error([column]) for column in range(8)]
    assert int(found.order[0]) == min(range(8), key=losses.__getitem__)
    assert float(found.losses[0]) == pytest.approx(min(losses), rel=1e-4)
    both = eliminate(weight, hessian, torch.arange(8), torch.ones(5), 2, 8)
    assert float(both.losses.sum()) == pytest.approx(error(both.order.tolist()), rel=1e-4), "losses add up"
    assert float(both.losses.sum()) <= 1.5 * min(error(pair) for pair in combinations(range(8), 2))


def test_groups_go_whole_and_what_belongs_to_none_stays(problem):
    weight, _, hessian = problem
    groups = torch.tensor([0, 0, 1, 1, 2, 2, -1, -1])
    found = eliminate(weight, hessian, groups, torch.ones(5), 3, 3)
    assert sorted(found.order.tolist()) == [0, 1, 2]
    whole = eliminate(weight, hessian, groups, torch.tensor([1.0, 0, 0, 0, 0]), 3, 3)
    assert float(whole.losses.sum()) < float(found.losses.sum()), "outputs that count nothing cost nothing"


def test_ranges_are_read_as_they_were_written():
    for text, length in (("0-5,7,9-12", 14), ("", 3), ("0", 1), ("2", 5)):
        assert ranges(read_ranges(text, length)) == text
    assert highest(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2).tolist() == [False, True, True, False]
