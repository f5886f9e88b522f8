"""Laws of least squares and of the search for a support, against plain linear algebra in float64."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import RecipeError
from prunus.factor import UnitDiagonal
from prunus.methods import ELEMENTWISE as METHODS
from prunus.methods.elementwise import Elementwise
from prunus.metrics import METRICS, Magnitude, Wanda
from prunus.patterns import NM, Unstructured
from prunus.sites import Matrix
from prunus.statistics import Gram, InputNorm, SiteStats
from prunus.updates import ADMM, UPDATES, Keep, LeastSquares, OBSSweep, admm

OUT, IN = 6, 16
EXACT = LeastSquares(steps=1000, tolerance=1e-22)


@dataclass(frozen=True)
class Fixed:
    """A mask that does not depend on the weights."""

    mask: torch.Tensor
    align: int = 1
    grouped: bool = False

    def __call__(self, weight, columns):
        return self.mask[:, columns]


def problem(seed, out=OUT, columns=IN, tokens=60, correlation=0.9, dtype=torch.float64):
    """Weights and statistics of correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    for j in range(1, columns):
        x[:, j] = correlation * x[:, j - 1] + (1 - correlation**2) ** 0.5 * x[:, j]
    x *= torch.exp(0.7 * torch.randn(columns, generator=generator, dtype=torch.float64))
    stats = {InputNorm: InputNorm(columns), Gram: Gram(columns, dtype=dtype)}
    for statistic in stats.values():
        statistic.update(x, 2)
    weight = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    return weight.to(dtype), SiteStats(stats, "a"), torch.rand(out, columns, generator=generator) > 0.6


def damped(stats, damp=0.01):
    hessian = stats[Gram].hessian.double()
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def loss(change, stats, damp=0.01):
    change = change.double()
    return (change @ damped(stats, damp) * change).sum().item()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), correlation=st.floats(0, 0.99), tokens=st.sampled_from([5, 40, 200]))
def test_least_squares_loses_no_more_than_the_sweep_and_no_more_than_nothing(seed, correlation, tokens):
    weight, stats, mask = problem(seed, tokens=tokens, correlation=correlation)
    kept, swept, fitted = (
        loss(update(weight, Fixed(mask), stats)[0] - weight, stats) for update in (Keep(), OBSSweep(), EXACT)
    )
    assert fitted <= min(kept, swept) * (1 + 1e-9)


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("tokens", [30, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_exceeds_the_least_possible_one_by_no_more_than_the_tolerance(tolerance, tokens, dtype):
    weight, stats, mask = problem(3, out=40, columns=96, tokens=tokens, correlation=0.97, dtype=dtype)
    near, _ = LeastSquares(tolerance=tolerance)(weight, Fixed(mask), stats)
    assert near.dtype == dtype
    best, _ = EXACT(weight.double(), Fixed(mask), stats)
    excess = loss(near - weight, stats) / loss(best - weight.double(), stats) - 1
    assert excess <= tolerance / (1 - tolerance)
    assert excess > 1e-9 or tolerance < 0.01


@pytest.mark.parametrize("tokens", [3, 200])
def test_no_step_of_the_gradient_loses_anything(tokens):
    weight, stats, mask = problem(4, tokens=tokens)
    losses = [
        loss(LeastSquares(steps=steps, tolerance=1e-22)(weight, Fixed(mask), stats)[0] - weight, stats)
        for steps in range(1, 12)
    ]
    assert losses == pytest.approx(sorted(losses, reverse=True), rel=1e-9)
    assert losses[-1] < losses[0]


def test_with_all_losses_on_the_left_the_sweep_is_least_squares():
    weight, stats, _ = problem(5)
    mask = torch.arange(IN).expand(OUT, IN) >= 5
    swept, _ = OBSSweep(block=4)(weight, Fixed(mask), stats)
    fitted, _ = EXACT(weight, Fixed(mask), stats)
    torch.testing.assert_close(fitted, swept, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_more_inputs_than_tokens_are_no_obstacle(damp):
    for seed in range(10):
        weight, stats, mask = problem(seed, tokens=4)
        fitted, _ = LeastSquares(damp=damp)(weight, Fixed(mask), stats)
        assert fitted.isfinite().all()
        assert loss(fitted - weight, stats, damp) <= loss(weight * ~mask, stats, damp) * (1 + 1e-9)


@pytest.mark.parametrize("update", [EXACT, ADMM()], ids=["lsq", "admm"])
def test_inputs_that_never_fire_keep_their_weights_and_have_no_say(update):
    weight, _, mask = problem(6)
    dead = [0, 7, 8]
    live = [j for j in range(IN) if j not in dead]
    gram, alone = Gram(IN, dtype=torch.float64), Gram(len(live), dtype=torch.float64)
    x = torch.randn(50, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).cumsum(1)
    x[:, dead] = 0
    gram.update(x, 2)
    alone.update(x[:, live], 2)
    whole, _ = update(weight, Fixed(mask), SiteStats({Gram: gram}))
    part, _ = update(weight[:, live], Fixed(mask[:, live]), SiteStats({Gram: alone}))
    torch.testing.assert_close(whole[:, dead], weight[:, dead] * mask[:, dead], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole[:, live], part, rtol=1e-3 if update != EXACT else 1e-8, atol=1e-3)


@pytest.mark.parametrize("update", [LeastSquares(), ADMM()], ids=["lsq", "admm"])
def test_a_row_that_is_kept_whole_stays_bit_by_bit(update):
    weight, stats, mask = problem(7, out=40, columns=96, tokens=100, correlation=0.99, dtype=torch.float32)
    mask[::2] = True
    fitted, _ = update(weight, Fixed(mask), stats)
    assert torch.equal(fitted[::2], weight[::2])
    assert not torch.equal(fitted[1][mask[1]], weight[1][mask[1]])


def test_uncorrelated_input_changes_no_kept_weight(weight, gather, site):
    stats = gather(torch.diag(torch.linspace(0.5, 3, 24)))
    for update, near in ((LeastSquares(damp=0.0), 0.0), (ADMM(damp=0.0), 0.02)):
        edit = Elementwise(Wanda(), Unstructured("matrix"), update).prune(site(weight), stats, 0.5)
        torch.testing.assert_close(edit.weight, weight * edit.mask, rtol=0, atol=near)
    # The search is a heuristic: where Wanda's mask is the best one, it loses a little.
    lost = [
        loss(
            Elementwise(Wanda(), Unstructured("matrix"), update).prune(site(weight), stats, 0.5).weight - weight, stats
        )
        for update in (Keep(), ADMM())
    ]
    assert lost[0] < lost[1] < 1.02 * lost[0]


@pytest.mark.parametrize("update", [replace(EXACT, damp=0.0), ADMM(damp=0.0)], ids=["lsq", "admm"])
def test_the_scale_of_an_input_may_move_to_its_column(update):
    weight, stats, _ = problem(8)
    scale = 2.0 ** (torch.arange(IN, dtype=torch.float64) % 4)
    moved = {InputNorm: InputNorm(IN), Gram: Gram(IN, dtype=torch.float64)}
    root = torch.linalg.cholesky(stats[Gram].hessian, upper=True)
    for kind, statistic in moved.items():
        statistic.update(root * scale, 2)
        stats[kind].tensors()[0].zero_()
        stats[kind].update(root, 0)
    method = Elementwise(Wanda(), Unstructured("matrix"), update)
    plain = method.prune(Matrix("a", weight, "b"), stats, 0.5)
    again = method.prune(Matrix("a", weight / scale, "b"), SiteStats(moved), 0.5)
    assert torch.equal(plain.mask, again.mask)
    torch.testing.assert_close(again.weight * scale, plain.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("pattern", [Unstructured("row"), NM(2, 4)], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_least_squares_keeps_the_mask_of_the_dense_weights(metric, pattern, weight, x, gather, site):
    kept, fitted = (
        Elementwise(METRICS[metric], pattern, UPDATES[update]).prune(site(weight), gather(x), 0.5)
        for update in ("keep", "lsq")
    )
    assert torch.equal(fitted.mask, kept.mask)


def test_a_penalty_that_moves_nothing_is_lowered_three_times_and_then_the_search_ends(monkeypatch):
    tried, original = [], admm._inverse
    monkeypatch.setattr(admm, "_inverse", lambda hessian, rho, site: tried.append(rho) or original(hessian, rho, site))
    weight, stats, mask = problem(9)
    ADMM(rho=10.0)(weight, Fixed(mask), stats)
    assert tried == pytest.approx([10, 2, 0.4, 0.08])


def test_for_a_support_that_cannot_move_the_search_is_least_squares():
    weight, stats, mask = problem(9)
    found, kept = ADMM()(weight, Fixed(mask), stats)
    best, _ = EXACT(weight, Fixed(mask), stats)
    assert torch.equal(kept, mask)
    assert loss(found - weight, stats) == pytest.approx(loss(best - weight, stats), rel=2e-4)


@pytest.mark.parametrize("pattern,sparsity", [("matrix", 0.5), ("matrix", 0.7), ("row", 0.6), ("2:4", 0.5)])
def test_the_search_loses_less_than_least_squares_loses_less_than_the_sweep(pattern, sparsity):
    pattern = NM(2, 4) if pattern == "2:4" else Unstructured(pattern)
    found, fitted, swept = 0.0, 0.0, 0.0
    for seed in range(10):
        weight, stats, _ = problem(seed, out=24, columns=48, tokens=300, dtype=torch.float32)
        losses = [
            loss(
                Elementwise(Wanda(), pattern, update).prune(Matrix("a", weight, "b"), stats, sparsity).weight - weight,
                stats,
            )
            for update in (ADMM(), LeastSquares())
        ]
        assert losses[0] < losses[1]
        found, fitted = found + losses[0], fitted + losses[1]
        sparsegpt = replace(METHODS["sparsegpt"], pattern=pattern)
        swept += loss(sparsegpt.prune(Matrix("a", weight, "b"), stats, sparsity).weight - weight, stats)
    assert found < 0.9 * fitted
    assert found < 0.9 * swept


@pytest.mark.parametrize("rho", [0.001, 10.0, 60.0])
def test_a_first_penalty_that_is_too_low_or_too_high_still_finds_a_better_support(rho):
    for seed in range(5):
        weight, stats, _ = problem(seed, out=24, columns=48, tokens=300)
        lost = [
            loss(
                Elementwise(Wanda(), Unstructured("matrix"), update).prune(Matrix("a", weight, "b"), stats, 0.6).weight
                - weight,
                stats,
            )
            for update in (ADMM(rho=rho), LeastSquares())
        ]
        assert lost[0] < lost[1]


@pytest.mark.parametrize("metric", [Magnitude(), *METRICS.values()], ids=str)
def test_the_search_cuts_by_the_metric_in_the_units_of_the_weight(metric, weight, x, gather, site):
    """The last mask is the one that the metric gives the weights that were found, before they are refitted."""
    shown = []

    @dataclass(frozen=True)
    class Watch:
        align: int = 1
        grouped: bool = False

        def __call__(self, present, columns):
            shown.append((present.clone(), Unstructured("row").keep(scorer(present, columns), 0.5)))
            return shown[-1][1]

    stats = gather(x)
    scorer = metric(weight, stats)
    fitted, mask = ADMM()(weight, Watch(), stats)
    assert torch.equal(mask, shown[-1][1])
    assert torch.equal(shown[0][0], weight)
    refitted, _ = EXACT(weight.double(), Fixed(mask), stats)
    assert loss(fitted - weight, stats) == pytest.approx(loss(refitted - weight.double(), stats), rel=2e-4)
    # The search ends near a weight that has this support.
    assert (shown[-1][0] * ~mask).norm() < 0.1 * (shown[-1][0] * mask).norm()


def test_the_same_input_is_rescaled_once_for_both(weight, x, gather, site, monkeypatch):
    calls, original = [], UnitDiagonal.__call__
    monkeypatch.setattr(UnitDiagonal, "__call__", lambda self, stats: calls.append(1) or original(self, stats))
    stats = gather(x)
    for update in (LeastSquares(), ADMM(), LeastSquares(steps=5)):
        replace(METHODS["wanda"], update=update).prune(site(weight), stats, 0.5)
    assert len(calls) == 1


def test_a_hessian_that_is_none_is_refused_with_a_cure():
    gram = Gram(2)
    gram.update(torch.zeros(1, 2), 2)
    gram.tensors()[0].copy_(torch.tensor([[1.0, 9.0], [9.0, 1.0]]))
    with pytest.raises(RecipeError, match=r"k_proj.*--set update.damp="):
        METHODS["alps"].prune(
            Matrix("k_proj", torch.eye(2), "b"), SiteStats({Gram: gram, InputNorm: InputNorm(2)}, "k_proj"), 0.5
        )


@pytest.mark.parametrize(
    "part,wrong",
    [
        (LeastSquares, {"steps": 0}),
        (LeastSquares, {"tolerance": 0.0}),
        (LeastSquares, {"tolerance": 1.0}),
        (LeastSquares, {"damp": -0.1}),
        (ADMM, {"steps": 0}),
        (ADMM, {"rho": 0.0}),
        (ADMM, {"rho": float("inf")}),
        (ADMM, {"damp": 1.5}),
    ],
)
def test_settings_out_of_range_are_refused(part, wrong):
    with pytest.raises(RecipeError, match=rf"update.{next(iter(wrong))} is .* must be"):
        part(**wrong)
