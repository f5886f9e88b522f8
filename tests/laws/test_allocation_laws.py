"""Laws of allocations, over the registry."""

import logging
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resident import EVEN, UNEVEN, Resident, model

from prunus.allocations import ALLOCATIONS, OWL, GlobalMagnitude, Manual, project
from prunus.errors import RecipeError
from prunus.patterns import NM
from prunus.patterns.selection import count
from prunus.sites import Matrix
from prunus.statistics import InputNorm, SiteStats


@pytest.fixture
def allocation(request, tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))  # what is measured here must not come from an earlier run
    chosen = ALLOCATIONS[request.param]
    if isinstance(chosen, Manual):
        file = tmp_path / "ratios.yaml"
        file.write_text('"*": 0.5\n')
        return replace(chosen, file=str(file))
    return chosen


every_allocation = pytest.mark.parametrize("allocation", ALLOCATIONS, indirect=True)


def removed(budget, survey):
    return sum(count(site.size, budget[site.name]) for site in survey.sites)


@every_allocation
@pytest.mark.parametrize("shapes", [EVEN, UNEVEN])
def test_every_site_gets_a_share_and_the_total_is_the_target(allocation, shapes):
    survey = model(shapes)
    budget = allocation.divide(survey, 0.5)
    assert list(budget) == [site.name for site in survey.sites]
    assert all(0 <= value <= 1 for value in budget.values())
    total = sum(site.size for site in survey.sites)
    assert sum(site.size * budget[site.name] for site in survey.sites) == pytest.approx(0.5 * total, abs=1)
    assert abs(removed(budget, survey) - 0.5 * total) <= len(survey.sites)


@every_allocation
def test_equal_blocks_get_equal_shares(allocation):
    survey = model(EVEN, equal=True)
    budget = allocation.divide(survey, 0.5)
    for site in ("m0", "m1"):
        shares = [budget[f"layers.{b}.{site}"] for b in range(5)]
        assert max(shares) - min(shares) <= 5 / 128  # a tie of equal weights falls to the first blocks


@every_allocation
def test_weights_are_not_changed_and_data_is_read_only_if_needed(allocation):
    survey = model(UNEVEN)
    before = [matrix.weight.clone() for block in survey.matrices.values() for matrix in block]
    allocation.divide(survey, 0.5)
    after = [matrix.weight for block in survey.matrices.values() for matrix in block]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert survey.data_passes <= bool(allocation.needs)


# project


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(st.tuples(st.floats(-2, 3), st.integers(1, 10**9)), min_size=1, max_size=20),
    target=st.floats(0.0, 0.99),
)
def test_a_projection_meets_its_target_within_bounds_and_keeps_the_order(groups, target):
    raw = {str(i): value for i, (value, _) in enumerate(groups)}
    sizes = {str(i): size for i, (_, size) in enumerate(groups)}
    shares = project(raw, sizes, target)
    assert all(0 <= value <= 0.99 for value in shares.values())
    reached = sum(shares[i] * sizes[i] for i in raw) / sum(sizes.values())
    assert reached == pytest.approx(target, abs=1e-9)
    order = sorted(raw, key=raw.get)
    assert all(shares[a] <= shares[b] + 1e-12 for a, b in pairwise(order))


def test_a_projection_without_clipping_only_shifts():
    shares = project({"a": 0.4, "b": 0.6, "c": 0.9}, {"a": 1, "b": 1, "c": 2}, 0.5)
    assert shares == pytest.approx({"a": 0.2, "b": 0.4, "c": 0.7})


def test_a_projection_equals_bisection():
    raw, sizes = {"a": -0.5, "b": 0.5, "c": 2.0, "d": 0.7}, {"a": 3, "b": 5, "c": 7, "d": 1}
    low, high = -3.0, 3.0
    for _ in range(200):
        middle = (low + high) / 2
        reached = sum(sizes[g] * min(max(raw[g] + middle, 0), 0.99) for g in raw) / 16
        low, high = (middle, high) if reached < 0.6 else (low, middle)
    wanted = {g: min(max(raw[g] + low, 0), 0.99) for g in raw}
    assert project(raw, sizes, 0.6) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("target,words", [(0.995, "0.99.*0.005"), (0.1, "0.2.*0.1 ")])
def test_an_unreachable_target_says_by_how_much(target, words):
    with pytest.raises(RecipeError, match=words):
        project({"a": 0.5}, {"a": 9}, target, low=0.2)


# OWL


def with_outliers(shares):
    """Blocks of one 10 x 100 matrix, white input; `shares` of the weights are 100 times larger."""
    blocks = {}
    for b, many in enumerate(shares):
        weight = torch.ones(1000)
        weight[:many] = 100.0
        blocks[f"layers.{b}"] = {"m": (weight.reshape(10, 100), torch.eye(100))}
    return Resident(blocks)


def test_owl_with_one_outlying_block_gives_the_published_numbers():
    for compat in ("exact", "reference"):
        budget = OWL(span=0.08, compat=compat).divide(with_outliers([20] + [0] * 7), 0.7)
        assert list(budget.values()) == pytest.approx([0.56] + [0.72] * 7, abs=1e-12)


def test_owl_spans_twice_its_span_in_the_reverse_order_of_outliers():
    survey = with_outliers([0, 5, 9, 2, 7])
    shares = list(OWL(span=0.06).divide(survey, 0.7).values())
    assert sum(shares) / 5 == pytest.approx(0.7, abs=1e-12)
    assert max(shares) - min(shares) == pytest.approx(0.12, abs=1e-12)
    assert sorted(range(5), key=lambda b: -shares[b]) == [0, 3, 1, 4, 2]


@pytest.mark.parametrize("compat", ["exact", "reference"])
def test_owl_without_span_or_without_differences_is_uniform(compat):
    flat = OWL(span=0, compat=compat).divide(model(UNEVEN), 0.6)
    same = OWL(compat=compat).divide(with_outliers([3, 3, 3]), 0.6)
    assert list(flat.values()) == pytest.approx([0.6] * 6, abs=1e-12)
    assert list(same.values()) == [0.6] * 3


def test_owl_stays_within_bounds_at_high_sparsity_and_uneven_blocks():
    survey = model(UNEVEN)
    budget = OWL(span=0.2).divide(survey, 0.95)
    total = sum(site.size for site in survey.sites)
    assert max(budget.values()) <= 0.99
    assert sum(site.size * budget[site.name] for site in survey.sites) == pytest.approx(0.95 * total, rel=1e-9)
    assert len({budget["layers.1.m0"], budget["layers.1.m1"]}) == 1


def test_owl_as_published_only_replaces_what_is_not_positive():
    budget = OWL(span=0.4, compat="reference").divide(with_outliers([9, 0, 0, 0]), 0.05)
    assert budget["layers.0.m"] == 0.01
    assert budget["layers.1.m"] == pytest.approx(0.25)


def test_an_outlier_ratio_by_hand():
    norm = InputNorm(5)
    norm.update(torch.eye(5), 1)
    weight = torch.tensor([[1.0, -1, 1, 1, -100]])
    found = OWL(multiple=4).outliers([Matrix("a", weight, "b")], {"a": SiteStats({InputNorm: norm})})
    assert found.item() == 0.2  # mean 20.8, threshold 83.2


def test_an_outlier_ratio_sees_one_mean_over_the_matrices_of_its_block():
    def ratio(*factors):
        generator = torch.Generator().manual_seed(0)
        sites = {}
        for i, factor in enumerate(factors):
            sites[f"m{i}"] = (torch.randn(9, 8, generator=generator) * factor, torch.randn(30, 8, generator=generator))
        survey = Resident({"b": sites})
        return survey.measure(OWL(multiple=2).outliers, frozenset({InputNorm}))["b"].item()

    assert ratio(1, 1) == ratio(4, 4) != ratio(1, 4)


def test_an_expert_without_tokens_has_no_outliers_and_hides_none():
    seen = (torch.randn(9, 8), torch.randn(30, 8))
    unseen = (torch.randn(9, 8) * 100, torch.zeros(0, 8))
    for with_unseen in ({"m0": seen}, {"m0": seen, "m1": unseen}):
        survey = Resident({"b": with_unseen})
        found = survey.measure(OWL(multiple=2).outliers, frozenset({InputNorm}))["b"].item()
        assert found == Resident({"b": {"m0": seen}}).measure(OWL(multiple=2).outliers, frozenset({InputNorm}))["b"]
    assert OWL().divide(Resident({"b": {"m": unseen}, "c": {"m": unseen}}), 0.5) == {"b.m": 0.5, "c.m": 0.5}


def test_owl_mixes_nm_patterns_to_the_target():
    survey = with_outliers([20, 3, 0, 1, 0, 0, 4, 0])
    budget = OWL(span=0.2).divide(survey, 0.625)
    settled = NM(3, 8).settle(budget, {site.name: site.size for site in survey.sites}, 0.625)
    assert sum(8 - 8 * value for value in settled.values()) == 3 * 8
    assert settled["layers.0.m"] == min(settled.values()) < max(settled.values())


@pytest.mark.parametrize("wrong", [{"multiple": 0}, {"span": -0.1}, {"span": 0.6}, {"compat": "x"}])
def test_owl_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=f"allocation.{next(iter(wrong))}"):
        OWL(**wrong)


# global magnitude


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.37, 0.5, 0.9, 0.999])
def test_the_global_threshold_is_that_of_sorting_everything(dtype, sparsity):
    survey = model(UNEVEN, dtype=dtype)
    budget = GlobalMagnitude().divide(survey, sparsity)
    flat = [matrix.weight.float().abs().flatten() for block in survey.matrices.values() for matrix in block]
    order = torch.cat(flat).sort(stable=True).indices[: count(sum(map(len, flat)), sparsity)]
    owner = torch.cat([torch.full((len(part),), i) for i, part in enumerate(flat)])[order]
    wanted = torch.bincount(owner, minlength=len(flat)).tolist()
    assert [count(site.size, budget[site.name]) for site in survey.sites] == wanted


def test_equal_weights_everywhere_go_in_module_order():
    survey = Resident({f"b{i}": {"m": (torch.full((4, 4), -0.5), torch.zeros(0, 4))} for i in range(3)})
    assert GlobalMagnitude().divide(survey, 0.5) == {"b0.m": 1.0, "b1.m": 0.5, "b2.m": 0.0}


def test_an_emptied_matrix_is_reported(caplog):
    survey = Resident({f"b{i}": {"m": (torch.randn(4, 4) * 10**i, torch.zeros(0, 4))} for i in range(0, 8, 4)})
    with caplog.at_level(logging.WARNING, "prunus"):
        budget = GlobalMagnitude().divide(survey, 0.5)
    assert budget == {"b0.m": 1.0, "b4.m": 0.0}
    assert "b0.m" in caplog.text


@every_allocation
def test_what_calls_itself_foreseeable_looks_at_the_sites_alone(allocation):
    survey = model(EVEN)
    asked = []
    for name in ("measure", "trials", "whole"):
        real = getattr(survey, name)
        setattr(survey, name, lambda *given, real=real, **others: asked.append(1) or real(*given, **others))
    allocation.divide(survey, 0.5)
    assert allocation.foreseeable == (not asked)
