"""Laws of the damped Hessian: what cannot be factored says so."""

import logging

import pytest
import torch

from prunus.errors import RecipeError
from prunus.factor import Factor
from prunus.statistics import Gram, SiteStats


def gram_of(hessian):
    gram = Gram(len(hessian))
    gram.update(torch.zeros(1, len(hessian)), 2)
    gram.tensors()[0].copy_(hessian)
    return SiteStats({Gram: gram}, "model.layers.3.q_proj")


def test_more_damping_than_wanted_is_never_silent(caplog):
    hessian = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    with caplog.at_level(logging.WARNING, "prunus"):
        factored = Factor(0.01)(gram_of(hessian))
    assert factored.damp == pytest.approx(0.1)
    assert "model.layers.3.q_proj" in caplog.text
    assert "damp 0.1" in caplog.text
    torch.testing.assert_close(factored.upper @ factored.upper.T, hessian + 0.1 * torch.eye(2))


def test_what_float32_cannot_factor_float64_may(caplog):
    with caplog.at_level(logging.WARNING, "prunus"):
        factored = Factor(1e-12)(gram_of(torch.ones(2, 2)))
    assert factored.upper.isfinite().all()
    assert "not 1e-12" in caplog.text


@pytest.mark.parametrize("damp", [0.0, 0.001])
def test_a_hessian_that_cannot_be_factored_stops_with_the_site_and_the_cure(damp):
    with pytest.raises(RecipeError, match=r"model.layers.3.q_proj.*--set update.damp="):
        Factor(damp)(gram_of(torch.tensor([[1.0, 9.0], [9.0, 1.0]])))
