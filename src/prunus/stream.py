"""Walk a model one block at a time: load, gather, let the caller change it, run it again, drop it.

This is the only loop over blocks. Peak memory is one block's weights, its statistics and two sets of hidden states,
whatever the depth of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunus.capture import Call, Inputs, Recorder, in_form, refuse_side_channels, replaced
from prunus.distributed import Processes
from prunus.errors import ModelError
from prunus.gather import Gatherer
from prunus.models.checkpoint import Checkpoint
from prunus.models.weights import Weights
from prunus.sites import Block
from prunus.statistics import SiteStats, Statistic

Needs = frozenset[type[Statistic]]

# Gives the checkpoint that holds a block already pruned, or None.
Finished = Callable[[Block], Checkpoint | None]


@dataclass
class Batch:
    """Calibration samples on their way through the model.

    Attributes:
        inputs: what the model is given, each tensor `[samples, …]`.
        samples: how many calibration samples count in the statistics; 0 for the probe, which is only carried along.
        hidden: the hidden states in front of the current block, on the CPU.
        calls: how each block of the current tower is called.
    """

    inputs: Inputs
    samples: int
    hidden: Tensor | None = None
    calls: dict[str, Call] = field(default_factory=dict)


@dataclass
class Step:
    """One loaded block with its statistics, between the gathering and the next block.

    Attributes:
        block: the block; its matrices may be changed in place.
        stats: matrix name → statistics of its inputs.
        dense: outputs of the unchanged block, one tensor per batch.
        outputs: what the next block will be given.
        rerun: runs the block as it is now.
        inputs: what it was given, one tensor per batch.
        processes: this process among its peers.
        through: runs the block as it is now on other hidden states, in place of those of the first batches.
    """

    block: Block
    stats: dict[str, SiteStats]
    dense: list[Tensor]
    outputs: list[Tensor]
    rerun: Callable[[], list[Tensor]]
    inputs: list[Tensor]
    processes: Processes
    through: Callable[[list[Tensor]], list[Tensor]]

    @torch.no_grad()
    def propagate(self) -> float:
        """Run the changed block, so that the next one sees its outputs.

        Returns:
            The relative squared error of the outputs, `‖new − old‖² / ‖old‖²`, over this process's batches.

        Raises:
            ModelError: the outputs overflow the dtype.
        """
        self.outputs = self.rerun()
        # float32 sums per batch, added as Python floats (float64).
        lost = sum(float((new - old).float().square().sum()) for new, old in zip(self.outputs, self.dense, strict=True))
        total = sum(float(old.float().square().sum()) for old in self.dense)
        if not math.isfinite(lost + total):
            raise ModelError(
                f"The outputs of {self.block.name} are not finite in {self.outputs[0].dtype}. "
                "Use --dtype float32 or bfloat16."
            )
        return lost / total if total else 0.0


class Stream:
    """A model, its weights on disk and the calibration batches.

    Attributes:
        model: parameters on the meta device except those of the block at hand.
        weights: loads and drops them.
        blocks: all blocks of all towers.
        device: where blocks are computed; hidden states wait on the CPU.
        finals: tower → hidden states of the last batch (the probe) behind its last block, once it was walked.
        forms: class of block → a real result of one, which shows the form of all.
        dropped: names of blocks that are passed by.
    """

    def __init__(
        self, model: PreTrainedModel, weights: Weights, blocks: Sequence[Block], processes: Processes | None = None
    ):
        """Bind the parts; nothing is loaded yet."""
        self.model = model
        self.weights = weights
        self.blocks = list(blocks)
        self.processes = processes or Processes()
        self.device = weights.device
        self.finals: dict[str, Tensor] = {}
        self.forms: dict[type, Any] = {}
        self.dropped: frozenset[str] = frozenset()

    def walk(self, batches: list[Batch], needs: Needs, finished: Finished = lambda block: None) -> Iterator[Step]:
        """Yield every block, loaded and with its statistics; drop it afterwards.

        Args:
            batches: the calibration text, the probe last.
            needs: types of statistics to gather.
            finished: gives the checkpoint of a block that is already pruned, which is then only run, not yielded.

        Raises:
            ModelError: the model cannot be walked block by block.
        """
        order = self._order(batches[-1])
        done: list[Block] = []
        for tower in order:
            members = [block for block in self.blocks if block.tower == tower]
            self._capture(tower, batches, done, finished)
            for block in members:
                if block.name not in self.dropped:
                    yield from self._visit(block, batches, needs, finished(block))
            done.extend(members)
            assert batches[-1].hidden is not None
            self.finals[tower] = batches[-1].hidden

    @torch.no_grad()
    def logits(self, inputs: Inputs) -> Tensor:
        """The model's own first output for the probe, with every tower's result replaced by what the walk gave.

        Args:
            inputs: the probe, whose hidden states went through all blocks.

        Returns:
            Logits (or the first output of a model without them), float32 on the CPU.
        """
        with self.ends() as ends:
            return ends(inputs, self.finals).float().cpu()

    @contextmanager
    def ends(self) -> Iterator[Callable[[Inputs, Mapping[str, Tensor]], Tensor]]:
        """What lies outside of blocks, loaded: a function of inputs and towers' results that gives the first output."""
        self.weights.load(self.weights.known(self.weights.outside(block.name for block in self.blocks)))
        self.model.tie_weights()

        def run(inputs: Inputs, finals: Mapping[str, Tensor]) -> Tensor:
            walked = [block for block in self.blocks if block.tower in finals]
            with replaced({block.module: self._passing(block, walked, finals) for block in walked}):
                return first_output(self._call(self.model, inputs))

        try:
            yield run
        finally:
            self.weights.drop(self.model)

    def calls(self, batches: list[Batch]) -> None:
        """Give every batch the calls of all blocks of the first tower that runs, without walking."""
        self._capture(self._order(batches[-1])[0], batches, [], lambda block: None)

    def _passing(self, block: Block, walked: list[Block], finals: Mapping[str, Tensor]) -> Callable:
        """Stands for a block: the last one of a tower returns the tower's result, the others their inputs."""
        last = [other for other in walked if other.tower == block.tower][-1]

        def forward(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            hidden = finals[block.tower].to(self.device) if block is last else tensors[0]
            return in_form(self.forms[type(block.module)], hidden)

        return forward

    @torch.no_grad()
    def _visit(self, block: Block, batches: list[Batch], needs: Needs, ready: Checkpoint | None) -> Iterator[Step]:
        """Load one block, gather unless it is ready, let the caller change it, and pass its outputs on."""
        self._load(block, ready)
        if ready is None:
            self.weights.check_reversible(block.name)
        gatherer = Gatherer(block, needs if ready is None else frozenset())
        dense = self._run(block, batches, gatherer)
        # The same observed computation again, so that a resumed run, which only runs, gets the same bits.
        again = lambda: self._run(block, batches, Gatherer(block, frozenset()))  # noqa: E731
        inputs = [batch.hidden for batch in batches if batch.hidden is not None]
        through = lambda hidden: self._run(block, batches, Gatherer(block, frozenset()), hidden)  # noqa: E731
        step = Step(block, gatherer.finish(self.processes), dense, dense, again, inputs, self.processes, through)
        if ready is None:
            yield step
        for batch, hidden in zip(batches, step.outputs, strict=True):
            batch.hidden = hidden
        self.weights.drop(block.module)

    def _run(
        self, block: Block, batches: list[Batch], gatherer: Gatherer, other: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Outputs for the hidden states of every batch, or for `other` ones of the first batches."""
        outputs = []
        with gatherer.watching():
            for batch, hidden in zip(batches, other or [batch.hidden for batch in batches], strict=other is None):
                gatherer.begin(batch.samples)
                assert hidden is not None, "walk captures before it visits"
                outputs.append(batch.calls[block.name](block.module, hidden.to(self.device)).cpu())
        return outputs

    @torch.no_grad()
    def _capture(self, tower: str, batches: list[Batch], done: list[Block], finished: Finished) -> None:
        """Give every batch the hidden states that enter a tower and the calls of its blocks.

        Towers that were walked before run for real, one block in memory at a time; those that follow are bypassed.
        """
        self._load_embedding()
        recorder = Recorder([block for block in self.blocks if block not in done], self._form)
        with replaced({block.module: self._live(block, finished) for block in done}):
            for batch in batches:
                run = partial(self._call, self.model.base_model, batch.inputs)
                recording = recorder.record(run)
                if batch is batches[-1]:
                    refuse_side_channels(recording, recorder.record(run, offset=1.0), tower)
                batch.hidden, batch.calls = recording.hidden[tower].cpu(), recording.calls
        self.weights.drop(self.model)

    @torch.no_grad()
    def _order(self, batch: Batch) -> list[str]:
        """The towers that run on these inputs, in the order in which they are first called."""
        self._load_embedding()
        recording = Recorder(self.blocks, self._form).record(partial(self._call, self.model.base_model, batch.inputs))
        self.weights.drop(self.model)
        if not recording.hidden:
            raise ModelError("None of the model's blocks runs on the calibration inputs.")
        return list(recording.hidden)

    def _form(self, block: Block, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A real result of a block of this class, computed once."""
        kind = type(block.module)
        if kind not in self.forms:
            self.forms[kind] = self._live(block, lambda block: None)(*args, **kwargs)
        return self.forms[kind]

    def _live(self, block: Block, finished: Finished) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if block.name in self.dropped:
                tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                return in_form(self.forms[type(block.module)], tensors[0])
            self._load(block, finished(block))
            result = type(block.module).forward(block.module, *args, **kwargs)
            self.weights.drop(block.module)
            return result

        return forward

    def _load(self, block: Block, ready: Checkpoint | None) -> None:
        """Load a dense block, or one that is ready, with all that its shard holds (a bias may be new)."""
        other = ready if ready is not self.weights.checkpoint else None
        self.weights.load(self.weights.sources(block.name) if other is None else other.tensors, ready)

    def _load_embedding(self) -> None:
        """Load what lies outside of blocks and belongs to the base model: all but an untied head."""
        names = self.weights.outside(block.name for block in self.blocks)
        if self.model.base_model is not self.model:
            prefix = f"{self.model.base_model_prefix}."
            names = [name for name in names if self.weights.targets[name][0].startswith(prefix)]
        self.weights.load(self.weights.known(names))
        self.model.tie_weights()

    def _call(self, module: torch.nn.Module, inputs: Inputs) -> Any:
        on_device = {name: value.to(self.device) for name, value in inputs.items()}
        cache = {"use_cache": False} if "use_cache" in signature(module.forward).parameters else {}
        return module(**on_device, **cache)


def first_output(output: Any) -> Tensor:
    """Logits of a model's output, or its first floating tensor if it has none (CLIP: similarities)."""
    if getattr(output, "logits", None) is not None:
        return output.logits
    return next(value for value in output.to_tuple() if isinstance(value, Tensor) and value.is_floating_point())
