"""All that a method may know about the matrices of a block, whichever way it was found."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus.progress import Progress
from prunus.reverse import Found, Kinds, Reverse, add_up, backward, differentiable
from prunus.sites import Block
from prunus.statistics import SiteStats
from prunus.stream import Batch, Needs, Step, Stream
from prunus.work import Work

AnyNeeds = frozenset[type]


def of_inputs(needs: AnyNeeds) -> Needs:
    """The kinds that are seen while a block runs."""
    return frozenset(kind for kind in needs if kind.source == "inputs")


def of_gradients(needs: AnyNeeds) -> Kinds:
    """The kinds that need a backward pass, for which samples are run one by one."""
    return frozenset(kind for kind in needs if kind.source in ("loss", "output"))


class Evidence:
    """Completes what was gathered from inputs with gradients, where something needs them.

    Attributes:
        kinds: of gradients of the loss that any part of the run needs; taken once, on the dense model.
    """

    def __init__(self, stream: Stream, batches: list[Batch], work: Work, progress: Progress, needs: AnyNeeds):
        """Bind the parts; `needs` is of all parts of the run."""
        self.batches = batches
        self.kinds = frozenset(kind for kind in of_gradients(needs) if kind.source == "loss")
        self.reverse = Reverse(stream, batches, work, progress)
        self.processes = stream.processes

    def prepare(self) -> None:
        """Take the gradients of the loss, if any part needs them.

        Raises:
            ModelError: the model has several towers or no head for a language-modelling loss.
        """
        if self.kinds:
            self.reverse.measure(self.kinds)

    def of(self, step: Step, needs: AnyNeeds) -> dict[str, SiteStats]:
        """Matrix name → all statistics in `needs`; the block must still be as it was gathered from."""
        found: Found = {}
        outputs = frozenset(kind for kind in of_gradients(needs) if kind.source == "output")
        if outputs:
            _merge(found, self._regional(step, outputs))
        return self.joined(step.block, step.stats, needs, found)

    def joined(
        self, block: Block, stats: Mapping[str, SiteStats], needs: AnyNeeds, found: Found | None = None
    ) -> dict[str, SiteStats]:
        """`stats` with the gradients of the loss that are among `needs`, and with those already `found`."""
        found = {} if found is None else found
        wanted = of_gradients(needs) & self.kinds
        if wanted:
            _merge(found, self.reverse.read(block, wanted))
        if not found:
            return dict(stats)
        empty = SiteStats({}, block.name)
        return {info.name: stats.get(info.name, empty).joined(found[info.name], info.name) for info in block.infos}

    def _regional(self, step: Step, kinds: Kinds) -> Found:
        """Gradients of the norm of the block's outputs, sample by sample, on the inputs of this pass."""
        block = step.block
        device = self.reverse.stream.device
        found = {info.name: {kind: kind(info.shape, device) for kind in kinds} for info in block.infos}
        with differentiable(block):
            for batch in self.batches:
                if batch.samples:
                    assert batch.hidden is not None
                    backward(block, batch, batch.hidden, _unit, found, onward=False)
        for name, sums in found.items():
            add_up(name, sums, self.processes)
        return found


def _unit(outputs: Tensor) -> Tensor:
    """∂‖Y‖₂/∂Y = Y / ‖Y‖₂."""
    return outputs / torch.linalg.vector_norm(outputs.float()).clamp_min(torch.finfo(torch.float32).tiny)


def _merge(found: Found, more: Found) -> None:
    for name, sums in more.items():
        found.setdefault(name, {}).update(sums)
