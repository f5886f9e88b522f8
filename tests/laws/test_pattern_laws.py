"""Laws of patterns: exact counts, ties by index, whole groups, budgets that add up."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunus.errors import RecipeError
from prunus.patterns import NM, Unstructured, parse
from prunus.patterns.selection import count, keep_highest, keep_highest_overall, share
from prunus.sites import SiteInfo

KINDS = ("distinct", "ties", "equal", "zeros", "signed zeros", "bfloat16", "infinite")
PATTERNS = [Unstructured("row"), Unstructured("matrix"), NM(2, 4), NM(1, 3), NM(4, 8), NM(5, 12)]


def scores(kind, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, columns, generator=generator)
    return {
        "distinct": drawn,
        "ties": (drawn * 4).floor(),
        "equal": torch.full_like(drawn, 0.3),
        "zeros": torch.where(drawn < 0.6, 0.0, drawn),
        "signed zeros": torch.where(drawn < 0.3, 0.0, torch.where(drawn < 0.6, -0.0, drawn)),
        "bfloat16": drawn.bfloat16().float(),
        "infinite": torch.where(drawn < 0.2, float("inf"), drawn),
    }[kind]


def by_sorting(rows, pruned):
    keep = torch.ones_like(rows, dtype=torch.bool)
    return keep.scatter_(1, rows.sort(dim=1, stable=True).indices[:, :pruned], False)


def groups(pattern, mask):
    """What has an exact count, as rows."""
    if isinstance(pattern, NM):
        return mask.reshape(-1, pattern.m)
    return mask if pattern.group == "row" else mask.reshape(1, -1)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), part=st.floats(0, 1), seed=st.integers(0, 999))
def test_selection_without_sorting_equals_a_stable_sort(kind, rows, columns, part, seed):
    values = scores(kind, rows, columns, seed)
    for k in {0, 1, round(part * columns), columns}:
        assert torch.equal(keep_highest(values, k), by_sorting(values, k))
    flat = values.reshape(1, -1)
    for k in {0, 1, round(part * flat.numel()), flat.numel()}:
        wanted = by_sorting(flat, k).view(values.shape)
        assert torch.equal(keep_highest_overall(values, k), wanted)
        assert torch.equal(keep_highest_overall(values.T.contiguous().T, k), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_selection_does_not_depend_on_the_dtype(dtype):
    values = scores("ties", 5, 33, 0)
    assert torch.equal(keep_highest(values.to(dtype), 17), by_sorting(values, 17))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", range(2, 13))
def test_a_group_of_nm_keeps_what_a_stable_sort_keeps(kind, m):
    values = scores(kind, 6, 5 * m, m)
    for n in range(1, m):
        wanted = by_sorting(values.reshape(-1, m), m - n).view(values.shape)
        assert torch.equal(NM(n, m).keep(values, 1 - n / m), wanted)
        assert torch.equal(NM(n, m).keep(values.T.contiguous().T, 1 - n / m), wanted)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 1 / 3, 0.5, 0.7, 0.999])
def test_the_count_of_every_group_is_exact(pattern, kind, sparsity):
    keep = groups(pattern, pattern.keep(scores(kind, 7, 48, 3), sparsity))
    assert ((~keep).sum(1) == count(keep.shape[1], sparsity)).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_keeping_again_changes_nothing(pattern):
    values = scores("distinct", 7, 48, 4) + 0.1
    mask = pattern.keep(values, 0.5)
    assert torch.equal(pattern.keep(values * mask, 0.5), mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_goes_scores_no_higher_than_what_stays(pattern):
    values = scores("distinct", 7, 48, 5)
    mask, values = (groups(pattern, tensor) for tensor in (pattern.keep(values, 0.5), values))
    assert (values.masked_fill(mask, -1).amax(1) <= values.masked_fill(~mask, 2).amin(1)).all()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@settings(max_examples=60, deadline=None)
@given(cuts=st.sets(st.integers(0, 24)), rows=st.integers(1, 50), sparsity=st.floats(0, 0.999))
def test_slices_asked_one_by_one_add_up_to_the_exact_whole(pattern, cuts, rows, sparsity):
    width, values = 48, torch.rand(rows, 48)
    ends = sorted({0, width, *(2 * cut // pattern.align * pattern.align for cut in cuts)})
    parts = []
    for start, stop in pairwise(ends):
        portion = pattern.portion(sparsity, (rows, width), slice(start, stop))
        parts.append(pattern.keep(values[:, start:stop], portion))
    keep = groups(pattern, torch.cat(parts, 1))
    assert ((~keep).sum(1) == count(keep.shape[1], sparsity)).all()


@settings(max_examples=300, deadline=None)
@given(numel=st.integers(1, 2**31), part=st.floats(0, 1))
def test_a_share_stands_for_its_count(numel, part):
    pruned = int(part * numel)
    assert count(numel, share(pruned, numel)) == pruned


def test_counts_do_not_suffer_from_binary_fractions():
    assert [count(100, s) for s in (0.29, 0.57, 0.58)] == [29, 57, 58]
    assert count(576 * 1536, 0.7) == 619315


def test_the_reference_rule_for_matrices_is_the_published_threshold():
    values, pattern = scores("ties", 6, 20, 1), Unstructured("matrix", "reference")
    for sparsity in (0.0, 0.3, 0.5, 0.9):
        threshold = values.flatten().sort().values[int(values.numel() * sparsity)]
        assert torch.equal(pattern.keep(values, sparsity), values > threshold)
    distinct = torch.arange(60.0).reshape(6, 10)
    assert (~pattern.keep(distinct, 0.5)).sum() == 31


def test_the_reference_rule_for_rows_truncates():
    pattern = Unstructured("row", "reference")
    assert (~pattern.keep(torch.rand(2, 100), 0.29)).sum() == 2 * int(100 * 0.29) == 56


@pytest.mark.parametrize("text", ["2:4", " 4:8 ", "1:3"])
def test_a_pattern_reads_as_kept_of_every(text):
    n, m = map(int, text.split(":"))
    assert parse(text) == NM(n, m)
    assert NM(n, m).sparsity == 1 - n / m


def test_unstructured_leaves_the_group_to_the_method():
    assert parse("unstructured") is None


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2.5:4", "abc", "", "2:4:8", "-2:4", "2:0", "٢:٤"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(RecipeError, match=r"2:4"):
        parse(text)


def test_a_reversed_pattern_is_corrected():
    with pytest.raises(RecipeError, match="Did you mean 2:4"):
        parse("4:2")


@pytest.mark.parametrize("field", ["group", "compat"])
def test_an_unknown_name_is_answered_with_the_known_ones(field):
    with pytest.raises(RecipeError, match="Known:"):
        Unstructured(**{field: "rows"})


def test_nm_refuses_a_matrix_without_whole_groups():
    NM(2, 4).check(SiteInfo("a", "b", (3, 8)))
    Unstructured().check(SiteInfo("a", "b", (3, 7)))
    with pytest.raises(RecipeError, match=r"blocks.3.down has 11008 inputs, not a multiple of M=48"):
        NM(24, 48).check(SiteInfo("blocks.3.down", "blocks.3", (5, 11008)))


@settings(max_examples=100, deadline=None)
@given(
    m=st.integers(2, 16),
    wanted=st.lists(st.floats(0, 0.99), min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 40), min_size=12, max_size=12),
)
def test_a_settled_budget_has_whole_groups_and_the_nearest_total(m, wanted, sizes):
    size = {str(i): sizes[i] * 4 * m for i in range(len(wanted))}
    budget = {str(i): value for i, value in enumerate(wanted)}
    target = sum(budget[i] * size[i] for i in budget) / sum(size.values())
    settled = NM(1, m).settle(budget, size, target)
    assert list(settled) == list(budget)
    assert all(0 <= value * m <= m - 1 and value * m == round(value * m) for value in settled.values())
    # A site wanted between M-1 and M of M cannot be followed; then the others make up for it if they can.
    off = sum((settled[i] - target) * size[i] for i in budget)
    full = all(value * m == m - 1 for value in settled.values())
    assert abs(off) <= max(size.values()) / m / 2 * (1 + 1e-6) or (full and off < 0)


def test_equal_sizes_settle_exactly_and_by_the_largest_remainder():
    budget = {"a": 0.56, "b": 0.72, "c": 0.74, "d": 0.48}
    settled = NM(3, 8).settle(budget, dict.fromkeys(budget, 800), 0.625)
    assert settled == {"a": 4 / 8, "b": 6 / 8, "c": 6 / 8, "d": 4 / 8}
    assert NM(2, 4).settle(dict.fromkeys("abc", 0.5), dict.fromkeys("abc", 8), 0.5) == dict.fromkeys("abc", 0.5)


def test_a_budget_off_the_target_keeps_its_own_total():
    assert NM(2, 4).settle({"a": 0.25, "b": 0.25}, {"a": 8, "b": 8}, 0.5) == {"a": 0.25, "b": 0.25}


def test_unstructured_settles_for_anything():
    assert Unstructured().settle({"a": 0.123}, {"a": 9}, 0.1) == {"a": 0.123}


def test_a_budget_that_rounding_makes_flat_is_reported_with_the_span_that_would_matter(caplog):
    sizes = dict.fromkeys("abc", 800)
    assert set(NM(2, 4).settle({"a": 0.42, "b": 0.5, "c": 0.58}, sizes, 0.5).values()) == {0.5}
    assert "2:4" in caplog.text
    assert "span above 0.125" in caplog.text
    caplog.clear()
    NM(2, 4).settle(dict.fromkeys("abc", 0.5), sizes, 0.5)
    assert len(set(NM(2, 4).settle({"a": 0.36, "b": 0.5, "c": 0.64}, sizes, 0.5).values())) == 3
    assert not caplog.text
