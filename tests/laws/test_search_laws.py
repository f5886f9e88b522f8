"""The search never loses to its start, keeps the total, and goes on where it was stopped."""

import pytest
import torch
from resident import EVEN, UNEVEN, model

from prunus.allocations.search import Masked, Search, _norms
from prunus.errors import RecipeError
from prunus.patterns.selection import count
from prunus.statistics import InputNorm

SHORT = {"trials": 30, "minutes": 1e6}


class Distant:
    """A survey whose loss is how far the model's outputs are from the dense ones."""

    def __init__(self, shapes, seed=0):
        self.inner = model(shapes, seed)
        self.dense = {b: [m.weight.clone() for m in ms] for b, ms in self.inner.matrices.items()}
        self.inner.losses = self.losses

    def losses(self, batches=None):
        found = torch.zeros(2, dtype=torch.float64)
        for block, sites in self.inner.blocks.items():
            for (weight, x), dense in zip(sites.values(), self.dense[block], strict=True):
                lost = (x[:20] @ (weight - dense).T).square().sum(1)
                found += torch.stack([lost[:10].sum(), lost[10:].sum()]).double()
        return found[:batches]

    def of(self, budget):
        norms = self.inner.measure(_norms, frozenset({InputNorm}))
        with self.inner.whole(1) as (matrices, losses):
            return Masked(matrices, norms).loss(budget, losses)


@pytest.mark.parametrize("shapes", [EVEN, UNEVEN])
@pytest.mark.parametrize("level", ["block", "matrix"])
@pytest.mark.parametrize("start", ["uniform", "owl", "er"])
def test_the_result_is_better_than_the_start_and_removes_as_much(shapes, level, start):
    survey = Distant(shapes)
    search = Search(start=start, level=level, **SHORT)
    begun, found = search._start().divide(survey.inner, 0.6), search.divide(survey.inner, 0.6)
    sizes = {site.name: site.size for site in survey.inner.sites}
    removed = [sum(count(sizes[name], value) for name, value in budget.items()) for budget in (begun, found)]
    assert removed[0] == removed[1]
    assert survey.of(found) < survey.of(begun)
    assert all(0 <= value <= 0.99 + 1e-9 for value in found.values())


@pytest.mark.parametrize("after", [2, 7, 29])
def test_a_stopped_search_goes_on_to_the_same_result(after):
    search = Search(start="owl", **SHORT)
    whole = search.divide(Distant(UNEVEN).inner, 0.6)
    survey = Distant(UNEVEN).inner
    survey.patience = after
    with pytest.raises(KeyboardInterrupt):
        search.divide(survey, 0.6)
    survey.patience = None
    for block, weights in zip(survey.matrices.values(), Distant(UNEVEN).dense.values(), strict=True):
        for matrix, dense in zip(block, weights, strict=True):
            matrix.weight.copy_(dense)  # a new process loads the dense model again
    assert search.divide(survey, 0.6) == whole


def test_another_seed_searches_elsewhere():
    one, other = (Search(seed=seed, **SHORT).divide(Distant(UNEVEN).inner, 0.6) for seed in (0, 1))
    assert one != other


def test_time_is_up_after_one_generation():
    survey = Distant(UNEVEN).inner
    Search(minutes=1e-9, trials=100).divide(survey, 0.6)
    assert survey.notes["search"]["generation"] == 1


def test_an_unknown_start_is_refused_with_the_names():
    for start in ("search", "owll"):
        with pytest.raises(RecipeError, match="owl"):
            Search(start=start).divide(model(EVEN), 0.5)
