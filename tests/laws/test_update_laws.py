"""Laws of the column sweep, against plain linear algebra in float64."""

from dataclasses import dataclass, replace

import pytest
import torch

from prunus.errors import RecipeError
from prunus.factor import Factor
from prunus.methods import ELEMENTWISE as METHODS
from prunus.methods.elementwise import Elementwise
from prunus.metrics import METRICS, OBS
from prunus.patterns import NM, Unstructured
from prunus.statistics import Gram
from prunus.updates import OBSSweep

OUT, IN = 6, 16


@dataclass(frozen=True)
class Fixed:
    """A mask that does not depend on the weights."""

    mask: torch.Tensor
    align: int = 1
    grouped: bool = False

    def __call__(self, weight, columns):
        assert weight.shape == self.mask[:, columns].shape
        return self.mask[:, columns]


@pytest.fixture
def stats(draw, gather):
    return gather(draw(60, IN, dtype=torch.float64), double=True)


@pytest.fixture
def dense():
    return torch.randn(OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def mask():
    return torch.rand(OUT, IN, generator=torch.Generator().manual_seed(8)) > 0.5


def damped(stats, damp=0.01):
    hessian = stats[Gram].hessian
    return hessian + damp * hessian.diagonal().mean() * torch.eye(IN, dtype=hessian.dtype)


def loss(change, hessian):
    return 0.5 * (change @ hessian * change).sum()


def test_one_factorisation_gives_the_three_step_route_of_the_paper(stats):
    hessian = damped(stats)
    three_steps = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    upper = stats.derive(Factor(0.01)).upper
    torch.testing.assert_close(upper @ upper.T, hessian, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(upper, upper.triu())
    torch.testing.assert_close(torch.linalg.inv(upper), three_steps, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(1 / upper.diagonal(), three_steps.diagonal(), rtol=1e-12, atol=0)


def test_the_diagonal_is_that_of_the_inverse_without_the_columns_already_fixed(stats):
    hessian, upper = damped(stats), stats.derive(Factor(0.01)).upper
    for j in range(IN):
        rest = torch.linalg.inv(hessian[j:, j:])[0, 0]
        assert (1 / upper[j, j] ** 2).item() == pytest.approx(rest.item(), rel=1e-12)


@pytest.mark.parametrize("block", [1, 3, 4, 7, 15, 16, 128])
def test_a_fixed_mask_gives_the_same_weights_for_every_block_size(block, stats, dense, mask):
    wanted, _ = OBSSweep(block=IN)(dense, Fixed(mask), stats)
    swept, kept = OBSSweep(block=block)(dense, Fixed(mask), stats)
    torch.testing.assert_close(swept, wanted, rtol=1e-11, atol=1e-12)
    assert torch.equal(kept, mask)


def test_blocks_wider_than_a_panel_give_the_same_weights(draw, gather):
    x = draw(400, 150, dtype=torch.float64)
    dense = torch.randn(3, 150, dtype=torch.float64)
    mask = torch.rand(3, 150) > 0.5
    one, _ = OBSSweep(block=1)(dense, Fixed(mask), gather(x, double=True))
    wide, _ = OBSSweep(block=128)(dense, Fixed(mask), gather(x, double=True))
    torch.testing.assert_close(one, wide, rtol=1e-9, atol=1e-10)


def test_the_sweep_is_the_rank_one_recursion(stats, dense, mask):
    inverse = torch.linalg.inv(stats.derive(Factor(0.01)).upper)
    wanted = dense.clone()
    for j in range(IN):
        error = wanted[:, j] * ~mask[:, j] / inverse[j, j]
        wanted[:, j:] -= error[:, None] * inverse[j, j:]
    swept, _ = OBSSweep()(dense, Fixed(mask), stats)
    torch.testing.assert_close(swept, wanted, rtol=1e-11, atol=1e-12)


def test_losses_left_of_all_kept_columns_are_made_up_for_by_least_squares(stats, dense):
    mask = torch.arange(IN).expand(OUT, IN) >= 5
    swept, _ = OBSSweep(block=4)(dense, Fixed(mask), stats)
    hessian, gone, kept = damped(stats), slice(0, 5), slice(5, IN)
    solution = torch.linalg.solve(hessian[kept, kept], hessian[kept, gone] @ dense[:, gone].T).T
    torch.testing.assert_close(swept[:, kept], dense[:, kept] + solution, rtol=1e-11, atol=1e-12)


def test_least_squares_loses_no_more_than_the_sweep_and_the_sweep_less_than_nothing(stats, dense, mask):
    hessian = damped(stats)
    swept, _ = OBSSweep()(dense, Fixed(mask), stats)
    for row in range(OUT):
        kept, gone = mask[row], ~mask[row]
        best = torch.zeros(IN, dtype=torch.float64)
        best[kept] = dense[row, kept] + torch.linalg.solve(
            hessian[kept][:, kept], hessian[kept][:, gone] @ dense[row, gone]
        )
        assert loss((best - dense[row])[None], hessian) <= loss((swept[row] - dense[row])[None], hessian) + 1e-12
    assert loss(swept - dense, hessian) < loss(dense * ~mask, hessian)


def test_a_single_weight_costs_what_refitting_all_others_costs(stats, dense):
    hessian = damped(stats)
    inverse = torch.linalg.inv(hessian)
    row = dense[0]
    costs = []
    for m in range(IN):
        others = torch.arange(IN) != m
        change = torch.linalg.solve(hessian[others][:, others], hessian[others, m] * row[m])
        delta = torch.zeros(IN, dtype=torch.float64)
        delta[m], delta[others] = -row[m], change
        costs.append(loss(delta[None], hessian).item())
        assert costs[-1] == pytest.approx((row[m] ** 2 / (2 * inverse[m, m])).item(), rel=1e-10)
    # The metric's first column is decided while all others are free.
    score = OBS()(dense, stats)(dense, slice(0, IN))[0, 0].item()
    assert score == pytest.approx(2 * costs[0], rel=1e-10)


def test_a_later_column_does_not_change_an_earlier_one(stats, dense, mask):
    swept, _ = OBSSweep(block=4)(dense, Fixed(mask), stats)
    for j in (3, 8, 15):
        changed = dense.clone()
        changed[:, j] += 5
        again, _ = OBSSweep(block=4)(changed, Fixed(mask), stats)
        assert torch.equal(again[:, :j], swept[:, :j])


def test_white_input_changes_no_weight_and_ranks_as_magnitude(weight, gather, site):
    white = gather(torch.eye(24) * 2)
    sweep = METHODS["sparsegpt"].prune(site(weight), white, 0.5)
    plain = METHODS["magnitude"].prune(site(weight), white, 0.5)
    assert torch.equal(sweep.mask, plain.mask)
    torch.testing.assert_close(sweep.weight, plain.weight, rtol=0, atol=0)


def test_uncorrelated_input_changes_no_weight_and_ranks_as_wanda_over_the_matrix(weight, gather, site):
    x = torch.diag(torch.linspace(0.5, 3, 24))
    sparsegpt = Elementwise(OBS(damp=0), Unstructured("matrix"), OBSSweep(damp=0))
    wanda = replace(METHODS["wanda"], pattern=Unstructured("matrix"))
    swept, plain = (chosen.prune(site(weight), gather(x), 0.5) for chosen in (sparsegpt, wanda))
    assert torch.equal(swept.mask, plain.mask)
    assert torch.equal(swept.weight, plain.weight)


def test_the_scale_of_an_input_may_move_to_its_column(stats, dense, draw, gather, site):
    scale = 2.0 ** (torch.arange(IN) % 4)
    method = Elementwise(OBS(damp=0), Unstructured("matrix"), OBSSweep(block=5, damp=0))
    plain = method.prune(site(dense), stats, 0.5)
    moved = method.prune(site(dense / scale), gather(draw(60, IN, dtype=torch.float64) * scale, double=True), 0.5)
    assert torch.equal(plain.mask, moved.mask)
    torch.testing.assert_close(moved.weight * scale, plain.weight, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pattern", [Unstructured("matrix"), Unstructured("row"), NM(2, 4)], ids=str)
def test_dead_inputs_do_not_change_the_count_and_reference_zeroes_them(pattern, weight, draw, gather, site):
    x = draw(80, 24)
    dead = [0, 5, 6, 17]
    x[:, dead] = 0.0
    exact = Elementwise(OBS(), pattern, OBSSweep()).prune(site(weight), gather(x), 0.25)
    if isinstance(pattern, Unstructured):
        assert (~exact.mask).sum() == 12 * 24 // 4
        assert (~exact.mask)[:, dead].sum() == 4 * 12
    every = Elementwise(OBS(), pattern, OBSSweep(block=8, compat="reference")).prune(site(weight), gather(x), 0.25)
    assert not every.weight[:, dead].any()
    assert not every.mask[:, dead].any()
    live = [j for j in range(24) if j not in dead]
    # Without its output, whatever becomes of a dead input changes nothing.
    alone = gather(x[:, live])
    assert torch.allclose(x @ every.weight.T, x[:, live] @ every.weight[:, live].T)
    assert alone[Gram].hessian.diagonal().min() > 0


def test_more_dead_inputs_than_quota_keep_the_count(weight, draw, gather, site):
    x = draw(80, 24)
    x[:, :10] = 0.0
    edit = METHODS["sparsegpt"].prune(site(weight), gather(x), 0.25)
    assert (~edit.mask).sum() == 72
    assert edit.mask[:, 10:].all()
    torch.testing.assert_close(edit.weight[:, 10:], weight[:, 10:], rtol=0, atol=0)


@pytest.mark.parametrize("m,block", [(4, 6), (8, 3), (12, 32), (3, 128), (24, 1)])
def test_groups_are_never_cut_by_blocks(m, block, weight, x, gather, site):
    method = Elementwise(OBS(), NM(1, m), OBSSweep(block=block))
    edit = method.prune(site(weight), gather(x), 1 - 1 / m)
    assert (edit.mask.reshape(-1, m).sum(1) == 1).all()


@pytest.mark.parametrize("block", [1, 5, 7])
@pytest.mark.parametrize("metric", METRICS)
def test_what_one_block_cannot_remove_the_next_one_does(metric, block, weight, x, gather, site):
    for pattern, size in ((Unstructured("row"), 24), (Unstructured("matrix"), 288)):
        edit = Elementwise(METRICS[metric], pattern, OBSSweep(block=block)).prune(site(weight), gather(x), 0.37)
        assert ((~edit.mask).reshape(-1, size).sum(1) == int(size * 0.37)).all()


def test_every_group_is_chosen_on_corrected_weights(stats, dense):
    """What `choose` is shown are the values of the rank-one recursion at that moment."""
    shown = {}

    @dataclass(frozen=True)
    class Watch:
        align: int = 4
        grouped: bool = True

        def __call__(self, weight, columns):
            shown[columns.start] = weight.clone()
            return NM(2, 4).keep(weight.abs(), 0.5)

    _, mask = OBSSweep(block=8)(dense, Watch(), stats)
    inverse = torch.linalg.inv(stats.derive(Factor(0.01)).upper)
    running = dense.clone()
    for j in range(IN):
        if j % 4 == 0:
            torch.testing.assert_close(shown[j], running[:, j : j + 4], rtol=1e-11, atol=1e-12)
        error = running[:, j] * ~mask[:, j] / inverse[j, j]
        running[:, j:] -= error[:, None] * inverse[j, j:]


def test_sites_with_the_same_input_factor_once(weight, x, gather, site, monkeypatch):
    stats, calls = gather(x), []
    original = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *args: calls.append(1) or original(*args))
    for _ in range(3):
        METHODS["sparsegpt"].prune(site(weight), stats, 0.5)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "wrong", [{"block": 0}, {"damp": -0.1}, {"damp": 1.5}, {"compat": "refrence"}, {"bits": 1}, {"bits": 9}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(RecipeError, match=f"update.{next(iter(wrong))}"):
        OBSSweep(**wrong)


def test_on_correlated_uneven_inputs_the_sweep_beats_wanda_beats_magnitude(site, gather):
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(512, 64, generator=generator)
        for j in range(1, 64):
            x[:, j] = 0.9 * x[:, j - 1] + (1 - 0.81) ** 0.5 * x[:, j]
        x = x * torch.exp(0.7 * torch.randn(64, generator=generator))
        weight = torch.randn(32, 64, generator=generator)
        stats = gather(x)
        lost = [
            (x @ (METHODS[name].prune(site(weight), stats, 0.5).weight - weight).T).square().sum().item()
            for name in ("sparsegpt", "wanda", "magnitude")
        ]
        assert lost == sorted(lost)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_scores_the_corrected_weights(metric, weight, x, gather, site):
    """With the sweep the mask is chosen block by block, so it differs from the one chosen at once."""
    swept = Elementwise(METRICS[metric], Unstructured("row"), OBSSweep(block=4)).prune(site(weight), gather(x), 0.5)
    scorer = METRICS[metric](weight, gather(x))
    first = Unstructured("row").keep(scorer(weight[:, :4], slice(0, 4)), 0.5)
    assert torch.equal(swept.mask[:, :4], first)
