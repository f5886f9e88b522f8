"""A model of matrices in memory, as allocations survey it."""

import torch

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

    def measure(self, function, needs=frozenset()):
        self.data_passes += bool(needs)
        return {
            block: function(
                matrices, {f"{block}.{s}": self._stats(x, needs) for s, (_, x) in self.blocks[block].items()}
            )
            for block, matrices in self.matrices.items()
        }

    def _stats(self, x, needs):
        made = {kind: kind(x.shape[1]) for kind in needs}
        for statistic in made.values():
            if len(x):
                statistic.update(x, 2)
        return SiteStats(made)


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
