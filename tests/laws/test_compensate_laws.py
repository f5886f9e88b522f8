"""Closed forms are the minima that they claim to be."""

import pytest
import torch

from prunus.recovery.compensate import Refit, Rescaled
from prunus.recovery.pairs import Meeting, Wanted


def loss(weight, wanted, x):
    return float(((wanted - x @ weight.T) ** 2).sum())


def meeting(x, y, weights=None):
    """Sums over these tokens, each with the weight 1 unless said."""
    met = Meeting.empty(x.shape[1], y.shape[1], x.device)
    met.update(x, y, torch.ones(len(x), 1) if weights is None else weights)
    return met


def aims(weight, x, y=None, centred=False):
    """What a pruned matrix should give for x: what the dense one gives for y, or for x itself."""
    return meeting(x, x if y is None else y).aims(Wanted(weight), centred)


@pytest.fixture
def pruned(weight):
    """The weight without its smaller half in every row, and the mask."""
    mask = weight.abs() > weight.abs().median(1, keepdim=True).values
    return weight * mask, mask


@pytest.mark.parametrize("form", [Refit(), Rescaled()], ids=["refit", "scales"])
def test_a_closed_form_loses_less_and_keeps_the_zeros(form, weight, pruned, x):
    start, mask = pruned
    before = start.clone()
    found = form(start, weight, mask, aims(weight, x))
    assert loss(found, x @ weight.T, x) < loss(start, x @ weight.T, x)
    assert torch.equal(start, before)
    assert not found[~mask].any() and not torch.signbit(found[~mask]).any()


def test_refit_loses_less_than_scales(weight, pruned, x):
    start, mask = pruned
    found = [form(start, weight, mask, aims(weight, x)) for form in (Refit(), Rescaled())]
    assert loss(found[0], x @ weight.T, x) < loss(found[1], x @ weight.T, x)


@pytest.mark.parametrize("form", [Refit(), Rescaled()], ids=["refit", "scales"])
def test_what_the_dense_inputs_give_is_met_better_when_it_is_asked_for(form, weight, pruned, x):
    """x is what errors before it made of y: fitted to W·y it undoes some of them, fitted to W·x it cannot."""
    start, mask = pruned
    generator = torch.Generator().manual_seed(3)
    y = x @ (torch.eye(x.shape[1]) + 0.1 * torch.randn(x.shape[1], x.shape[1], generator=generator))
    wanted = y @ weight.T
    asked, unasked = (form(start, weight, mask, aims(weight, x, given)) for given in (y, x))
    assert loss(asked, wanted, x) < 0.98 * loss(unasked, wanted, x)
    told = form(start, weight, mask, meeting(x, wanted).aims(Wanted(), centred=False))
    assert torch.allclose(told, asked, atol=1e-3), "the outputs themselves say the same"


def test_refit_is_the_least_squares_of_every_row(weight, pruned, x):
    """Against a solver that sees the kept columns alone, up to what the damping gives away."""
    _, mask = pruned
    wanted = x @ weight.T
    found = Refit()(weight, weight, mask, aims(weight, x))
    for row, kept in enumerate(mask):
        best = torch.linalg.lstsq(x[:, kept].double(), wanted[:, row : row + 1].double()).solution
        least = float((x[:, kept].double() @ best - wanted[:, row : row + 1]).square().sum())
        assert loss(found[row : row + 1], wanted[:, row : row + 1], x) <= 1.05 * least + 1e-6


def test_a_token_of_weight_two_counts_twice(weight, x):
    twice = meeting(torch.cat([x, x[:3]]), torch.cat([x, x[:3]]))
    heavy = torch.ones(len(x), 1)
    heavy[:3] = 2
    once = meeting(x, x, heavy)
    for name in ("hessian", "crossed", "own", "other", "weight"):
        assert torch.allclose(torch.as_tensor(getattr(once, name)), torch.as_tensor(getattr(twice, name)), rtol=1e-4)


@pytest.mark.parametrize("told", [False, True], ids=["by the twin", "outputs"])
def test_a_bias_takes_the_means(told, weight, pruned, x):
    """With a bias the fit is that of inputs around their mean, and the mean output is the wanted one."""
    start, mask = pruned
    x, own = x + 1, torch.linspace(-1, 1, len(weight))
    wanted = x @ weight.T + own
    met, how = (meeting(x, wanted), Wanted()) if told else (meeting(x, x), Wanted(weight, own))
    found = Refit()(start, weight, mask, met.aims(how, centred=True))
    bias = met.bias(how, found)
    assert torch.allclose((x @ found.T + bias).mean(0), wanted.mean(0), atol=1e-3)
    plain = Refit()(start, weight, mask, met.aims(how, centred=False))
    assert loss(found, wanted - bias, x) < loss(plain, wanted - (wanted - x @ plain.T).mean(0), x)


def test_no_other_factor_of_a_row_loses_less(weight, pruned, x):
    start, mask = pruned
    found = Rescaled()(start, weight, mask, aims(weight, x))
    best = ((x @ (weight - found).T) ** 2).sum(0)
    for factor in (0.99, 1.01):
        assert (((x @ (weight - factor * found).T) ** 2).sum(0) >= best).all()


def test_columns_are_scaled_by_the_best_factors(weight, x):
    """Columns that were multiplied by known factors get them back."""
    factors = torch.linspace(0.5, 2.0, weight.shape[1])
    mask = torch.ones_like(weight, dtype=torch.bool)
    found = Rescaled()(weight / factors, weight, mask, aims(weight, x))
    assert torch.allclose(found, weight, rtol=1e-2, atol=1e-2)


def test_a_dead_input_a_lost_row_and_a_lost_column_do_no_harm(weight, pruned, x):
    start, mask = (value.clone() for value in pruned)
    x = x.clone()
    x[:, 3] = 0
    mask[2], mask[:, 5] = False, False
    start *= mask
    for form in (Refit(), Rescaled()):
        found = form(start, weight, mask, aims(weight, x))
        assert found.isfinite().all()
        assert not found[~mask].any()
