"""Laws of counts of experts, of the searches among their subsets, and of what tells how redundant they are."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunus.errors import RecipeError
from prunus.methods.experts.choice import Case, Exhaustive, Genetic, child, every, founders, mask, number
from prunus.methods.experts.counts import apportioned
from prunus.methods.experts.redundancy import cosine
from prunus.sites import Pool


def pool(experts: int = 8, chosen: int = 2, spans: int = 1, name: str = "m", price: int = 96) -> Pool:
    return Pool(name, "b", experts, "r", chosen, spans, spans, torch.full((experts,), price))


def case(one: Pool, left: int, costs: torch.Tensor) -> Case:
    """A mixture whose distance is a quadratic form of what goes."""

    def distance(keep: torch.Tensor) -> float:
        gone = (~keep).double()
        return float(gone @ costs @ gone)

    return Case(one, None, SimpleNamespace(distance=distance), left)  # type: ignore[arg-type]


def costs_of(experts: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(experts, experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


shapes = st.lists(
    st.tuples(st.sampled_from([(8, 2, 1), (8, 2, 2), (4, 1, 1), (16, 4, 4)]), st.floats(0, 10)), min_size=1, max_size=6
)


@given(shapes, st.floats(0, 1), st.sampled_from(["inverse", "rank"]))
def test_counts_meet_the_budget_and_leave_what_routers_need(shapes, share, counts):
    pools = [pool(*shape, name=str(number)) for number, (shape, _) in enumerate(shapes)]
    importance = {str(number): value for number, (_, value) in enumerate(shapes)}
    spare = {one.name: one.groups - one.least for one in pools}
    wanted = share * sum(spare.values()) * 96
    left = apportioned(pools, importance, wanted, counts)
    gone = {one.name: one.groups - left[one.name] for one in pools}
    assert all(0 <= gone[one.name] <= spare[one.name] and gone[one.name] % one.spans == 0 for one in pools)
    assert abs(sum(gone.values()) * 96 - wanted) <= 96 * max(one.spans for one in pools) / 2 + 1e-6


@given(st.integers(1, 7), st.integers(0, 30), st.sampled_from(["inverse", "rank"]), st.floats(0, 5))
def test_equal_importances_give_equal_counts(mixtures, gone, counts, value):
    pools = [pool(name=str(number)) for number in range(mixtures)]
    left = apportioned(pools, {one.name: value for one in pools}, min(gone, 6 * mixtures) * 96, counts)
    assert max(left.values()) - min(left.values()) <= 1
    assert sum(left.values()) == 8 * mixtures - min(gone, 6 * mixtures)


@pytest.mark.parametrize("counts", ["inverse", "rank"])
def test_what_is_more_important_keeps_more(counts):
    pools = [pool(name=name) for name in "abc"]
    left = apportioned(pools, {"a": 1.0, "b": 4.0, "c": 2.0}, 7 * 96, counts)
    assert left["b"] > left["c"] > left["a"]
    assert left == {"inverse": {"a": 4, "b": 7, "c": 6}, "rank": {"a": 4, "b": 7, "c": 6}}[counts]  # 4, 1, 2 of 7


@pytest.mark.parametrize(("experts", "left", "spans"), [(8, 6, 1), (8, 4, 2)])
def test_the_exhaustive_search_finds_the_least_of_all_subsets(experts, left, spans):
    one, costs = pool(experts, spans=spans), costs_of(experts)
    found = Exhaustive()(case(one, left, costs))
    each, size = (experts - left) // spans, experts // spans
    subsets = [
        gone
        for gone in itertools.combinations(range(experts), experts - left)
        if all(sum(number // size == span for number in gone) == each for span in range(spans))
    ]
    by_hand = min(subsets, key=lambda gone: float(costs[list(gone)][:, list(gone)].sum()))
    assert (~found[0]).nonzero().flatten().tolist() == list(by_hand)
    assert number(one, left) == len(subsets) == len(set(every(one, left)))


def test_few_subsets_are_all_tried_by_the_genetic_search_too():
    one, costs = pool(8), costs_of(8, 1)
    assert torch.equal(Genetic()(case(one, 6, costs))[0], Exhaustive()(case(one, 6, costs))[0])


@pytest.mark.parametrize("spans", [1, 2])
def test_the_genetic_search_finds_the_optimum_without_trying_all(spans):
    one, costs = pool(16, spans=spans), costs_of(16, 2)
    search = Genetic(population=40, generations=30)
    tried = []
    measured = case(one, 10, costs)
    whole = measured.replay.distance
    counted = replace(measured, replay=SimpleNamespace(distance=lambda keep: tried.append(1) or whole(keep)))
    found = search(counted)
    assert len(tried) < number(one, 10) / 2
    assert torch.equal(found[0], Exhaustive()(measured)[0])
    values = [whole(keep) for keep in found]
    assert values == sorted(values) and len({tuple(keep.tolist()) for keep in found}) == 3, (
        "the best first, all different"
    )
    assert torch.equal(search(measured), found), "the same seed"


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]))
def test_children_remove_as_many_as_their_parents_from_every_group(seed, spans):
    one, dice = pool(16, spans=spans), random.Random(seed)
    mother, father = founders(one, 8, 2, dice)
    born = child(one, mother, father, dice)
    assert mask(one, born).unflatten(0, (spans, -1)).sum(1).tolist() == [8 // spans] * spans
    assert len(set(born) - {*mother, *father}) <= 1, "what neither parent removes is there by mutation alone"


def test_the_cosine_of_experts_is_that_of_their_outputs_pair_by_pair():
    outputs = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(3))
    pairs = [
        float(torch.nn.functional.cosine_similarity(outputs[i, t], outputs[j, t], dim=0))
        for i, j in itertools.combinations(range(4), 2)
        for t in range(6)
    ]
    assert cosine(outputs) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert cosine(outputs[:1].expand(4, -1, -1)) == pytest.approx(1.0)
    assert cosine(torch.eye(4)[:, None]) == pytest.approx(0.0)


def test_what_cannot_be_tried_is_refused_before_the_work():
    with pytest.raises(RecipeError, match=r"m has 488,526,937,079,580 subsets of 48 of 64 experts.*moe-i2 or reap"):
        Exhaustive().check(pool(64), 48)
    Genetic().check(pool(64), 48)
