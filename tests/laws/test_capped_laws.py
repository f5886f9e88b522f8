"""Laws of caps and of dealt columns: the cap holds, counts are exact, no better mask is allowed."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import RecipeError
from prunus.methods import Elementwise
from prunus.metrics import METRICS
from prunus.patterns import NM, Capped, Unstructured, parse
from prunus.patterns.order import deal
from prunus.patterns.selection import count
from prunus.recipe import Recipe
from prunus.sites import SiteInfo
from prunus.updates import UPDATES, DSnoT

CAPS = [Capped(3, 4), Capped(3, 4, group="matrix"), Capped(10, 16), Capped(2, 2), Capped(1, 8)]


def windows(mask, pattern, order=None):
    """Kept in each window, `[out, windows]`."""
    mask = mask if order is None else mask[:, order]
    return mask.unflatten(1, (-1, pattern.m)).sum(2)


@pytest.mark.parametrize("pattern", CAPS, ids=str)
@settings(max_examples=40, deadline=None)
@given(more=st.floats(0, 0.999), ties=st.booleans(), seed=st.integers(0, 999))
def test_counts_are_exact_and_no_window_keeps_more_than_its_cap(pattern, more, ties, seed):
    scores = torch.rand(5, 48, generator=torch.Generator().manual_seed(seed))
    scores = (scores * 3).floor() if ties else scores
    sparsity = pattern.least + (1 - pattern.least) * more
    mask = pattern.keep(scores, sparsity)
    lost = (~mask).sum(1) if pattern.group == "row" else (~mask).sum()
    assert (lost == count(48 if pattern.group == "row" else 240, sparsity)).all()
    assert (windows(mask, pattern) <= pattern.k).all()


def test_no_other_allowed_mask_keeps_more():
    pattern, generator = Capped(2, 3), torch.Generator().manual_seed(0)
    for pruned in (3, 4, 5, 7):
        for _ in range(5):
            scores = torch.rand(1, 9, generator=generator)
            best = 0.0
            for kept in combinations(range(9), 9 - pruned):
                mask = torch.zeros(1, 9, dtype=torch.bool)
                mask[0, list(kept)] = True
                if (windows(mask, pattern) <= 2).all():
                    best = max(best, float(scores[mask].sum()))
            assert float(scores[pattern.keep(scores, pruned / 9)].sum()) == pytest.approx(best)


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_a_cap_of_the_whole_window_is_no_cap(group):
    scores = torch.rand(6, 32, generator=torch.Generator().manual_seed(3))
    for sparsity in (0.1, 0.5, 0.9):
        assert torch.equal(Capped(8, 8, group=group).keep(scores, sparsity), Unstructured(group).keep(scores, sparsity))


@pytest.mark.parametrize("pattern", CAPS, ids=str)
@settings(max_examples=40, deadline=None)
@given(cuts=st.sets(st.integers(1, 5)), more=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_slices_asked_one_by_one_add_up_and_keep_the_cap(pattern, cuts, more, seed):
    scores = torch.rand(7, 96, generator=torch.Generator().manual_seed(seed))
    sparsity, parts = pattern.least + (1 - pattern.least) * more, []
    for start, stop in pairwise(sorted({0, 96, *(16 * cut for cut in cuts)})):
        portion = pattern.portion(sparsity, (7, 96), slice(start, stop))
        parts.append(pattern.keep(scores[:, start:stop], portion))
    mask = torch.cat(parts, 1)
    assert (windows(mask, pattern) <= pattern.k).all()
    lost = (~mask).sum(1) if pattern.group == "row" else (~mask).sum()
    assert (lost == count(96 if pattern.group == "row" else 7 * 96, sparsity)).all()


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("pattern", ["capped:3/4", "2:4"])
def test_every_metric_and_update_obeys_in_its_order(pattern, metric, update, permute, weight, x, gather, site):
    kind = parse(pattern)
    kind = type(kind)(*map(int, pattern.removeprefix("capped:").replace("/", ":").split(":")), permute)
    if permute and update == "dsnot":
        with pytest.raises(RecipeError, match=r"permute"):
            Elementwise(METRICS[metric], kind, UPDATES[update])
        return
    edit = Elementwise(METRICS[metric], kind, UPDATES[update]).prune(site(weight), gather(x), 0.5)
    assert (edit.order is not None) == permute
    if permute:
        assert torch.equal(edit.order.sort().values, torch.arange(weight.shape[1]))
    held = windows(edit.mask, kind, edit.order)
    assert (held == 2).all() if isinstance(kind, NM) else (held <= 3).all()
    assert ((~edit.mask).sum(1) == weight.shape[1] // 2).all()
    assert (edit.weight[~edit.mask] == 0).all()


def test_dealt_columns_share_the_load_and_lose_less():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(64, 128, generator=generator)
    scores[:, :24] *= 8  # heavy neighbours crowd their windows
    plain, dealt = Capped(10, 16), Capped(10, 16, permute=True)
    order = dealt.arrange(scores, 0.5)
    assert plain.arrange(scores, 0.5) is None
    free = scores[Unstructured("row").keep(scores, 0.5)].sum()
    shown = scores[:, order]
    lost = [free - scores[plain.keep(scores, 0.5)].sum(), free - shown[dealt.keep(shown, 0.5)].sum()]
    assert 0 <= lost[1] < 0.1 * lost[0]


@settings(max_examples=50, deadline=None)
@given(loads=st.lists(st.integers(0, 9), min_size=8, max_size=48), window=st.sampled_from([2, 4, 8]))
def test_dealing_is_a_permutation_with_even_windows(loads, window):
    load = torch.tensor(loads[: len(loads) // 8 * 8])
    order = deal(load, window)
    assert torch.equal(order.sort().values, torch.arange(len(load)))
    sums = load[order].view(-1, window).sum(1)
    assert int(sums.max() - sums.min()) <= 2 * int(load.max() - load.min())


@settings(max_examples=100, deadline=None)
@given(
    wanted=st.lists(st.floats(0.2, 0.99), min_size=1, max_size=9),
    sizes=st.lists(st.integers(1, 40), min_size=9, max_size=9),
)
def test_a_settled_budget_respects_the_cap_and_keeps_its_total(wanted, sizes):
    pattern = Capped(8, 16)
    size = {str(i): sizes[i] * 16 for i in range(len(wanted))}
    budget = {str(i): value for i, value in enumerate(wanted)}
    total = sum(budget[i] * size[i] for i in budget)
    if total < 0.5 * sum(size.values()):
        with pytest.raises(RecipeError, match=r"removes at least 0\.5"):
            pattern.settle(budget, size, 0.5)
        return
    settled = pattern.settle(budget, size, 0.5)
    assert all(value >= 0.5 - 1e-9 for value in settled.values())
    assert sum(settled[i] * size[i] for i in budget) == pytest.approx(total)


def test_what_a_cap_cannot_do_is_said_before_the_work():
    with pytest.raises(RecipeError, match=r"removes at least 0.625.*Raise the sparsity, or K.*capped:11/16"):
        Capped(6, 16).keep(torch.rand(2, 16), 0.5)
    with pytest.raises(RecipeError, match=r"has 40 inputs, not a multiple of M=16"):
        Capped(6, 16).check(SiteInfo("a", "b", (3, 40)))
    with pytest.raises(ValueError, match=r"removes at least 0\.625"):
        Recipe.model_validate({"model": "m", "prune": {"pattern": "capped:6/16", "sparsity": 0.5}})
    for text in ("capped:0/16", "capped:17/16", "capped:1/1"):
        with pytest.raises(RecipeError, match="capped:K/M"):
            parse(text)


def test_swaps_stay_within_windows(weight, x, gather, site):
    edit = Elementwise(METRICS["wanda"], Capped(3, 4), DSnoT(threshold=0.0)).prune(site(weight), gather(x), 0.5)
    assert (windows(edit.mask, Capped(3, 4)) <= 3).all()
