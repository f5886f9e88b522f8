"""Whatever the input: the target is met, nothing is emptied, nothing is NaN; and the projection that multiplies."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resident import UNEVEN, Resident, model

from prunus.allocations import ALLOCATIONS, DLP, LAMP, AlphaPruning, ErdosRenyi, project, scale
from prunus.errors import RecipeError

# Formulas. The others do as they are told (a file, a threshold that knows no bound), or have laws of their own.
OTHERS = {"manual", "global_magnitude", "ecoflap", "search"}
BOUNDED = [name for name in ALLOCATIONS if name not in OTHERS]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    torch.manual_seed(0)


def blocks(*weights):
    """One matrix each, and its inputs."""
    return Resident({f"b{i}": {"m": (w, torch.randn(30, w.shape[1]))} for i, w in enumerate(weights)})


def mean(budget, survey):
    return sum(site.size * budget[site.name] for site in survey.sites) / sum(site.size for site in survey.sites)


def outlier(rows, columns):
    weight = torch.full((rows, columns), 1e-3)
    weight[0, 0] = 1e4
    return weight


HARD = {
    "zeros beside weights": lambda: blocks(torch.zeros(20, 30), torch.randn(20, 30), torch.randn(30, 20)),
    "rank one": lambda: blocks(torch.ones(20, 30), torch.randn(20, 1) @ torch.randn(1, 30), torch.randn(20, 30)),
    "far scales": lambda: blocks(torch.randn(20, 30) * 1e-12, torch.randn(20, 30) * 1e9, torch.randn(20, 30)),
    "one outlier": lambda: blocks(outlier(20, 30), outlier(30, 30), torch.randn(20, 30)),
    "single rows": lambda: blocks(torch.randn(1, 40), torch.randn(40, 1), torch.randn(20, 30), torch.randn(1, 1)),
    "uneven": lambda: model(UNEVEN),
}


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("hard", HARD)
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.5, 0.7, 0.95, 0.99])
def test_hard_inputs_meet_the_target_and_empty_nothing(name, hard, sparsity):
    survey = HARD[hard]()
    budget = ALLOCATIONS[name].divide(survey, sparsity)
    assert all(0 <= value <= 0.99 for value in budget.values()), budget
    # LAMP counts whole weights.
    assert mean(budget, survey) == pytest.approx(sparsity, abs=1 / sum(site.size for site in survey.sites))


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("weight", [torch.zeros(20, 30), torch.ones(20, 30), torch.eye(24)])
def test_without_differences_all_blocks_are_alike(name, weight):
    survey = Resident({f"b{i}": {"m": (weight.clone(), torch.ones(5, weight.shape[1]))} for i in range(4)})
    budget = ALLOCATIONS[name].divide(survey, 0.7)
    assert list(budget.values()) == pytest.approx([0.7] * 4, abs=1 / weight.numel())


@pytest.mark.parametrize("name", [name for name in BOUNDED if name != "uniform"])
def test_a_target_above_the_bound_is_refused(name):
    with pytest.raises(RecipeError, match=r"0\.995 cannot be reached.*0\.99, 0\.005 away"):
        ALLOCATIONS[name].divide(model(UNEVEN), 0.995)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_model_without_sites_has_an_empty_budget(name):
    assert ALLOCATIONS[name].divide(Resident({}), 0.5) == {}


def test_lamp_takes_first_what_costs_nothing():
    survey = blocks(torch.zeros(20, 30), torch.randn(20, 30), torch.randn(20, 30))
    budget = LAMP().divide(survey, 0.3)
    assert budget["b0.m"] > 0.89 > 0.05 > max(budget["b1.m"], budget["b2.m"])


def test_lamp_does_not_see_the_scale_of_a_matrix():
    survey, scaled = model(UNEVEN), model(UNEVEN)
    for i, block in enumerate(scaled.matrices.values()):
        for matrix in block:
            matrix.weight.mul_(4.0**i)
    assert LAMP().divide(survey, 0.6) == LAMP().divide(scaled, 0.6)


def test_erdos_renyi_prunes_large_matrices_more_and_equal_shapes_alike():
    survey = model([[(8, 16), (64, 64)], [(16, 8), (8, 16)]])
    budget = ErdosRenyi().divide(survey, 0.8)
    assert budget["layers.0.m1"] > budget["layers.0.m0"] == budget["layers.1.m0"] == budget["layers.1.m1"]


@pytest.mark.parametrize("wrong", [{"span": -0.1}, {"span": 0.6}, {"compat": "x"}])
def test_dlp_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=f"allocation.{next(iter(wrong))}"):
        DLP(**wrong)


@pytest.mark.parametrize("fit", ["peak", "median", "peak_compat"])
@pytest.mark.parametrize("aspect", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("level", ["block", "matrix"])
def test_every_setting_of_alphapruning_meets_the_target(fit, aspect, level):
    survey = model([[(30, 20), (20, 60)], [(40, 40)], [(10, 50), (24, 24), (30, 20)]])
    budget = AlphaPruning(fit=fit, aspect=aspect, level=level, span=0.2).divide(survey, 0.8)
    assert mean(budget, survey) == pytest.approx(0.8, abs=1e-12)
    assert 0 < min(budget.values()) < max(budget.values()) <= 0.99
    if level == "block":
        assert len({budget[site.name] for site in survey.sites}) == 3


# scale


def by_number(groups):
    return {str(i): value for i, (value, _) in enumerate(groups)}, {str(i): size for i, (_, size) in enumerate(groups)}


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.tuples(st.floats(1e-9, 1e9), st.integers(1, 10**9)), min_size=1, max_size=20),
    low=st.floats(0.0, 0.3),
    room=st.floats(0.0, 1.0),
)
def test_scaling_meets_its_target_within_bounds_and_keeps_order_and_ratios(groups, low, room):
    raw, sizes = by_number(groups)
    target = low + room * (0.99 - low)
    shares = scale(raw, sizes, target, low=low)
    assert all(low <= value <= 0.99 for value in shares.values())
    assert sum(shares[i] * sizes[i] for i in raw) / sum(sizes.values()) == pytest.approx(target, abs=1e-9)
    assert all(shares[a] <= shares[b] + 1e-12 for a, b in pairwise(sorted(raw, key=raw.get)))
    free = [i for i in raw if low < shares[i] < 0.99]
    factors = [shares[i] / raw[i] for i in free]
    assert factors == pytest.approx([factors[0]] * len(free), rel=1e-6) if free else True


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.tuples(st.floats(0.1, 10), st.integers(1, 1000)), min_size=1, max_size=9),
    factor=st.floats(1e-6, 1e6),
    target=st.floats(0.01, 0.98),
)
def test_scaling_what_is_scaled_changes_nothing(groups, factor, target):
    raw, sizes = by_number(groups)
    again = scale({group: factor * value for group, value in raw.items()}, sizes, target)
    assert again == pytest.approx(scale(raw, sizes, target), rel=1e-9)


def test_scaling_without_clipping_only_multiplies():
    shares = scale({"a": 1.0, "b": 2.0, "c": 3.0}, {"a": 1, "b": 1, "c": 2}, 0.45)
    assert shares == pytest.approx({"a": 0.2, "b": 0.4, "c": 0.6}, abs=1e-15)


def test_scaling_equals_bisection():
    raw, sizes = {"a": 0.1, "b": 0.5, "c": 2.0, "d": 0.7}, {"a": 3, "b": 5, "c": 7, "d": 1}
    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        reached = sum(sizes[g] * min(max(raw[g] * middle, 0.1), 0.99) for g in raw) / 16
        low, high = (middle, high) if reached < 0.8 else (low, middle)
    wanted = {g: min(max(raw[g] * low, 0.1), 0.99) for g in raw}
    assert scale(raw, sizes, 0.8, low=0.1) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("projector", [project, scale])
@pytest.mark.parametrize("target,words", [(0.995, "0.99.*0.005"), (0.1, "0.2.*0.1 ")])
def test_both_projections_refuse_alike(projector, target, words):
    with pytest.raises(RecipeError, match=words):
        projector({"a": 0.5}, {"a": 9}, target, low=0.2)
