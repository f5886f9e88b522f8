"""The reverse walk: gradients of the model's loss for every matrix, one block in memory at a time.

Forward through the dense model, each block's inputs go to disk; the head gives the gradient of the loss at the last
hidden states; then back through the blocks: load, run again, differentiate, add up, hand the gradient of the inputs to
the block before. One forward, one more while going back, and a backward: as long as four forward passes of the blocks.
Memory does not grow with depth; the disk holds the inputs of all blocks meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from prunus.distributed import Processes
from prunus.errors import ModelError
from prunus.gradients import WeightGradient
from prunus.loss import language_loss
from prunus.progress import Progress
from prunus.sites import Block
from prunus.stream import Batch, Stream
from prunus.work import Work

Kinds = frozenset[type[WeightGradient]]
# Outputs of a block → the gradient of the loss at them.
Gradient = Callable[[Tensor], Tensor]
# Matrix name → kind → its sums.
Found = dict[str, dict[type, WeightGradient]]


class Reverse:
    """Gradients of the dense model's loss, kept in the work folder until the run is over.

    A killed walk goes on with the last unfinished block.
    """

    def __init__(self, stream: Stream, batches: list[Batch], work: Work, progress: Progress):
        """Bind the parts; nothing is computed yet. Batches must hold one sample each, the probe last."""
        self.stream = stream
        self.batches = [batch for batch in batches if batch.samples]
        self.probe = batches[-1]
        self.work = work
        self.progress = progress
        self.blocks = stream.blocks

    def measure(self, kinds: Kinds) -> None:
        """Fill the work folder with these kinds of gradients for every block.

        Raises:
            ModelError: the model has several towers or no language-model head, or a gradient is not finite.
        """
        last = len(self.blocks) - 1
        missing = [number for number in range(last, -1, -1) if not self.work.has(self._sums(number))]
        missing = self.stream.processes.agree(missing)
        if not missing:
            return
        self._refuse()
        # The gradient of the last outputs is the last thing that the forward part writes.
        begun = len(missing) <= last or self.work.has(self._file(f"gradient-{last}"))
        if self.stream.processes.everywhere(begun):
            self.stream.calls([*self.batches, self.probe])
        else:
            self._forward()
        self.progress.stage("gradients, backward", len(missing))
        for number in missing:
            self._backward(number, kinds)
            self.progress.advance(self.blocks[number].name)

    def read(self, block: Block, kinds: Kinds) -> Found:
        """The gradients of one block's matrices, on the stream's device; `measure` came before."""
        stored = self.work.read_tensors(self._sums(self.blocks.index(block)))
        assert stored is not None, f"the gradients of {block.name} were not measured"
        found: Found = {}
        for info in block.infos:
            found[info.name] = {kind: kind(info.shape, self.stream.device) for kind in kinds}
            for kind, sums in found[info.name].items():
                sums.restore([stored[_key(info.name, kind, place)] for place in range(len(sums.tensors()))])
        return found

    def _refuse(self) -> None:
        """See that there is a loss, and one way back from it."""
        towers = list(dict.fromkeys(block.tower for block in self.blocks))
        if len(towers) > 1:
            raise ModelError(
                f"Gradients of the loss are taken through one tower, and this model has {len(towers)}: "
                f"{', '.join(towers)}. Name the language model's with --blocks, or use a method without gradients."
            )
        if self.stream.model.get_output_embeddings() is None:
            raise ModelError(
                f"{type(self.stream.model).__name__} has no language-model head, so there is no loss to take gradients "
                "of. Use a checkpoint with its head, or a method without gradients, such as wanda."
            )

    def _forward(self) -> None:
        """Keep the inputs of every block, and the gradient of the loss at the last outputs."""
        self.progress.stage("gradients, forward", len(self.blocks))
        for number, step in enumerate(self.stream.walk([*self.batches, self.probe], frozenset())):
            self._write(f"inputs-{number}", [batch.hidden for batch in self.batches])
            self.progress.advance(step.block.name)
        self._write(f"gradient-{len(self.blocks) - 1}", self._head())

    def _head(self) -> list[Tensor | None]:
        """∂L/∂(last hidden states) of every batch, L the mean cross-entropy of the next tokens."""
        gradients: list[Tensor | None] = []
        with self.stream.ends() as ends, torch.enable_grad():
            for batch in self.batches:
                assert batch.hidden is not None
                last = batch.hidden.to(self.stream.device).requires_grad_()
                logits = ends(batch.inputs, {self.blocks[-1].tower: last})
                language_loss(logits, batch.inputs["input_ids"].to(logits.device)).backward()
                if last.grad is None:
                    raise ModelError("The loss does not depend on the hidden states; this model has no usable head.")
                gradients.append(last.grad.cpu())
        return gradients

    def _backward(self, number: int, kinds: Kinds) -> None:
        """Differentiate one block, keep its sums, and leave the gradient of its inputs for the block before."""
        block = self.blocks[number]
        self.stream.weights.load(self.stream.weights.sources(block.name))
        found = {info.name: {kind: kind(info.shape, self.stream.device) for kind in kinds} for info in block.infos}
        inputs, gradients = self._read(f"inputs-{number}"), self._read(f"gradient-{number}")
        before: list[Tensor | None] = []
        with differentiable(block):
            for batch, hidden, gradient in zip(self.batches, inputs, gradients, strict=True):
                before.append(backward(block, batch, hidden, lambda out, g=gradient: g, found, onward=number > 0))
        self.stream.weights.drop(block.module)
        if number:
            self._write(f"gradient-{number - 1}", before)
        self._keep(number, found)
        for name in (f"inputs-{number}", f"gradient-{number}"):
            self.work.remove(self._file(name))

    def _keep(self, number: int, found: Found) -> None:
        """Add up over processes and write."""
        tensors = {}
        for name, sums in found.items():
            add_up(name, sums, self.stream.processes)
            for kind, gradient in sums.items():
                tensors |= {_key(name, kind, place): value.cpu() for place, value in enumerate(gradient.tensors())}
        self.stream.processes.on_first(lambda: self.work.write_tensors(self._sums(number), tensors))

    def _sums(self, number: int) -> str:
        return f"reverse/sums-{number}.safetensors"

    def _file(self, name: str) -> str:
        """Each process has its own samples."""
        return f"reverse/{self.stream.processes.rank}-{name}.safetensors"

    def _write(self, name: str, values: list[Tensor | None]) -> None:
        tensors = {str(place): value.contiguous() for place, value in enumerate(values) if value is not None}
        self.work.write_tensors(self._file(name), tensors)

    def _read(self, name: str) -> list[Tensor]:
        stored = self.work.read_tensors(self._file(name))
        assert stored is not None, f"{name} is written before it is read"
        return [stored[str(place)] for place in range(len(stored))]


@contextmanager
def differentiable(block: Block) -> Iterator[None]:
    """Inside the context, the matrices of a loaded block are leaves of which gradients are wanted."""
    parameters = [getattr(slot.module, slot.attribute) for slot in block.slots]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def backward(
    block: Block, batch: Batch, hidden: Tensor, gradient: Gradient, found: Found, *, onward: bool
) -> Tensor | None:
    """Run a loaded block on one sample, differentiate, and add the gradients of its matrices to their sums.

    Args:
        block: inside `differentiable`.
        batch: of one sample; says how the block is called.
        hidden: its inputs `[1, length, d]`.
        gradient: outputs `[1, length, d]` → the gradient of the loss at them, of the same shape.
        found: where the gradients are added.
        onward: whether the gradient of the inputs is wanted.

    Returns:
        The gradient of the inputs, on the CPU, or None.
    """
    device = getattr(block.slots[0].module, block.slots[0].attribute).device if block.slots else hidden.device
    inputs = hidden.to(device, copy=True).requires_grad_(onward)
    outputs = batch.calls[block.name](block.module, inputs)
    if outputs.requires_grad:
        outputs.backward(gradient(outputs.detach()).to(outputs))
    for slot in block.slots:
        parameter = getattr(slot.module, slot.attribute)
        own = None if parameter.grad is None else slot.view(parameter.grad)
        for sums in found[slot.info.name].values():
            sums.update(own)
    for slot in block.slots:
        getattr(slot.module, slot.attribute).grad = None
    return inputs.grad.cpu() if inputs.grad is not None else None


def add_up(name: str, sums: Mapping[type, WeightGradient], processes: Processes) -> None:
    """Make the sums of one matrix those of all processes.

    Raises:
        ModelError: a gradient was NaN or infinite.
    """
    # The same order on every process: sets of types are not ordered alike.
    for _, gradient in sorted(sums.items(), key=lambda item: item[0].__name__):
        processes.add_up(gradient.tensors())
        if not gradient.finite():
            raise ModelError(f"The gradients of {name} are not finite; use --dtype float32 or bfloat16.")


def _key(name: str, kind: type, place: int) -> str:
    return f"{name}|{kind.__name__}|{place}"
