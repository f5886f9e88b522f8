"""What an allocation may know before the first cut: the sites, and measurements on the dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from prunus.progress import Progress
from prunus.sites import Block, Matrix, SiteInfo
from prunus.statistics import SiteStats
from prunus.stream import Batch, Needs, Stream
from prunus.work import Work

if TYPE_CHECKING:
    from prunus.models.checkpoint import Checkpoint

Measure = Callable[[list[Matrix], Mapping[str, SiteStats]], Tensor]


class Survey:
    """Lets an allocation measure every block of the dense model, one in memory at a time.

    Values are kept on disk as they come, so that a killed run does not measure a block twice.

    Attributes:
        sites: all sites, in model order.
    """

    def __init__(self, stream: Stream, batches: list[Batch], work: Work, progress: Progress):
        """Bind the parts; nothing is measured yet."""
        self.stream = stream
        self.batches = batches
        self.work = work
        self.progress = progress
        self.sites: list[SiteInfo] = [info for block in stream.blocks for info in block.infos]
        self.passes = 0

    def measure(self, function: Measure, needs: Needs = frozenset()) -> dict[str, Tensor]:
        """Walk the dense model and apply `function` to each block.

        Args:
            function: `(matrices of a block, statistics of each by name) → tensor`.
            needs: types of statistics; without any the walk reads weights only and runs nothing.

        Returns:
            Block name → value, in model order.
        """
        values = {}
        names = {
            block.name: f"survey/{self.passes}-{number}.safetensors" for number, block in enumerate(self._blocks())
        }
        for name, file in names.items():
            stored = self.work.read_tensors(file)
            if stored is not None:
                values[name] = stored["value"]
        self.passes += 1
        if len(values) < len(names):
            self.progress.stage(f"survey {self.passes}", len(names))
            walk = self._with_data if needs else self._weights_only
            walk(function, needs, names, values)
        return {name: values[name] for name in names}

    def _blocks(self) -> list[Block]:
        return [block for block in self.stream.blocks if block.slots]

    def _with_data(self, function: Measure, needs: Needs, names: Mapping[str, str], values: dict[str, Tensor]) -> None:
        dense: Checkpoint = self.stream.weights.checkpoint
        for step in self.stream.walk(self.batches, needs, lambda block: dense if block.name in values else None):
            if step.block.slots:
                self._keep(step.block.name, function(step.block.matrices(), step.stats), names, values)

    def _weights_only(
        self, function: Measure, needs: Needs, names: Mapping[str, str], values: dict[str, Tensor]
    ) -> None:
        weights = self.stream.weights
        for block in self._blocks():
            if block.name not in values:
                weights.load(weights.sources(block.name))
                self._keep(block.name, function(block.matrices(), {}), names, values)
                weights.drop(block.module)

    def _keep(self, block: str, value: Tensor, names: Mapping[str, str], values: dict[str, Tensor]) -> None:
        values[block] = value.detach().cpu()
        if self.stream.processes.rank == 0:
            self.work.write_tensors(names[block], {"value": values[block].contiguous()})
        self.progress.advance(block)
