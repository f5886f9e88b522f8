"""Laws of low rank: the optimum under plain and weighted errors, and ranks that add up to the asked share."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from prunus.errors import CalibrationError, RecipeError
from prunus.methods.lowrank.ranks import most, reachable, uniform, water_filled
from prunus.methods.lowrank.scores import Plain, Scaled, Whitened
from prunus.methods.lowrank.truncate import spectrum, truncate
from prunus.sites import SiteInfo
from prunus.statistics import Gram, InputNorm, SiteStats

SIZES = [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1)]


@pytest.fixture
def x():
    """Inputs whose directions differ in size by a factor of about 1,000."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(9, 9, generator=generator)).Q
    return torch.randn(40, 9, generator=generator) * torch.logspace(0, -3, 9) @ turn.T


def random(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stats(x: torch.Tensor, *kinds: type) -> SiteStats:
    found = {kind: kind(x.shape[1]) for kind in kinds}
    for statistic in found.values():
        statistic.update(x, 2)
    return SiteStats(found)


def error(weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> float:
    """‖(W - BA)·Xᵀ‖_F², float64."""
    outer, inner = (factor.double() for factor in factors)
    return float(((weight.double() - outer @ inner) @ x.double().T).square().sum())


@pytest.mark.parametrize("size", SIZES)
def test_without_weights_the_product_is_the_truncated_svd(size):
    weight = random(*size)
    u, sigma, v = torch.linalg.svd(weight.double(), full_matrices=False)
    for rank in range(1, min(size) + 1):
        outer, inner = truncate(weight, None, rank)
        assert outer.shape == (size[0], rank) and inner.shape == (rank, size[1])
        best = (u[:, :rank] * sigma[:rank]) @ v[:rank]
        assert torch.allclose(outer.double() @ inner.double(), best, atol=1e-5)
    assert torch.allclose(spectrum(weight, None), sigma.square(), atol=1e-9)


@pytest.mark.parametrize("size", [(5, 9), (9, 9), (20, 9)])
def test_with_inputs_it_is_what_the_cholesky_factor_of_their_moment_gives(size, x):
    weight = random(*size)
    moment = x.double().T @ x.double()
    root = torch.linalg.cholesky(moment)
    u, sigma, v = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    for rank in (1, 2, min(size) - 1):
        best = (u[:, :rank] * sigma[:rank]) @ v[:rank] @ torch.linalg.inv(root)
        outer, inner = truncate(weight, moment, rank)
        assert torch.allclose(outer.double() @ inner.double(), best, atol=1e-4)
        lost = float(sigma[rank:].square().sum())
        assert error(weight, (outer, inner), x) == pytest.approx(lost, rel=1e-4, abs=1e-9)
        assert float(spectrum(weight, moment)[rank:].sum()) == pytest.approx(lost, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_each_is_best_by_its_own_error_and_no_neighbour_is_better(rank, x):
    weight, moment = random(8, 9), x.double().T @ x.double()
    plain, aware = truncate(weight, None, rank), truncate(weight, moment, rank)
    identity = torch.eye(9)
    assert error(weight, aware, x) < error(weight, plain, x)
    assert error(weight, plain, identity) < error(weight, aware, identity)
    for seed in range(20):
        moved = tuple(factor + 1e-2 * random(*factor.shape, seed=seed) for factor in aware)
        assert error(weight, aware, x) <= error(weight, moved, x)


def test_more_rank_never_errs_more_and_full_rank_errs_not_at_all(x):
    weight, moment = random(6, 9), x.double().T @ x.double()
    errors = [error(weight, truncate(weight, moment, rank), x) for rank in range(1, 7)]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))
    outer, inner = truncate(weight, moment, 6)
    assert torch.allclose(outer @ inner, weight, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (12, 9)])
def test_what_has_no_full_rank_is_no_special_case(shape, x):
    low = random(shape[0], 2) @ random(2, shape[1], seed=2)
    outer, inner = truncate(low, None, 2)
    assert torch.allclose(outer @ inner, low, atol=1e-4)
    for weight in (torch.zeros(shape), low):
        for moment in (None, torch.zeros(9, 9), x[:2].T @ x[:2]):  # two tokens span two of nine directions
            outer, inner = truncate(weight, moment, 4)
            assert bool(outer.isfinite().all()) and bool(inner.isfinite().all())
    outer, inner = truncate(random(*shape), x[:2].T @ x[:2], 2)
    assert error(random(*shape), (outer, inner), x[:2]) < 1e-9


def test_both_factors_have_one_size():
    outer, inner = truncate(100 * random(6, 9), None, 3)
    assert torch.allclose(outer.norm(dim=0), inner.norm(dim=1), rtol=1e-4)


def test_scores_are_their_formulas(x):
    assert Plain()(SiteStats({})) is None
    gram = Whitened()(stats(x, Gram))
    assert torch.allclose(gram / gram.trace(), x.T @ x / x.square().sum(), atol=1e-6)
    damped = Whitened(damp=0.5)(stats(x, Gram))
    assert torch.allclose(damped - gram, 0.5 * gram.diagonal().mean() * torch.eye(9), atol=1e-6)
    scaled = Scaled(alpha=0.5)(stats(x, InputNorm))
    size = x.square().sum(0).sqrt().double()
    assert torch.allclose(scaled.diagonal() / scaled.trace(), size / size.sum(), atol=1e-6)
    assert torch.equal(scaled, torch.diag(scaled.diagonal()))
    flat = Scaled(alpha=0)(stats(x, InputNorm))
    assert torch.equal(flat, torch.eye(9).double()), "alpha 0 is plain"
    for score, kind in ((Whitened(), Gram), (Scaled(), InputNorm)):
        assert score(stats(torch.zeros(0, 9), kind)) is None, "without a token"


def infos(*shapes: tuple[int, int]) -> list[SiteInfo]:
    return [SiteInfo(f"m{number}", "b", shape) for number, shape in enumerate(shapes)]


def losses(sites: list[SiteInfo]) -> dict[str, torch.Tensor]:
    result = {}
    for number, info in enumerate(sites):
        squares = spectrum(random(*info.shape, seed=number) * (1 + number), None)
        result[info.name] = torch.tensor([float(squares[rank:].sum()) for rank in range(min(info.shape) + 1)])
    return result


def removed(sites: list[SiteInfo], ranks: dict[str, int]) -> int:
    return sum(info.size - ranks[info.name] * sum(info.shape) for info in sites if info.name in ranks)


WIDE = infos((8, 24), (24, 8), (8, 8), (4, 8), (16, 16))


@pytest.mark.parametrize("how", ["uniform", "global"])
@pytest.mark.parametrize("step", [1, 2])
def test_the_asked_share_goes_to_within_one_step(how, step):
    total = sum(info.size for info in WIDE)
    for share in (0.001, 0.02, 0.1, 0.3, 0.5, 0.6):
        target = round(share * total)
        ranks = uniform(WIDE, step, target) if how == "uniform" else water_filled(WIDE, losses(WIDE), step, target)
        assert 0 <= removed(WIDE, ranks) - target < step * max(sum(info.shape) for info in WIDE)
        for info in WIDE:
            rank = ranks.get(info.name, step)
            assert rank % step == 0 and step <= rank <= most(info, step)


def test_nothing_asked_is_nothing_split():
    assert uniform(WIDE, 1, 0) == water_filled(WIDE, losses(WIDE), 1, 0) == {}


def test_a_share_that_is_too_small_for_all_takes_from_few():
    assert len(uniform(WIDE, 1, 3)) == 1
    assert len(water_filled(WIDE, losses(WIDE), 1, 3)) == 1


def test_a_uniform_share_is_that_of_every_matrix():
    sites = infos(*[(32, 32)] * 3, (64, 32))
    ranks = uniform(sites, 1, round(0.5 * sum(info.size for info in sites)))
    exact = {"m0": 8.0, "m1": 8.0, "m2": 8.0, "m3": 10.67}
    assert all(abs(ranks[name] - value) <= 1 for name, value in exact.items())


def test_water_filling_is_the_best_of_all_choices_where_no_jump_is_cut_short():
    sites = infos((4, 10), (6, 6), (9, 3))
    lost = losses(sites)
    options = [[None, *range(1, most(info, 1) + 1)] for info in sites]
    points: dict[int, float] = {}
    for chosen in product(*options):
        ranks = {info.name: rank for info, rank in zip(sites, chosen, strict=True) if rank}
        gone = removed(sites, ranks)
        points[gone] = min(points.get(gone, 9e9), sum(float(lost[name][rank]) for name, rank in ranks.items()))
    vertices, here = [], 0
    while here < max(points):  # the lower hull: always on to the point of least slope
        slope = {gone: (loss - points.get(here, 0.0)) / (gone - here) for gone, loss in points.items() if gone > here}
        here = min(slope, key=slope.__getitem__)
        vertices.append(here)
    assert len(vertices) > 4
    for gone in vertices:
        ranks = water_filled(sites, lost, 1, gone)
        assert removed(sites, ranks) == gone
        assert sum(float(lost[name][rank]) for name, rank in ranks.items()) == pytest.approx(points[gone], rel=1e-6)


def test_matrices_of_zeros_go_first():
    sites = infos((8, 8), (8, 8))
    lost = losses(sites) | {"m1": torch.zeros(9)}
    assert water_filled(sites, lost, 1, 48) == {"m1": 1}


def test_what_cannot_be_reached_says_what_can():
    reachable(WIDE, 1, removed(WIDE, {info.name: 1 for info in WIDE}))
    with pytest.raises(RecipeError, match=r"At rank 1, the lowest, \d+ weights of 5 matrices go"):
        reachable(WIDE, 1, removed(WIDE, {info.name: 1 for info in WIDE}) + 1)
    with pytest.raises(RecipeError, match="At rank 64"):
        reachable(WIDE, 64, 1)


def test_settings_below_their_range_are_refused():
    for make, words in ((lambda: Scaled(alpha=-1), "alpha"), (lambda: Whitened(damp=-0.1), "damp")):
        with pytest.raises(RecipeError, match=words):
            make()


def test_inputs_without_end_are_refused_by_name():
    moment = torch.eye(5)
    moment[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        spectrum(random(3, 5), moment)
