"""What an allocation may know before the first cut: the sites, and measurements on the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunus.evidence import AnyNeeds, Evidence, of_inputs
from prunus.progress import Progress
from prunus.sites import Block, Matrix, SiteInfo
from prunus.statistics import SiteStats
from prunus.stream import Batch, Stream
from prunus.trials import Trial, Whole, resident
from prunus.work import Work

if TYPE_CHECKING:
    from prunus.methods.shape import Visit
    from prunus.models.checkpoint import Checkpoint
    from prunus.shapes.legal import Legal

Measure = Callable[[list[Matrix], Mapping[str, SiteStats]], Tensor]


class Survey:
    """Lets an allocation measure every block of the dense model, one in memory at a time.

    Values are kept on disk as they come, so that a killed run does not measure a block twice.

    Attributes:
        sites: all sites, in model order.
    """

    def __init__(
        self,
        stream: Stream,
        batches: list[Batch],
        work: Work,
        progress: Progress,
        evidence: Evidence,
        legal: Legal | None = None,
    ):
        """Bind the parts; nothing is measured yet. `legal` says which shapes the result may have, any unless given."""
        self.legal = legal
        self.evidence = evidence
        self.stream = stream
        self.batches = batches
        self.work = work
        self.progress = progress
        self.sites: list[SiteInfo] = [info for block in stream.blocks for info in block.infos]
        self.passes = 0

    def measure(self, function: Measure, needs: AnyNeeds = frozenset()) -> dict[str, Tensor]:
        """Walk the dense model and apply `function` to each block.

        Args:
            function: `(matrices of a block, statistics of each by name) → tensor`.
            needs: types of statistics; without any, or with gradients of the loss alone, the walk reads weights only
                and runs nothing.

        Returns:
            Block name → value, in model order.
        """
        values, names = self._stored()
        if len(values) < len(names):
            self.progress.stage(f"survey {self.passes}", len(names))
            walk = self._weights_only if needs <= self.evidence.kinds else self._with_data
            walk(function, needs, names, values)
        return {name: values[name] for name in names}

    @property
    def blocks(self) -> list[Block]:
        """All blocks in model order."""
        return self.stream.blocks

    def visit(self, function: Visit, needs: AnyNeeds = frozenset(), *, text: bool = True) -> dict[str, Tensor]:
        """Walk the dense model and apply `function` to each block that runs.

        Args:
            function: `(block with its inputs and outputs, statistics of its matrices) → tensor`, or None: the block is
                visited again by a resumed run, and nothing is returned for it.
            needs: types of statistics.
            text: False: blocks are run on the probe alone, and nothing is gathered.

        Returns:
            Block name → value.
        """
        # Also blocks of which --ignore leaves no matrix: they run, and are asked about like the others.
        values, names = self._stored(self.blocks)
        dense = self.stream.weights.checkpoint
        batches = self.batches if text else self.batches[-1:]
        if len(values) < len(names):
            self.progress.stage(f"survey {self.passes}", len(names))
            for step in self.stream.walk(
                batches, of_inputs(needs), lambda block: dense if block.name in values else None
            ):
                if (value := function(step, self.evidence.of(step, needs))) is not None:
                    self._keep(step.block.name, value, names, values)
        return {name: values[name] for name in names if name in values}

    def trials(self, trial: Trial, samples: int) -> dict[str, Tensor]:
        """Load the whole dense model and apply `trial` to each block.

        Args:
            trial: `(matrices of a block, losses of the batches with the weights as they are) → tensor`; must leave
                every weight as it was.
            samples: how many calibration samples the losses are of.

        Returns:
            Block name → value, in model order.
        """
        values, names = self._stored()
        if len(values) < len(names):
            self.progress.stage(f"survey {self.passes}", len(names) - len(values))
            with self.whole(samples) as (blocks, losses):
                for name, matrices in blocks.items():
                    if name not in values:
                        self._keep(name, trial(matrices, losses), names, values)
        return {name: values[name] for name in names}

    @contextmanager
    def whole(self, samples: int) -> Iterator[Whole]:
        """The whole dense model in memory: the matrices of its blocks, and the losses of some calibration samples.

        Args:
            samples: how many samples, from the end of the calibration text; at least one batch. Of several processes
                the first one measures, with samples of its own, and all are told.
        """
        with resident(self.stream, _last(self.batches, samples)) as measured:

            def losses(batches: int | None = None) -> Tensor:
                return self.stream.processes.on_first(lambda: measured(batches))

            yield {block.name: block.matrices() for block in self._blocks()}, losses

    def refusal(self, heads: int | None) -> str:
        """Why the result cannot have so many groups of heads in each block (None: as they are); empty if it can."""
        return self.legal.refusal(heads) if self.legal else ""

    def recall(self, name: str) -> Any:
        """What `remember` kept under this name, also in an earlier, killed run; None if there is none."""
        return self.stream.processes.agree(self.work.read(f"survey/{name}.json"))

    def remember(self, name: str, value: Any) -> Any:
        """Keep a JSON value until the run is over; returns it as the first process has it."""
        self.stream.processes.on_first(lambda: self.work.write(f"survey/{name}.json", value))
        return self.recall(name)

    def _stored(self, blocks: list[Block] | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What an earlier call of the same number has measured, and the file of every block; those with matrices."""
        chosen = self._blocks() if blocks is None else blocks
        names = {block.name: f"survey/{self.passes}-{number}.safetensors" for number, block in enumerate(chosen)}
        self.passes += 1
        found = {name: self.work.read_tensors(file) for name, file in names.items()}
        return {name: stored["value"] for name, stored in found.items() if stored is not None}, names

    def _blocks(self) -> list[Block]:
        return [block for block in self.stream.blocks if block.slots]

    def _with_data(
        self, function: Measure, needs: AnyNeeds, names: Mapping[str, str], values: dict[str, Tensor]
    ) -> None:
        dense: Checkpoint = self.stream.weights.checkpoint
        for step in self.stream.walk(
            self.batches, of_inputs(needs), lambda block: dense if block.name in values else None
        ):
            if step.block.slots:
                stats = self.evidence.of(step, needs)
                self._keep(step.block.name, function(step.block.matrices(), stats), names, values)

    def _weights_only(
        self, function: Measure, needs: AnyNeeds, names: Mapping[str, str], values: dict[str, Tensor]
    ) -> None:
        weights = self.stream.weights
        for block in self._blocks():
            if block.name not in values:
                weights.load(weights.sources(block.name))
                stats = self.evidence.joined(block, {}, needs)
                self._keep(block.name, function(block.matrices(), stats), names, values)
                weights.drop(block.module)

    def _keep(self, block: str, value: Tensor, names: Mapping[str, str], values: dict[str, Tensor]) -> None:
        values[block] = value.detach().cpu()
        if self.stream.processes.rank == 0:
            self.work.write_tensors(names[block], {"value": values[block].contiguous()})
        self.progress.advance(block)


def _last(batches: list[Batch], samples: int) -> list[Batch]:
    """Batches with the last so many samples, at least one batch; without the probe."""
    chosen: list[Batch] = []
    for batch in reversed(batches):
        if batch.samples and (not chosen or sum(other.samples for other in chosen) + batch.samples <= samples):
            chosen.append(batch)
    return chosen
