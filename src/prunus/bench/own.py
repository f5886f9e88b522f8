"""Our own loop: the packed engine, and the same loop on dense weights, which is the honest baseline."""

from __future__ import annotations

import time
from pathlib import Path

from prunus.models.skeleton import read_config
from prunus.packed.matrix import PackedMatrix, QuantizedMatrix
from prunus.packed.running import uncovered
from prunus.packed.weights import engine_weights
from prunus.runtime.choice import likeliest
from prunus.runtime.engine import Engine
from prunus.runtime.plan import NotCovered


class Own:
    """The engine on a folder."""

    def __init__(self, folder: Path, values: str) -> None:
        problem = uncovered(folder)
        if problem:
            raise NotCovered(f"Our own loop does not cover this model: {problem}")
        weights = engine_weights(folder, values)
        self.file_bytes = sum(_bytes(weight) for weight in weights.values())
        self.engine = Engine(read_config(folder), weights, verify=False)
        self.bytes_per_token = self.engine.bytes_per_token

    def prefill(self, ids: list[int]) -> float:
        """See `Runner.prefill`."""
        self.engine.reset()
        begun = time.perf_counter()
        self.engine.prefill(ids)
        return time.perf_counter() - begun

    def decode(self, ids: list[int], tokens: int) -> float:
        """See `Runner.decode`."""
        self.engine.reset()
        token = likeliest(self.engine.prefill(ids))
        begun = time.perf_counter()
        for _ in range(tokens):
            token = likeliest(self.engine.step(token))
        return (time.perf_counter() - begun) / tokens


def open(folder: Path, variant: str) -> Own:
    """`variant`: packed, or a name of `packed.weights.DENSE`."""
    return Own(folder, variant)


def _bytes(weight: object) -> int:
    if isinstance(weight, PackedMatrix):
        return weight.bytes
    if isinstance(weight, QuantizedMatrix):
        return weight.codes.nbytes + weight.scales.nbytes
    return weight.nbytes  # type: ignore[attr-defined]
