"""Laws of every metric, pattern and update together, over the registries."""

import logging
from dataclasses import replace

import pytest
import torch

from prunus.errors import CalibrationError, ModelError
from prunus.methods import ELEMENTWISE as METHODS
from prunus.methods.compose import compose
from prunus.methods.elementwise import Elementwise
from prunus.metrics import METRICS
from prunus.patterns import NM, Unstructured
from prunus.patterns.selection import count
from prunus.statistics import Gram, SiteStats
from prunus.updates import UPDATES

PATTERNS = {"row": Unstructured("row"), "matrix": Unstructured("matrix"), "2:4": NM(2, 4), "5:8": NM(5, 8)}
COMBINATIONS = [(m, p, u) for m in METRICS for p in PATTERNS for u in UPDATES]
every_combination = pytest.mark.parametrize("metric,pattern,update", COMBINATIONS)
every_metric = pytest.mark.parametrize("name", METRICS)


def method(metric, pattern, update="keep"):
    return Elementwise(METRICS[metric], PATTERNS[pattern], UPDATES[update])


def pruned_counts(pattern, mask):
    rows = {"row": mask, "matrix": mask.reshape(1, -1)}.get(pattern)
    if rows is None:
        rows = mask.reshape(-1, PATTERNS[pattern].m)
    return (~rows).sum(1), rows.shape[1]


@every_combination
@pytest.mark.parametrize("sparsity", [0.0, 0.375, 0.5, 0.71])
def test_counts_are_exact_and_the_mask_is_respected(metric, pattern, update, sparsity, weight, x, gather, site):
    dtype = torch.bfloat16 if sparsity == 0.5 else torch.float32
    weight = weight.to(dtype)
    before = weight.clone()
    edit = method(metric, pattern, update).prune(site(weight), gather(x), sparsity)
    counts, size = pruned_counts(pattern, edit.mask)
    assert (counts == count(size, sparsity)).all()
    assert edit.mask.dtype == torch.bool
    assert edit.weight.shape == edit.mask.shape == weight.shape
    assert edit.weight.isfinite().all()
    assert not edit.weight[~edit.mask].any()
    assert not edit.weight[~edit.mask].signbit().any()
    assert torch.equal(weight, before)
    if sparsity == 0:
        assert torch.equal(edit.weight.to(dtype), weight)


@every_combination
def test_a_part_reads_no_statistic_that_it_does_not_declare(metric, pattern, update, weight, x, gather, site):
    chosen = method(metric, pattern, update)
    chosen.prune(site(weight), gather(x, chosen.needs), 0.5)


@every_combination
def test_heavy_ties_do_not_change_the_count(metric, pattern, update, x, gather, site):
    for weight in (torch.ones(12, 24), torch.zeros(12, 24), torch.full((12, 24), -0.5, dtype=torch.bfloat16)):
        edit = method(metric, pattern, update).prune(site(weight), gather(x), 0.5)
        counts, size = pruned_counts(pattern, edit.mask)
        assert (counts == size // 2).all()
        assert edit.weight.isfinite().all()


@every_combination
def test_a_view_of_a_transposed_weight_gives_the_same(metric, pattern, update, weight, x, gather, site):
    chosen = method(metric, pattern, update)
    straight = chosen.prune(site(weight), gather(x), 0.5)
    turned = chosen.prune(site(weight.T.contiguous().T), gather(x), 0.5)
    assert torch.equal(straight.mask, turned.mask)
    assert torch.equal(straight.weight, turned.weight)


@every_combination
def test_the_same_job_twice_gives_the_same_bits(metric, pattern, update, weight, x, gather, site):
    first, second = (method(metric, pattern, update).prune(site(weight), gather(x), 0.5) for _ in range(2))
    assert torch.equal(first.weight, second.weight)


@every_combination
def test_few_tokens_never_crash(metric, pattern, update, weight, x, gather, site):
    for tokens in (1, 3):
        edit = method(metric, pattern, update).prune(site(weight), gather(x[:tokens]), 0.5)
        assert edit.weight.isfinite().all()
        assert (~edit.mask).sum() == pytest.approx(144, abs=0.5 if pattern != "5:8" else 48)


@every_combination
def test_without_a_token_magnitude_decides_and_says_so(metric, pattern, update, weight, gather, site, caplog):
    chosen = method(metric, pattern, update)
    with caplog.at_level(logging.INFO, "prunus"):
        edit = chosen.prune(site(weight), gather(torch.zeros(0, 24), chosen.needs), 0.5)
    blind = Elementwise(METRICS["magnitude"], PATTERNS[pattern])
    if update == "keep":
        assert torch.equal(edit.mask, blind.prune(site(weight), SiteStats({}), 0.5).mask)
    assert torch.equal(edit.weight, weight * edit.mask)
    assert ("saw no calibration token" in caplog.text) == bool(chosen.needs)
    assert not chosen.needs or "model.layers.3.mlp.up_proj" in caplog.text


@every_combination
def test_a_weight_that_is_no_number_is_refused_by_name(metric, pattern, update, weight, x, gather, site):
    for bad in (float("nan"), float("inf")):
        broken = weight.clone()
        broken[3, 4] = bad
        with pytest.raises(ModelError, match="up_proj"):
            method(metric, pattern, update).prune(site(broken), gather(x), 0.5)


@pytest.mark.parametrize("name", METHODS)
def test_kept_weights_stay_as_they_are_unless_updated(name, weight, x, gather, site):
    weight[0, 0], weight[5, 3] = -0.0, 100.0
    edit = METHODS[name].prune(site(weight), gather(x), 0.5)
    if METHODS[name].update == UPDATES["keep"]:
        kept = edit.weight[edit.mask]
        assert torch.equal(kept.view(torch.int32), weight[edit.mask].view(torch.int32))


@every_metric
def test_rows_may_come_in_any_order(name, weight, x, gather):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    whole = slice(0, 24)
    straight = METRICS[name](weight, gather(x))(weight, whole)
    permuted = METRICS[name](weight[order], gather(x))(weight[order], whole)
    torch.testing.assert_close(permuted, straight[order])


@pytest.mark.parametrize("name", [name for name in METRICS if name != "obs"])
def test_inputs_may_come_in_any_order(name, weight, x, gather):
    # Not for OBS: what a weight costs depends on which columns are still free to make up for it.
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    whole = slice(0, 24)
    straight = METRICS[name](weight, gather(x))(weight, whole)
    permuted = METRICS[name](weight[:, order], gather(x[:, order]))(weight[:, order], whole)
    torch.testing.assert_close(permuted, straight[:, order])


@every_metric
def test_signs_do_not_matter(name, weight, x, gather):
    scorer = METRICS[name](weight, gather(x))
    assert torch.equal(scorer(weight, slice(0, 24)), scorer(-weight, slice(0, 24)))
    assert (scorer(weight, slice(0, 24)) >= 0).all()


@every_metric
def test_some_columns_score_as_they_do_among_all(name, weight, x, gather):
    scorer = METRICS[name](weight, gather(x))
    assert torch.equal(scorer(weight[:, 5:9], slice(5, 9)), scorer(weight, slice(0, 24))[:, 5:9])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("factor", [2.0**-8, 2.0**8])
def test_the_scale_of_the_inputs_and_of_the_matrix_does_not_matter(name, factor, weight, x, gather, site):
    method = METHODS[name]
    if hasattr(method.update, "threshold"):  # an absolute one, in units of the output
        method = replace(method, update=replace(method.update, threshold=0.0))
    plain = method.prune(site(weight), gather(x), 0.5)
    louder = method.prune(site(weight), gather(x * factor), 0.5)
    larger = method.prune(site(weight * factor), gather(x), 0.5)
    assert torch.equal(plain.mask, louder.mask)
    assert torch.equal(plain.mask, larger.mask)
    torch.testing.assert_close(louder.weight, plain.weight)
    torch.testing.assert_close(larger.weight / factor, plain.weight)


def test_wanda_does_not_see_the_scale_of_a_row_nor_a_shift_of_scale_to_the_input(weight, x, gather, site):
    plain = METHODS["wanda"].prune(site(weight), gather(x), 0.5).mask
    powers = 2.0 ** torch.arange(-6, 6)
    assert torch.equal(METHODS["wanda"].prune(site(powers[:, None] * weight), gather(x), 0.5).mask, plain)
    shift = 2.0 ** (torch.arange(24) % 5)
    assert torch.equal(METHODS["wanda"].prune(site(weight * shift), gather(x / shift), 0.5).mask, plain)


def test_white_input_makes_wanda_rank_as_magnitude(weight, gather, site):
    white = gather(torch.eye(24) * 3)
    by_size = Elementwise(METRICS["magnitude"], Unstructured("row")).prune(site(weight), white, 0.5)
    assert torch.equal(METHODS["wanda"].prune(site(weight), white, 0.5).mask, by_size.mask)


def test_ria_without_power_does_not_look_at_the_data(weight, x, gather, site):
    blind, _ = compose("ria", settings={"metric.power": 0})
    assert torch.equal(
        blind.prune(site(weight), gather(x), 0.5).mask, blind.prune(site(weight), gather(x.flip(1)), 0.5).mask
    )


def test_ria_copes_with_empty_rows_and_columns(weight, x, gather, site):
    weight[3] = 0.0
    weight[:, 7] = 0.0
    edit = METHODS["ria"].prune(site(weight), gather(x), 0.5)
    assert ((~edit.mask).sum(1) == 12).all()
    assert not edit.mask[torch.arange(12) != 3, 7].any()


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "ria", "alps", "dsnot"])
def test_inputs_that_never_fire_go_first(name, weight, x, gather, site):
    x[:, [2, 11]] = 0.0
    edit = METHODS[name].prune(site(weight), gather(x), 0.5)
    assert not edit.mask[:, [2, 11]].any()


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_pruning_again_changes_nothing(name, weight, x, gather, site):
    once = METHODS[name].prune(site(weight), gather(x), 0.5)
    twice = METHODS[name].prune(site(once.weight), gather(x), 0.5)
    assert torch.equal(once.weight, twice.weight)


@pytest.mark.parametrize("name", [name for name in METHODS if Gram in METHODS[name].update.needs])
def test_inputs_that_are_no_numbers_are_refused_by_name(name, weight, x, gather, site):
    x[5, 5] = float("nan")
    with pytest.raises(CalibrationError, match=r"up_proj.*NaN"):
        METHODS[name].prune(site(weight), gather(x), 0.5)
