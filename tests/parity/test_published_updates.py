"""Updates as their papers write them, in the plainest loops, against ours."""

import pytest
import torch

from prunus.methods.compose import compose
from prunus.methods.elementwise import Elementwise
from prunus.metrics import Wanda
from prunus.patterns import NM, Unstructured
from prunus.sites import Matrix
from prunus.statistics import Gram, InputMoments, InputNorm, SiteStats
from prunus.updates import ADMM, DSnoT, LeastSquares, OBSSweep

PATTERNS = {"row": Unstructured("row"), "matrix": Unstructured("matrix"), "2:4": NM(2, 4), "1:4": NM(1, 4)}


def problem(rows, columns, tokens, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ mix + shift * torch.randn(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator).double(), x.double()


def gathered(x, samples=4):
    stats = {InputNorm: InputNorm(x.shape[1]), InputMoments: InputMoments(x.shape[1])}
    stats[Gram] = Gram(x.shape[1], dtype=torch.float64)
    for statistic in stats.values():
        statistic.update(x, samples)
    return SiteStats(stats)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [12, 200])
def test_least_squares_is_a_regression_of_the_dense_outputs_on_the_kept_inputs(pattern, tokens):
    weight, x = problem(9, 24, tokens)
    method = Elementwise(Wanda(), PATTERNS[pattern], LeastSquares(steps=1000, tolerance=1e-22))
    edit = method.prune(Matrix("a", weight, "b"), gathered(x), 0.5)
    # Damping: as many further tokens as inputs, each with one input alone.
    size = (0.01 * x.square().sum(0).mean()).sqrt()
    padded = torch.cat([x, size * torch.eye(24, dtype=torch.float64)])
    for i in range(9):
        kept = edit.mask[i]
        wanted = torch.linalg.lstsq(padded[:, kept], padded @ weight[i]).solution
        torch.testing.assert_close(edit.weight[i, kept], wanted, rtol=1e-8, atol=1e-8)
        assert not edit.weight[i, ~kept].any()


def jointly(weight, x, mask, bits, samples=4):
    """Each column masked, rounded to its row's grid, and its error spread to the right, one after the other."""
    w = weight.clone()
    hessian = 2 / samples * x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    step = (high - low) / (2**bits - 1)
    zero = (-low / step).round()
    for j in range(w.shape[1]):
        rounded = step * ((w[:, j] / step).round() + zero).clamp(0, 2**bits - 1) - step * zero
        fixed = torch.where(mask[:, j], rounded, 0.0)
        w[:, j + 1 :] -= torch.outer((w[:, j] - fixed) / u[j, j], u[j, j + 1 :])
        w[:, j] = fixed
    return w, step


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("pattern,sparsity", [("row", 0.0), ("row", 0.5), ("2:4", 0.5)])
@pytest.mark.parametrize("block", [8, 128])
def test_the_sweep_prunes_and_quantises_at_once(bits, pattern, sparsity, block):
    weight, x = problem(7, 80, 300)
    weight[2], weight[3] = weight[2].abs() + 1, -weight[3].abs() - 1  # 0 is on the grid all the same
    method = Elementwise(Wanda(), PATTERNS[pattern], OBSSweep(block=block, bits=bits))
    edit = method.prune(Matrix("a", weight, "b"), gathered(x), sparsity)
    wanted, step = jointly(weight, x, edit.mask, bits)
    torch.testing.assert_close(edit.weight, wanted, rtol=1e-8, atol=1e-9)
    units = edit.weight / step[:, None]
    torch.testing.assert_close(units, units.round(), rtol=0, atol=1e-9)
    assert not edit.weight[~edit.mask].any()
    assert all(len(row.unique()) <= 2**bits for row in units.round())


def test_quantised_weights_lie_exactly_on_their_grid_in_float32():
    weight, x = problem(7, 80, 300)
    edit = Elementwise(Wanda(), PATTERNS["row"], OBSSweep(bits=4)).prune(
        Matrix("a", weight.float(), "b"), gathered(x), 0.5
    )
    low, high = weight.float().amin(1).clamp(max=0), weight.float().amax(1).clamp(min=0)
    step = (high - low) / 15
    assert torch.equal(edit.weight, (edit.weight / step[:, None]).round() * step[:, None])


def refined(weight, x, mask, group, update, samples=4):
    """The swaps of one row, one after the other, straight from the description."""
    columns = range(len(weight))
    tokens = len(x)
    mean = [sum(x[t][j] for t in range(tokens)) / samples for j in columns]
    spread = [
        sum(x[t][j] ** 2 for t in range(tokens)) / tokens - (sum(x[t][j] for t in range(tokens)) / tokens) ** 2
        for j in columns
    ]
    wanda = [abs(weight[j]) * (sum(x[t][j] ** 2 for t in range(tokens)) / samples) ** 0.5 for j in columns]
    d = [weight[j] * mean[j] for j in columns]
    mask, untouched, reference = list(mask), list(mask), update.compat == "reference"
    error = sum(d[j] for j in columns if not mask[j])
    positive = error > 0
    for _ in range(update.cycles):
        if abs(error) <= update.threshold:
            break
        sign = 1 if error > 0 else -1
        kept = [k for k in columns if mask[k] and untouched[k] and (sign * d[k] < 0 or (reference and group))]
        pairs = [
            (j, [k for k in kept if not group or k // group == j // group])
            for j in columns
            if not mask[j] and not untouched[j] and sign * d[j] > 0
        ]
        pairs = [(j, partners) for j, partners in pairs if partners]
        if not pairs:
            break
        grown, partners = max(pairs, key=lambda pair: sign * d[pair[0]] / spread[pair[0]] ** update.variance_power)
        gone = min(partners, key=lambda k: wanda[k])
        after = error + d[gone] - d[grown]
        if (after > 0) != positive and (group or not reference):
            break
        mask[grown], mask[gone], error = True, False, after
    return mask


@pytest.mark.parametrize("pattern,group", [("row", 0), ("matrix", 0), ("2:4", 4), ("1:4", 4)])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("settings", [{}, {"cycles": 4}, {"threshold": 3.0}, {"variance_power": 0.0}], ids=str)
def test_dsnot(pattern, group, reference, settings):
    weight, x = problem(14, 32, 40, seed=3, shift=0.5)
    stats, site = gathered(x), Matrix("a", weight, "b")
    update = DSnoT(compat="reference" if reference else "exact", **settings)
    sparsity = 0.75 if pattern == "1:4" else 0.5
    edit = Elementwise(Wanda(), PATTERNS[pattern], update).prune(site, stats, sparsity)
    first = Elementwise(Wanda(), PATTERNS[pattern]).prune(site, stats, sparsity).mask
    wanted = [refined(weight[i].tolist(), x.tolist(), first[i].tolist(), group, update) for i in range(14)]
    assert edit.mask.tolist() == wanted
    assert not torch.equal(edit.mask, first)


def published_alps(weight, x, keep, rho=0.1, steps=300):
    """Algorithm 1 with an inverse for every penalty: support of the last B, and how often the penalty grew.

    `keep` cuts rescaled weights: it gives those that stay, the others 0.
    """
    gram = x.T @ x
    scale = gram.diagonal().sqrt()
    gram = gram / scale / scale[:, None]
    dense = (weight * scale).T
    target = gram @ dense
    d, v = keep(dense), torch.zeros_like(dense)
    support, grown = d == 0, 0
    for step in range(1, steps + 1):
        b = torch.linalg.inv(gram + rho * torch.eye(len(gram), dtype=torch.float64)) @ (target - v + rho * d)
        d = keep(b + v / rho)
        v = v + rho * (b - d)
        if step % 3:
            continue
        now = d == 0
        changed = (now != support).sum().item()
        share = changed / (~now).sum().item()
        support = now
        if changed == 0 or (step > 30 and share < 0.0003):
            break
        rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
        grown += 1
    return keep(b).T != 0, grown


def largest(count):
    def keep(values):
        order = values.flatten().abs().argsort()
        kept = values.flatten().clone()
        kept[order[: len(order) - count]] = 0
        return kept.view(values.shape)

    return keep


def largest_of_groups(n, m):
    def keep(values):
        groups = values.T.reshape(-1, m).clone()
        groups.scatter_(1, groups.abs().argsort(1)[:, : m - n], 0.0)
        return groups.reshape(values.T.shape).T

    return keep


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pattern,keep,sparsity", [
    ("unstructured", largest(1024), 0.5), ("unstructured", largest(512), 0.75),
    ("2:4", largest_of_groups(2, 4), 0.5), ("1:4", largest_of_groups(1, 4), 0.75),
])  # fmt: skip
def test_alps_finds_the_published_support_and_the_best_weights_for_it(pattern, keep, sparsity, seed):
    weight, x = problem(32, 64, 400, seed)
    # Without damping, so that Wanda's norms are the published scale itself.
    method, _ = compose("alps", pattern=pattern, settings={"update.damp": 0.0})
    edit = method.prune(Matrix("a", weight, "b"), gathered(x), sparsity)
    support, grown = published_alps(weight, x, keep)
    assert grown > 5
    assert torch.equal(edit.mask, support)
    for i in range(32):
        kept = support[i]
        solution = torch.linalg.lstsq(x[:, kept], x @ weight[i]).solution
        least = (x[:, kept] @ solution - x @ weight[i]).square().sum()
        assert (x @ (edit.weight[i] - weight[i])).square().sum() <= least * 1.0002


def test_alps_is_wanda_over_the_matrix_with_the_search():
    method, _ = compose("alps")
    assert (method.metric, method.pattern, method.update) == (Wanda(), Unstructured("matrix"), ADMM())
