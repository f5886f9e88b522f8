"""Closed forms are the minima that they claim to be."""

import pytest
import torch

from prunus.recovery.compensate import Refit, Rescaled, shifted
from prunus.statistics import Gram, InputMoments


def loss(weight, dense, x):
    return float(((x @ (dense - weight).T) ** 2).sum())


@pytest.fixture
def pruned(weight):
    """The weight without its smaller half in every row, and the mask."""
    mask = weight.abs() > weight.abs().median(1, keepdim=True).values
    return weight * mask, mask


@pytest.mark.parametrize("form", [Refit(), Rescaled()], ids=["refit", "scales"])
def test_a_closed_form_loses_less_and_keeps_the_zeros(form, weight, pruned, x, gather):
    start, mask = pruned
    before = start.clone()
    found = form(start, weight, mask, gather(x, frozenset({Gram})))
    assert loss(found, weight, x) < loss(start, weight, x)
    assert torch.equal(start, before)
    assert not found[~mask].any() and not torch.signbit(found[~mask]).any()


def test_refit_loses_less_than_scales(weight, pruned, x, gather):
    start, mask = pruned
    found = [form(start, weight, mask, gather(x, frozenset({Gram}))) for form in (Refit(), Rescaled())]
    assert loss(found[0], weight, x) < loss(found[1], weight, x)


def test_no_other_factor_of_a_row_loses_less(weight, pruned, x, gather):
    start, mask = pruned
    found = Rescaled()(start, weight, mask, gather(x, frozenset({Gram})))
    best = ((x @ (weight - found).T) ** 2).sum(0)
    for factor in (0.99, 1.01):
        assert (((x @ (weight - factor * found).T) ** 2).sum(0) >= best).all()


def test_columns_are_scaled_by_the_best_factors(weight, x, gather):
    """Columns that were multiplied by known factors get them back."""
    factors = torch.linspace(0.5, 2.0, weight.shape[1])
    mask = torch.ones_like(weight, dtype=torch.bool)
    found = Rescaled()(weight / factors, weight, mask, gather(x, frozenset({Gram})))
    assert torch.allclose(found, weight, rtol=1e-2, atol=1e-2)


def test_a_dead_input_a_lost_row_and_a_lost_column_do_no_harm(weight, pruned, x, gather):
    start, mask = (value.clone() for value in pruned)
    x = x.clone()
    x[:, 3] = 0
    mask[2], mask[:, 5] = False, False
    start *= mask
    for form in (Refit(), Rescaled()):
        found = form(start, weight, mask, gather(x, frozenset({Gram})))
        assert found.isfinite().all()
        assert not found[~mask].any()


def test_the_shift_gives_the_dense_mean_output(weight, pruned, x, gather):
    start, _ = pruned
    x = x + 1
    shift = shifted(start, weight, gather(x, frozenset({InputMoments})))
    assert torch.allclose((x @ start.T + shift).mean(0), (x @ weight.T).mean(0), atol=1e-4)
