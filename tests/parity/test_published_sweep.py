"""SparseGPT as published, transcribed line by line, against ours with compat="reference"."""

import pytest
import torch

from prunus.methods.compose import compose
from prunus.sites import Matrix
from prunus.statistics import Gram, SiteStats


def published(weight, hessian, sparsity, keep=0, of=0, block=128, damp=0.01):
    """The published algorithm with the inverse Hessian and one rank-one update per column, in float64."""
    w, h = weight.double().clone(), hessian.double().clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += damp * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        w1, u1 = w[:, start:stop].clone(), u[start:stop, start:stop]
        q1, e1 = torch.zeros_like(w1), torch.zeros_like(w1)
        gone = torch.zeros_like(w1, dtype=torch.bool)
        if not of:
            score = w1**2 / u1.diagonal() ** 2
            gone = score <= score.flatten().sort().values[int(score.numel() * sparsity)]
        for i in range(stop - start):
            if of and i % of == 0:
                score = w1[:, i : i + of] ** 2 / u1.diagonal()[i : i + of] ** 2
                gone.scatter_(1, i + score.topk(of - keep, dim=1, largest=False).indices, True)
            q1[:, i] = torch.where(gone[:, i], 0.0, w1[:, i])
            e1[:, i] = (w1[:, i] - q1[:, i]) / u1[i, i]
            w1[:, i:] -= torch.outer(e1[:, i], u1[i, i:])
        w[:, start:stop] = q1
        w[:, stop:] -= e1 @ u[start:stop, stop:]
    return w


def problem(rows, columns, tokens, dead=()):
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x[:, list(dead)] = 0.0
    gram = Gram(columns, dtype=torch.float64)
    gram.update(x, 4)
    return torch.randn(rows, columns, generator=generator), SiteStats({Gram: gram}, "a")


@pytest.mark.parametrize("rows,columns,tokens", [(7, 40, 200), (20, 150, 400), (3, 300, 100)])
@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("dead", [(), (0, 9, 33)])
def test_the_unstructured_sweep(rows, columns, tokens, block, sparsity, dead):
    weight, stats = problem(rows, columns, tokens, dead)
    method, _ = compose("sparsegpt", compat="reference", settings={"update.block": block})
    edit = method.prune(Matrix("a", weight.double(), "b"), stats, sparsity)
    wanted = published(weight, stats[Gram].hessian, sparsity, block=block)
    torch.testing.assert_close(edit.weight, wanted, rtol=1e-7, atol=1e-8)
    assert torch.equal(edit.mask, wanted != 0)


@pytest.mark.parametrize("keep,of", [(2, 4), (4, 8), (1, 4), (7, 16)])
@pytest.mark.parametrize("block", [16, 128])
def test_the_nm_sweep(keep, of, block):
    weight, stats = problem(20, 144, 400)
    method, _ = compose("sparsegpt", pattern=f"{keep}:{of}", settings={"update.block": block})
    edit = method.prune(Matrix("a", weight.double(), "b"), stats, 1 - keep / of)
    wanted = published(weight, stats[Gram].hessian, 0, keep, of, block)
    torch.testing.assert_close(edit.weight, wanted, rtol=1e-7, atol=1e-8)
    assert torch.equal(edit.mask, wanted != 0)


def test_exact_removes_one_weight_less_per_block_than_published():
    weight, stats = problem(20, 150, 400)
    site = Matrix("a", weight.double(), "b")
    ours, _ = compose("sparsegpt", settings={"update.block": 50})
    theirs, _ = compose("sparsegpt", compat="reference", settings={"update.block": 50})
    first, second = (method.prune(site, stats, 0.5).mask for method in (ours, theirs))
    assert (~first).sum() == 1500
    assert (~second).sum() == 1503
    assert (first != second)[:, :50].sum() == 1
    assert (first == second).float().mean() > 0.98
