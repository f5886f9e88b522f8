"""Statistics of one block's matrices, gathered while calibration batches run through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from prunus.distributed import Processes
from prunus.errors import ModelError
from prunus.models.experts import is_experts, observing
from prunus.sites import Block
from prunus.statistics import SiteStats, Statistic


@contextmanager
def inputs_shown(block: Block, show: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Inside the context, every matrix among a block's slots shows its inputs `[…, in]` whenever it runs.

    Args:
        block: loaded.
        show: called with the name of the matrix and its inputs.
    """
    names = {slot.info.name for slot in block.slots}

    def one(name: str) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, args: tuple) -> None:
            show(name, args[0])

        return hook

    def stack_of(path: str) -> Callable[[str, Tensor], None]:
        def observe(matrix: str, inputs: Tensor) -> None:
            if f"{path}.{matrix}" in names:
                show(f"{path}.{matrix}", inputs)

        return observe

    with ExitStack() as stack:
        for path, module in block.module.named_modules():
            name = f"{block.name}.{path}" if path else block.name
            if is_experts(module):
                stack.enter_context(observing(module, stack_of(name)))
            elif name in names:
                stack.callback(module.register_forward_pre_hook(one(name)).remove)
        yield


class Gatherer:
    """Feeds the inputs of a block's matrices to their statistics.

    Matrices that are given the same tensor (q, k and v; gate and up) share one set of accumulators. They are recognised
    in the first batch by the identity of that tensor, so no name is known here.
    """

    def __init__(self, block: Block, needs: frozenset[type[Statistic]]):
        """Prepare empty statistics of the types in `needs` for the matrices of a loaded block."""
        self.slots = {slot.info.name: slot for slot in block.slots}
        self.block = block
        self.needs = needs
        self.leaders: dict[str, str] = {}
        self.stats: dict[str, SiteStats] = {}
        self.samples = 0
        self.counted: set[str] = set()
        self.seen: dict[tuple[int, int], tuple[Tensor, str]] = {}

    @contextmanager
    def watching(self) -> Iterator[Gatherer]:
        """Inside the context, every forward of the block is observed; the modules are as before afterwards."""
        with inputs_shown(self.block, self._observe):
            yield self

    def begin(self, samples: int) -> None:
        """Announce the next batch of so many calibration samples; with 0 it is run but not counted."""
        self.samples = samples
        self.seen.clear()
        self.counted.clear()

    def finish(self, processes: Processes) -> dict[str, SiteStats]:
        """The statistics of every matrix, added up over all processes.

        Raises:
            ModelError: the inputs of a matrix were NaN or infinite.
        """
        self.seen.clear()
        for name in self.slots:
            if self.leaders.setdefault(name, name) == name:
                own = self._own(name)
                processes.add_up(tensor for statistic in own for tensor in statistic.tensors())
                if not all(statistic.finite() for statistic in own):
                    raise ModelError(f"The inputs of {name} are NaN or infinite on the calibration text.")
        return {name: self.stats[leader] for name, leader in self.leaders.items()}

    def _observe(self, name: str, inputs: Tensor) -> None:
        if not self.samples or not self.needs:
            return
        # The tensor is kept with its id, so that the id cannot be given to another one within this batch.
        _, first = self.seen.setdefault((id(inputs), inputs._version), (inputs, name))
        leader = self.leaders.setdefault(name, first)
        if leader != name:
            return
        flat = inputs.reshape(-1, inputs.shape[-1])
        # A matrix that is called twice for a batch still sees the same samples.
        samples = 0 if name in self.counted else self.samples
        self.counted.add(name)
        for statistic in self._own(name):
            statistic.update(flat, samples)

    def _own(self, name: str) -> list[Statistic]:
        """The accumulators of a matrix that has its own, made when first asked for."""
        if name not in self.stats:
            slot = self.slots[name]
            device = getattr(slot.module, slot.attribute).device
            columns = slot.info.shape[1]
            # By name: a set of types has another order in every process, and sums are added up in order.
            kinds = sorted(self.needs, key=lambda kind: kind.__name__)
            self.stats[name] = SiteStats({kind: kind(columns, device) for kind in kinds}, name)
        return list(self.stats[name].values())
