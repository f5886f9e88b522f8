"""Spectra, their exponents and what is made of them, in the plainest loops (spec 9.7)."""

import json
import math

import numpy as np
import pytest
import torch

from prunus.allocations import AlphaPruning
from prunus.allocations.remember import fingerprint, remembered
from prunus.allocations.spectrum import distances, eigenvalues, hill, tail_exponent
from prunus.errors import RecipeError
from prunus.sites import Matrix, SiteInfo


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path))
    return tmp_path / "spectra"


def heavy(rows, columns, seed=0, power=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64) ** power


def spectrum(weight):
    return sorted(float(s) ** 2 for s in np.linalg.svd(weight.double().numpy(), compute_uv=False))


def plain_alpha(values, i):
    many = len(values) - i
    return 1 + many / sum(math.log(value / values[i]) for value in values[i:])


def plain_distance(values, i):
    many, alpha = len(values) - i, plain_alpha(values, i)
    return max(abs(1 - (values[k] / values[i]) ** (1 - alpha) - (k - i) / many) for k in range(i, len(values)))


def plain_peak(values, compat):
    """α as the paper (or its code) finds it, the largest value no candidate."""
    logs = [math.log10(value) for value in values]
    width = (logs[-1] - logs[0]) / 100
    counts = [0] * 100
    for value in logs:
        counts[min(int((value - logs[0]) / width), 99)] += 1
    peak = 10 ** (logs[0] + counts.index(max(counts)) * width)
    low = math.log10(0.95 * peak) if compat else 0.95 * peak
    cuts = [i for i in range(len(values) - 1) if low <= values[i] <= 1.5 * peak]
    best = min(cuts, key=lambda i: plain_distance(values, i))
    return plain_alpha(values, best)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cells", [1 << 20, 7])
def test_every_cut_has_the_exponent_and_the_distance_of_a_plain_loop(seed, cells, monkeypatch):
    monkeypatch.setattr("prunus.allocations.spectrum._CELLS", cells)
    values = spectrum(heavy(20, 31, seed))
    logs = torch.tensor(values, dtype=torch.float64).log()
    alphas = hill(logs)
    assert alphas[:-1].tolist() == pytest.approx([plain_alpha(values, i) for i in range(19)], rel=1e-10)
    assert math.isnan(alphas[-1])
    wanted = [plain_distance(values, i) for i in range(3, 17)]
    assert distances(logs, alphas, 3, 17).tolist() == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("power", [1, 2, 3])
def test_the_peak_is_that_of_a_plain_loop(seed, power):
    for scale in (0.02, 1.0):
        weight = heavy(30, 40, seed, power) * scale
        for fit in ("peak", "peak_compat"):
            wanted = plain_peak(spectrum(weight), fit == "peak_compat")
            assert tail_exponent(eigenvalues(weight), fit) == pytest.approx(wanted, rel=1e-8)


def test_the_median_is_that_of_a_plain_loop():
    for rows in (3, 7, 8):
        values = spectrum(heavy(rows, 9))
        assert tail_exponent(eigenvalues(heavy(rows, 9)), "median") == pytest.approx(plain_alpha(values, rows // 2))


def power_law(exponent, many):
    """Quantiles, ascending, of the density λ^-exponent above 1."""
    share = (torch.arange(many, dtype=torch.float64) + 0.5) / many
    return (1 - share) ** (-1 / (exponent - 1))


@pytest.mark.parametrize("exponent", [2.5, 3.5])
def test_quantiles_of_a_power_law_give_its_exponent(exponent):
    assert float(hill(power_law(exponent, 20_000).log())[0]) == pytest.approx(exponent, rel=0.01)
    assert tail_exponent(power_law(exponent, 20_000), "median") == pytest.approx(exponent, rel=0.01)
    assert tail_exponent(power_law(exponent, 2_000), "peak") == pytest.approx(exponent, rel=0.02)


@pytest.mark.parametrize("shape", [(24, 24), (10, 30), (30, 10)])
def test_eigenvalues_are_squared_singular_values(shape):
    weight = heavy(*shape)
    assert eigenvalues(weight).tolist() == pytest.approx(spectrum(weight), rel=1e-9)
    assert eigenvalues(weight.bfloat16()).tolist() == pytest.approx(spectrum(weight.bfloat16().double()), rel=1e-9)


def test_eigenvalues_do_not_depend_on_the_panels(monkeypatch):
    weight = heavy(13, 20)
    whole = eigenvalues(weight)
    monkeypatch.setattr("prunus.allocations.spectrum._PANEL", 5)
    assert torch.allclose(eigenvalues(weight), whole, rtol=1e-12)


@pytest.mark.parametrize("fit", ["peak", "median"])
@pytest.mark.parametrize("seed", range(3))
def test_exponents_know_neither_scale_nor_side_nor_rotation(fit, seed):
    weight = heavy(40, 60, seed)
    alpha = tail_exponent(eigenvalues(weight), fit)
    rotation = torch.linalg.qr(heavy(40, 40, 9, power=1)).Q
    for other in (weight * 0.013, weight * 700, weight.T, rotation @ weight):
        assert tail_exponent(eigenvalues(other), fit) == pytest.approx(alpha, rel=1e-9)


def test_the_published_lower_bound_makes_scale_matter():
    values = eigenvalues(heavy(20, 20, 16))
    values = values / values[-1]
    assert len({round(tail_exponent(values * scale, "peak"), 6) for scale in (0.001, 3, 10, 100)}) == 1
    assert len({round(tail_exponent(values * scale, "peak_compat"), 6) for scale in (0.001, 3, 10, 100)}) > 1


def test_sub_matrices_cover_the_matrix_and_have_one_ratio():
    weight = heavy(6, 26)
    wanted = [s for start in (0, 5, 10, 15, 20) for s in spectrum(weight[:, start : start + 6])]
    for matrix in (weight, weight.T):
        assert eigenvalues(matrix, 1.0).tolist() == pytest.approx(sorted(wanted), rel=1e-9)
    wanted = [s for start in (0, 8, 16) for s in spectrum(weight[:, start : start + 10])]
    assert eigenvalues(weight, 1.7).tolist() == pytest.approx(sorted(wanted), rel=1e-9)
    wanted = [s for start in (0, 3) for s in spectrum(weight[start : start + 3])]
    assert eigenvalues(weight, 8.0).tolist() == pytest.approx(sorted(wanted), rel=1e-9)
    less = heavy(10, 17)
    wanted = [s for start in (0, 7) for s in spectrum(less[:, start : start + 10])]
    assert eigenvalues(less, 1.0).tolist() == pytest.approx(sorted(wanted), rel=1e-9)
    assert torch.equal(eigenvalues(heavy(9, 9), 1.0), eigenvalues(heavy(9, 9)))


def test_equal_ratios_take_away_what_only_the_shape_does():
    square, long = heavy(64, 64, 1, power=1), heavy(64, 640, 2, power=1)
    plain = [tail_exponent(eigenvalues(weight), "median") for weight in (square, long)]
    equal = [tail_exponent(eigenvalues(weight, 1.0), "median") for weight in (square, long)]
    assert plain[1] > 1.5 * plain[0]
    assert equal[1] == pytest.approx(equal[0], rel=0.1)


@pytest.mark.parametrize("fit", ["peak", "peak_compat"])
def test_where_no_cut_is_near_the_peak_the_median_is_the_cut(fit):
    # Bins are a factor of 2.5 wide here, and the two values in the fullest lie at 2.2 times its left edge.
    values = torch.tensor([0.0, 4.35, 4.36, 40], dtype=torch.float64).mul(math.log(10)).exp()
    assert tail_exponent(values, fit) == pytest.approx(1 + 2 / (35.64 * math.log(10)))


@pytest.mark.parametrize("fit", ["peak", "median", "peak_compat"])
def test_without_a_tail_there_is_no_exponent_and_with_little_it_is_finite(fit):
    for weight in (torch.zeros(8, 8), torch.ones(8, 8), torch.eye(8), torch.ones(1, 9), torch.zeros(1, 1)):
        assert math.isnan(tail_exponent(eigenvalues(weight), fit))
    few = torch.diag(torch.tensor([3.0, 2, 1, 0, 0, 0]))
    assert len(eigenvalues(few)) == 3
    assert 1 < tail_exponent(eigenvalues(few), fit) < 100
    low = heavy(30, 4) @ heavy(4, 30, 1)
    assert len(eigenvalues(low)) == 4
    assert 1 < tail_exponent(eigenvalues(low), fit) < 100


# from exponents to sparsities


class Told:
    """A survey whose matrices have these exponents."""

    def __init__(self, alphas, sizes=None):
        self.alphas = alphas
        self.sites = [
            SiteInfo(f"{block}.{i}", block, (sizes[block][i] if sizes else 10, 10))
            for block, values in alphas.items()
            for i in range(len(values))
        ]

    def measure(self, function, needs=frozenset()):
        return {block: torch.tensor(values, dtype=torch.float64) for block, values in self.alphas.items()}


MIXED = {"a": [2.0, 4.0], "b": [3.0], "c": [5.0, 2.5, 3.5, 6.0], "d": [1.5, 2.0]}
ROWS = {"a": [10, 40], "b": [30], "c": [5, 25, 60, 10], "d": [20, 70]}


@pytest.mark.parametrize("level", ["block", "matrix"])
@pytest.mark.parametrize("compat", ["exact", "reference"])
def test_sparsities_are_those_of_the_plain_formula(level, compat):
    span, target = 0.2, 0.6
    quality = {f"{b}.{i}": v for b, values in MIXED.items() for i, v in enumerate(values)}
    if level == "block":
        quality = {name: sum(MIXED[name[0]]) / len(MIXED[name[0]]) for name in quality}
    low, high = min(quality.values()), max(quality.values())
    ratio = {name: (q - low) / (high - low) * 2 * span + 1 - span for name, q in quality.items()}
    size = {f"{b}.{i}": 10 * rows for b, all_rows in ROWS.items() for i, rows in enumerate(all_rows)}
    factor = target * sum(size.values()) / sum(size[name] * ratio[name] for name in size)
    budget = AlphaPruning(span=span, level=level, compat=compat).divide(Told(MIXED, ROWS), target)
    assert budget == pytest.approx({name: factor * ratio[name] for name in size}, abs=1e-12)
    assert sum(size[n] * budget[n] for n in size) / sum(size.values()) == pytest.approx(target, abs=1e-12)
    assert max(budget.values()) / min(budget.values()) == pytest.approx((1 + span) / (1 - span))
    assert sorted(budget, key=lambda n: (budget[n], n)) == sorted(quality, key=lambda n: (quality[n], n))


@pytest.mark.parametrize("compat", ["exact", "reference"])
def test_no_span_or_no_differences_is_uniform(compat):
    flat = AlphaPruning(span=0, compat=compat).divide(Told(MIXED, ROWS), 0.7)
    same = AlphaPruning(compat=compat).divide(Told({"a": [3.0, 2.0], "b": [2.5, 2.5 + 1e-14]}), 0.7)
    for budget in (flat, same):
        assert list(budget.values()) == pytest.approx([0.7] * len(budget), abs=1e-12)


def test_a_matrix_without_a_tail_counts_as_the_mean_of_its_block_then_of_the_model():
    nothing = math.nan
    holes = {"a": [2.0, nothing, 4.0], "b": [5.0, 2.0], "c": [nothing, nothing]}
    filled = {"a": [2.0, 3.0, 4.0], "b": [5.0, 2.0], "c": [3.25, 3.25]}
    for level in ("block", "matrix"):
        allocation = AlphaPruning(level=level)
        assert allocation.divide(Told(holes), 0.5) == pytest.approx(allocation.divide(Told(filled), 0.5))
    empty = AlphaPruning().divide(Told({"a": [nothing], "b": [nothing]}), 0.5)
    assert empty == pytest.approx({"a.0": 0.5, "b.0": 0.5})


def test_what_the_published_formula_would_remove_twice_is_bounded_or_refused_with_a_span_that_fits():
    steep = {"a": [1.0], "b": [1.1], "c": [1.2], "d": [4.0]}
    bounded = AlphaPruning(span=0.5).divide(Told(steep), 0.7)
    assert bounded["d.0"] == 0.99
    assert sum(bounded.values()) / 4 == pytest.approx(0.7, abs=1e-12)
    with pytest.raises(RecipeError, match=r"^d: .* sparsity of 1\.3548, 0\.35 above 1.*at most 0\.26,"):
        AlphaPruning(span=0.5, compat="reference").divide(Told(steep), 0.7)
    assert 0.99 < AlphaPruning(span=0.26, compat="reference").divide(Told(steep), 0.7)["d.0"] <= 1


@pytest.mark.parametrize("wrong", [{"span": 1.0}, {"span": -0.1}, {"aspect": 0.5}, {"fit": "mid"}, {"level": "row"}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=f"allocation.{next(iter(wrong))}"):
        AlphaPruning(**wrong)


# the cache


def measured(weight, **settings):
    return AlphaPruning(**settings).exponents([Matrix("a", weight, "b")], {}).item()


def test_exponents_come_from_the_cache_for_the_same_weights_and_settings_alone(cache):
    weight = heavy(20, 30)
    first = measured(weight)
    (file,) = cache.iterdir()
    file.write_text(json.dumps({"value": "7.25"}))
    assert measured(weight) == 7.25
    assert measured(weight, span=0.1) == 7.25  # what is made of it later is no part of the key
    assert measured(weight + 1e-15 * weight) == pytest.approx(first)
    assert measured(weight, fit="median") != 7.25
    assert measured(weight, aspect=1.0) != 7.25
    assert measured(weight.T.contiguous()) == pytest.approx(first)
    assert len({fingerprint(w) for w in (weight, weight.float(), weight.T, weight.reshape(30, 20))}) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"value": null}', '{"value": "much"}'])
def test_a_broken_cache_file_is_computed_again(cache, text):
    cache.mkdir()
    (cache / "key.json").write_text(text)
    assert remembered(cache, "key", lambda: 2.5) == 2.5
    assert remembered(cache, "key", lambda: 3.5) == 2.5
    assert math.isnan(remembered(cache, "none", lambda: math.nan))
    assert math.isnan(remembered(cache, "none", lambda: 1.0))
    assert {path.name for path in cache.iterdir()} == {"key.json", "none.json"}


def test_a_cache_that_cannot_be_written_only_costs_time(cache):
    cache.write_text("a file where the folder should be")
    assert remembered(cache, "key", lambda: 2.5) == 2.5
    assert remembered(cache, "key", lambda: 3.5) == 3.5
