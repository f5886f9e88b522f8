"""Laws of the mask refinement by swaps."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import RecipeError
from prunus.methods import ELEMENTWISE as METHODS
from prunus.methods.elementwise import Elementwise
from prunus.metrics import METRICS, Wanda
from prunus.patterns import NM, Unstructured
from prunus.sites import Matrix
from prunus.statistics import InputMoments, InputNorm, SiteStats
from prunus.updates import DSnoT, Keep

SHAPE = (15, 32)
PATTERNS = {"row": Unstructured("row"), "matrix": Unstructured("matrix"), "2:4": NM(2, 4), "3:8": NM(3, 8)}


def problem(seed, shift=0.3):
    """Weights and the statistics of inputs whose means are not 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(90, SHAPE[1], generator=generator) + shift * torch.randn(SHAPE[1], generator=generator)
    stats = {InputNorm: InputNorm(SHAPE[1]), InputMoments: InputMoments(SHAPE[1])}
    for statistic in stats.values():
        statistic.update(x, 3)
    return torch.randn(SHAPE, generator=generator), SiteStats(stats)


def pruned(weight, stats, pattern, update, sparsity=0.5, metric=None):
    return Elementwise(metric or Wanda(), PATTERNS[pattern], update).prune(Matrix("a", weight, "b"), stats, sparsity)


def errors(weight, stats, mask):
    return (weight * ~mask).double() @ stats[InputMoments].mean.double()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 9999),
    pattern=st.sampled_from(sorted(PATTERNS)),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.8]),
    compat=st.sampled_from(["exact", "reference"]),
    metric=st.sampled_from(["magnitude", "wanda", "ria"]),
)
def test_every_row_and_every_group_keeps_its_count_and_kept_weights_stay(seed, pattern, sparsity, compat, metric):
    weight, stats = problem(seed)
    plain, edit = (
        pruned(weight, stats, pattern, update, sparsity, METRICS[metric]) for update in (Keep(), DSnoT(compat=compat))
    )
    size = getattr(PATTERNS[pattern], "m", SHAPE[1])
    assert torch.equal(edit.mask.reshape(-1, size).sum(1), plain.mask.reshape(-1, size).sum(1))
    assert torch.equal(edit.weight, weight * edit.mask)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 9999), pattern=st.sampled_from(sorted(PATTERNS)), threshold=st.sampled_from([0, 0.1, 3.0]))
def test_no_cycle_makes_an_error_larger_or_turns_its_sign(seed, pattern, threshold):
    weight, stats = problem(seed)
    start = errors(weight, stats, pruned(weight, stats, pattern, Keep()).mask)
    before = start
    for cycles in range(8):
        mask = pruned(weight, stats, pattern, DSnoT(cycles=cycles, threshold=threshold)).mask
        now = errors(weight, stats, mask)
        assert (now.abs() <= before.abs() * (1 + 1e-6)).all()
        assert (now.sign() == start.sign()).all()
        before = now


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_moves_the_mean_of_the_outputs_towards_the_dense_one(pattern):
    weight, stats = problem(1)
    plain, edit = (pruned(weight, stats, pattern, update).mask for update in (Keep(), DSnoT()))
    assert errors(weight, stats, edit).abs().mean() < 0.6 * errors(weight, stats, plain).abs().mean()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_a_cycle_the_mask_is_the_first_one(pattern):
    weight, stats = problem(2)
    assert torch.equal(
        pruned(weight, stats, pattern, DSnoT(cycles=0)).mask, pruned(weight, stats, pattern, Keep()).mask
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_cycle_is_one_swap_at_most(pattern):
    weight, stats = problem(3)
    first = pruned(weight, stats, pattern, Keep()).mask
    for cycles in (0, 1, 2):
        moved = (pruned(weight, stats, pattern, DSnoT(cycles=cycles, threshold=0)).mask != first).sum(1)
        assert moved.max() == 2 * cycles
        assert (moved % 2 == 0).all()


def test_a_row_within_the_threshold_stays():
    weight, stats = problem(4)
    first = pruned(weight, stats, "row", Keep()).mask
    size = errors(weight, stats, first).abs()
    middle = size.median().item()
    moved = (pruned(weight, stats, "row", DSnoT(threshold=middle)).mask != first).any(1)
    assert not moved[size <= middle].any()
    assert moved[size > middle].any()


def test_inputs_around_zero_give_no_reason_to_swap():
    x = torch.randn(50, SHAPE[1], generator=torch.Generator().manual_seed(5))
    stats = {InputNorm: InputNorm(SHAPE[1]), InputMoments: InputMoments(SHAPE[1])}
    for statistic in stats.values():
        statistic.update(torch.cat([x, -x]), 1)
    weight, _ = problem(5)
    edit, plain = (pruned(weight, SiteStats(stats), "row", update) for update in (DSnoT(), Keep()))
    assert torch.equal(edit.mask, plain.mask)


def test_an_input_that_does_not_vary_comes_back_first():
    weight, stats = problem(6)
    x = torch.randn(40, SHAPE[1], generator=torch.Generator().manual_seed(6))
    x[:, 9] = 1.0
    moments = InputMoments(SHAPE[1])
    moments.update(x, 1)
    weight[:, 9] = 0.01
    plain, edit = (
        pruned(weight, SiteStats({**stats, InputMoments: moments}), "row", update, metric=METRICS["magnitude"])
        for update in (Keep(), DSnoT(cycles=1))
    )
    assert not plain.mask[:, 9].any()
    wanted = errors(weight, SiteStats({InputMoments: moments}), plain.mask) > 0.5
    assert wanted.any()
    assert edit.mask[wanted, 9].all()


def test_many_rows_are_refined_as_few(monkeypatch):
    weight, stats = problem(7)
    whole = pruned(weight, stats, "row", DSnoT()).mask
    monkeypatch.setattr("prunus.updates.dsnot._PART", 2 * SHAPE[1])
    assert torch.equal(pruned(weight, stats, "row", DSnoT()).mask, whole)


def test_the_published_code_swings_around_zero_where_exact_stops():
    weight, stats = problem(8)
    start = errors(weight, stats, pruned(weight, stats, "row", Keep()).mask)
    exact, reference = (
        errors(weight, stats, pruned(weight, stats, "row", DSnoT(compat=compat, threshold=0)).mask)
        for compat in ("exact", "reference")
    )
    assert (exact.sign() == start.sign()).all()
    assert (reference.sign() != start.sign()).any()


def test_the_threshold_is_that_of_a_sample_and_not_of_all_tokens():
    weight, stats = problem(9)
    x = torch.randn(90, SHAPE[1], generator=torch.Generator().manual_seed(9)) + 1
    masks = []
    for times in (1, 4):
        moments = InputMoments(SHAPE[1])
        for _ in range(times):
            moments.update(x, 3)
        masks.append(pruned(weight, SiteStats({**stats, InputMoments: moments}), "row", DSnoT(threshold=20)).mask)
    assert torch.equal(*masks)


@pytest.mark.parametrize(
    "wrong", [{"cycles": -1}, {"threshold": -0.1}, {"variance_power": float("inf")}, {"compat": "refrence"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=f"update.{next(iter(wrong))}"):
        DSnoT(**wrong)


def test_the_method_refines_the_mask_of_wanda():
    assert replace(METHODS["dsnot"], update=Keep(), paper="") == replace(METHODS["wanda"], paper="")
