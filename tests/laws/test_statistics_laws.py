"""Laws of running statistics."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.statistics import Gram, InputMoments, InputNorm, SiteStats

KINDS = (InputNorm, InputMoments, Gram)


def value(statistic):
    if isinstance(statistic, InputMoments):
        return torch.stack([statistic.mean, statistic.variance, statistic.norm.square()])
    return statistic.hessian if isinstance(statistic, Gram) else statistic.mean_square


def filled(kind, x, samples=4):
    statistic = kind(x.shape[1])
    statistic.update(x, samples)
    return statistic


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=4), features=st.integers(1, 19), seed=st.integers(0, 99))
def test_any_split_of_the_tokens_gives_the_statistic_of_all(kind, cuts, features, seed):
    x = torch.randn(60, features, generator=torch.Generator().manual_seed(seed))
    ends = [0, *sorted(cuts), 60]
    whole, streamed = filled(kind, x), kind(features)
    for i, (start, stop) in enumerate(pairwise(ends)):
        streamed.update(x[start:stop], 4 if i == 0 else 0)
    torch.testing.assert_close(value(streamed), value(whole), rtol=1e-5, atol=1e-5)
    assert (streamed.samples, streamed.tokens) == (whole.samples, whole.tokens) == (4, 60)


def test_the_values_are_the_formulas(x):
    exact = x.double()
    torch.testing.assert_close(filled(InputNorm, x).mean_square, (exact.square().sum(0) / 4).float())
    torch.testing.assert_close(filled(InputNorm, x).norm, (exact.square().sum(0) / 4).sqrt().float())
    torch.testing.assert_close(filled(Gram, x).hessian, (2 / 4 * exact.T @ exact).float(), rtol=1e-5, atol=1e-5)
    moments = filled(InputMoments, x)
    torch.testing.assert_close(moments.mean, (exact.sum(0) / 4).float())
    torch.testing.assert_close(moments.variance, exact.var(0, unbiased=False).float())
    torch.testing.assert_close(moments.norm, filled(InputNorm, x).norm)


def test_the_variance_of_an_input_far_from_zero_is_not_lost_in_rounding():
    x = 4096 + torch.tensor([[0.0], [0.25]]).repeat(500, 1)
    assert filled(InputMoments, x).variance.item() == pytest.approx(1 / 64, rel=1e-6)
    assert filled(InputMoments, torch.full((999, 1), 1 / 3)).variance.item() == pytest.approx(0, abs=1e-15)


def test_a_double_input_is_not_changed_by_being_counted():
    x = torch.full((3, 2), 2.0, dtype=torch.float64)
    filled(InputMoments, x)
    assert (x == 2).all()


@pytest.mark.parametrize("features", [1, 2, 3, 5, 24, 513])
def test_the_hessian_is_symmetric_whatever_the_panels(features, draw):
    hessian = filled(Gram, draw(8, features)).hessian
    assert torch.equal(hessian, hessian.T)
    torch.testing.assert_close(hessian, 0.5 * draw(8, features).T @ draw(8, features), rtol=1e-4, atol=1e-4)


def test_the_hessian_may_be_read_between_updates(x):
    gram = filled(Gram, x[:50], 2)
    gram.hessian.zero_()
    gram.update(x[50:], 2)
    torch.testing.assert_close(gram.hessian, filled(Gram, x).hessian)


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_of_two_processes_add_up(kind, x):
    one, other = filled(kind, x[:30], 1), filled(kind, x[30:], 3)
    for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
        mine += theirs
    torch.testing.assert_close(value(one), value(filled(kind, x)), rtol=1e-5, atol=1e-5)
    assert (one.samples, one.tokens) == (4, 100)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_half_precision_inputs_stay_finite(kind, dtype):
    statistic = filled(kind, torch.full((300, 3), 500.0, dtype=dtype), 1)
    assert statistic.finite()
    assert value(statistic).max() == pytest.approx(300 * 500.0**2 * (2 if kind is Gram else 1))


def test_a_large_sum_does_not_swamp_the_next_token():
    statistic = InputNorm(1)
    statistic.update(torch.full((1, 1), 2.0**13), 1)
    for _ in range(128):
        statistic.update(torch.ones(1, 1), 0)
    assert statistic.mean_square.item() == 2.0**26 + 128


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 6])
def test_one_bad_input_is_noticed(kind, bad, column):
    x = torch.ones(5, 7)
    assert filled(kind, x).finite()
    x[3, column] = bad
    assert not filled(kind, x).finite()


@pytest.mark.parametrize("kind", KINDS)
def test_without_tokens_all_is_zero_and_finite(kind):
    statistic = kind(5)
    statistic.update(torch.zeros(0, 5), 0)
    assert statistic.finite()
    assert statistic.tokens == statistic.samples == 0
    assert not value(statistic).any()
    assert SiteStats({kind: statistic}).unseen
    statistic.update(torch.zeros(1, 5), 1)
    assert not SiteStats({kind: statistic}).unseen


def test_weights_alone_are_not_unseen():
    assert not SiteStats({}).unseen


def test_a_statistic_that_was_not_declared_says_what_to_add(x):
    stats = SiteStats({Gram: filled(Gram, x)}, "model.layers.0.q_proj")
    with pytest.raises(TypeError, match=r"q_proj: InputNorm is read but only \{Gram\} .* add InputNorm to the `needs`"):
        stats[InputNorm]
    assert set(stats) == {Gram}
    assert len(stats) == 1


def test_what_is_derived_is_computed_once_per_input(x):
    calls = []

    def trace(stats):
        calls.append(stats.site)
        return stats[Gram].hessian.trace()

    memo = {}
    first = SiteStats({Gram: filled(Gram, x)}, "q", memo)
    second = SiteStats({Gram: first[Gram]}, "k", memo)
    assert first.derive(trace) is second.derive(trace)
    assert calls == ["q"]
