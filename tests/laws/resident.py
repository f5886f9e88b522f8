"""A model of matrices in memory, as allocations survey it."""

import json
from contextlib import contextmanager

import torch

from prunus.progress import Silent
from prunus.sites import Matrix, SiteInfo
from prunus.statistics import SiteStats


class Resident:
    """A survey of matrices in memory: block -> site -> (weight, inputs)."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.matrices = {b: [Matrix(f"{b}.{s}", w, b) for s, (w, _) in sites.items()] for b, sites in blocks.items()}
        self.sites = [
            SiteInfo(matrix.name, matrix.block, tuple(matrix.weight.shape))
            for block in self.matrices.values()
            for matrix in block
        ]
        self.data_passes = 0
        self.notes = {}
        self.patience = None
        self.progress = Silent()

    def measure(self, function, needs=frozenset()):
        self.data_passes += bool(needs)
        return {
            block: function(
                matrices, {f"{block}.{s}": self._stats(x, needs, len(w)) for s, (w, x) in self.blocks[block].items()}
            )
            for block, matrices in self.matrices.items()
        }

    def losses(self, batches=None):
        rows = [x[:4] @ w.float().T for sites in self.blocks.values() for w, x in sites.values()]
        return torch.stack([sum(row[half].square().sum() for row in rows) for half in (0, 1)]).double()[:batches]

    def trials(self, trial, samples):
        self.data_passes += 1
        return {block: trial(matrices, self.losses) for block, matrices in self.matrices.items()}

    @contextmanager
    def whole(self, samples):
        before = {name: [matrix.weight.clone() for matrix in block] for name, block in self.matrices.items()}
        yield self.matrices, self.losses
        for name, block in self.matrices.items():
            for matrix, weight in zip(block, before[name], strict=True):
                matrix.weight.copy_(weight)

    def recall(self, name):
        return self.notes.get(name)

    def remember(self, name, value):
        self.notes[name] = json.loads(json.dumps(value))
        if self.patience is not None and len(self.notes) and value.get("trials", 0) >= self.patience:
            raise KeyboardInterrupt
        return self.recall(name)

    def _stats(self, x, needs, rows):
        return SiteStats({kind: gathered(kind, x, rows) for kind in needs})


def gathered(kind, x, rows):
    """A statistic of inputs, or the gradient of a matrix whose outputs all have the same derivative."""
    if kind.source == "inputs":
        made = kind(x.shape[1])
        if len(x):
            made.update(x, 2)
        return made
    made = kind((rows, x.shape[1]))
    for part in x.chunk(2) if len(x) else ():
        made.update(part.sum(0).expand(rows, -1) / 100)
    return made


def model(shapes, seed=0, dtype=torch.float32, equal=False):
    generator = torch.Generator().manual_seed(seed)
    blocks = {}
    for b, sites in enumerate(shapes):
        if equal:
            generator.manual_seed(seed)
        blocks[f"layers.{b}"] = {
            f"m{i}": (
                (torch.randn(*shape, generator=generator) ** (1 if equal else b % 3 + 1)).to(dtype),
                torch.randn(40, shape[1], generator=generator) ** 2,
            )
            for i, shape in enumerate(sites)
        }
    return Resident(blocks)


EVEN = [[(8, 16), (16, 8)]] * 5
UNEVEN = [[(8, 16)], [(4, 4), (10, 20)], [(40, 16), (16, 40)], [(6, 7)]]
