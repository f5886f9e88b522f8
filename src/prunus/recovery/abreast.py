"""The dense and the pruned model on the same text, block beside block.

At any time one block of each is in memory, and of the text the hidden states in front of them. A block that an earlier
call has finished is loaded as it was written and only run, so that a resumed walk sees the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from prunus.errors import ModelError
from prunus.job import BATCH_TOKENS
from prunus.models.checkpoint import Checkpoint
from prunus.models.discover import find_blocks
from prunus.models.fitted import as_stored
from prunus.models.weights import Weights
from prunus.recovery.parts import Part, find_parts, whole_block
from prunus.sites import Block
from prunus.stream import Batch, Stream

if TYPE_CHECKING:
    from prunus.recovery.job import RecoveryJob
    from prunus.recovery.rows import Rows


@dataclass(frozen=True)
class Facing:
    """A part of a pruned block, and the same part of its twin in the dense model."""

    block: Block
    part: Part
    twin: Block
    same: Part


class Abreast:
    """Two streams and the text on its way through them.

    Attributes:
        job: of the pruned model.
        dense: the stream of the dense model.
        text: batches on their way through the pruned model as far as it is recovered.
        real: bool `[samples, length]` of every batch, False for tokens that only fill a row up.
        original: the same batches on their way through the dense model.
        judged: held-out batches in the recovered model, the probe last.
        given: held-out batches in the pruned model as it was given.
    """

    def __init__(self, job: RecoveryJob, rows: int):
        """Cut the text into batches and find how the blocks of both models are called.

        Args:
            job: passed all checks.
            rows: sequences in one forward pass.

        Raises:
            ModelError: the models do not face each other block by block.
        """
        self.job = job
        self.dense = dense_stream(job)
        self.text, self.real = batches(job.lessons.train, rows), filled(job.lessons.train, rows)
        self.original = [replace(batch) for batch in self.text]
        held = max(1, BATCH_TOKENS // job.lessons.heldout.ids.shape[1])
        self.given = batches(job.lessons.heldout, held)
        self.judged = [*(replace(batch) for batch in self.given), job.probe]
        job.stream.calls([*self.text, *self.given, *self.judged])
        self.dense.calls(self.original)

    @property
    def pairs(self) -> Iterator[tuple[Block, Block]]:
        """Every block of the pruned model with the same one of the dense model."""
        return zip(self.job.blocks, self.dense.blocks, strict=True)

    def begin(self, block: Block, twin: Block, shard: Checkpoint | None, granularity: str) -> list[Facing]:
        """Load a block of each model, judge the pruned one as it was given, and find the parts of both.

        Args:
            block: of the pruned model.
            twin: of the dense model.
            shard: where the block lies if it is finished already.
            granularity: "parts" or "block".
        """
        pruned, dense = self.job.stream.weights, self.dense.weights
        dense.load(dense.sources(twin.name))
        pruned.load(pruned.sources(block.name))
        pruned.check_reversible(block.name)
        self._advance(block, self.given)
        if shard is not None:
            pruned.load(pruned.sources(block.name), shard)
        if granularity == "block":
            return [Facing(block, whole_block(block), twin, whole_block(twin))]
        return self._facing(block, twin)

    def end(self, block: Block, twin: Block) -> None:
        """Judge the block as it is now, and drop both."""
        self._advance(block, self.judged)
        self.job.stream.weights.drop(block.module)
        self.dense.weights.drop(twin.module)
        self.job.stream.finals[block.tower] = hidden(self.judged[-1])

    def heldout(self, held: list[Batch]) -> float:
        """Mean loss of the held-out labels, nats a token, once all blocks were walked."""
        labels = batches_of(self.job.lessons.heldout.labels, held)
        total, count = 0.0, 0
        with torch.no_grad(), self.job.stream.ends() as ends:
            for batch, wanted in zip(held, labels, strict=True):
                # One row at a time: logits are as wide as the vocabulary.
                for row in range(len(wanted)):
                    inputs = {name: value[row : row + 1] for name, value in batch.inputs.items()}
                    logits = ends(inputs, {self.job.blocks[0].tower: hidden(batch)[row : row + 1]})
                    after = wanted[row, 1:].to(logits.device)
                    total += float(cross_entropy(logits[0, :-1].float(), after, reduction="sum"))
                    count += int((after != -100).sum())
        return total / max(count, 1)

    def run(self, block: Block, part: Part, batch: Batch, states: Tensor) -> Tensor:
        """What one part of a loaded block gives for these hidden states, on the CPU."""
        with torch.no_grad(), part.alone():
            return batch.calls[block.name](block.module, states.to(self.job.device)).cpu()

    @torch.no_grad()
    def _advance(self, block: Block, held: list[Batch]) -> None:
        for batch in held:
            batch.hidden = batch.calls[block.name](block.module, hidden(batch).to(self.job.device)).cpu()

    def _facing(self, block: Block, twin: Block) -> list[Facing]:
        """The parts of both blocks; one part each where they differ."""
        own, other = self.text[0], self.original[0]
        mine = find_parts(block, own.calls[block.name], _few(own, self.job.device))
        theirs = find_parts(twin, other.calls[twin.name], _few(other, self.job.device))
        if [part.name for part in mine] != [part.name for part in theirs]:
            return [Facing(block, whole_block(block), twin, whole_block(twin))]
        return [Facing(block, one, twin, two) for one, two in zip(mine, theirs, strict=True)]


def dense_stream(job: RecoveryJob) -> Stream:
    """The dense model, nothing loaded, with blocks under the names of the pruned one's.

    Raises:
        ModelError: it has other blocks or hidden states of another size, or more than one tower.
    """
    folder = job.dense_folder()
    checkpoint = Checkpoint.open(folder)
    model = as_stored(checkpoint, job.model.dtype, job.recipe.trust_remote_code)
    blocks = find_blocks(model)
    names, others = [block.name for block in job.blocks], [block.name for block in blocks]
    if len({block.tower for block in job.blocks}) > 1:
        raise ModelError("This model has several towers; reconstruction goes through one list of blocks.")
    if names != others:
        raise ModelError(
            f"The dense model {folder} has {len(others)} blocks ({others[0]} first) and the pruned one {len(names)} "
            f"({names[0]} first). Reconstruction compares them block by block; name the model that was pruned with "
            "--dense, or recover the whole model, such as with --method masklora --objective logits."
        )
    wide, narrow = (each.config.get_text_config().hidden_size for each in (model, job.model))
    if wide != narrow:
        raise ModelError(
            f"The hidden states of the dense model have {wide} values and those of the pruned one {narrow}; "
            "reconstruction compares them. Recover the whole model instead, such as with --objective logits."
        )
    return Stream(model, Weights(model, checkpoint, job.device), blocks)


def batches(rows: Rows, size: int) -> list[Batch]:
    """Rows in forward passes of `size`."""
    return [Batch({"input_ids": part}, len(part)) for part in rows.ids.split(size)]


def batches_of(values: Tensor, held: list[Batch]) -> list[Tensor]:
    """`[rows, …]` cut as the batches are."""
    return list(values.split([batch.samples for batch in held]))


def filled(rows: Rows, size: int) -> list[Tensor]:
    """Which tokens are text and not filling: those up to the last label of their row."""
    later = rows.labels.ne(-100).flip(1).cummax(1).values.flip(1)
    return list(later.split(size))


def hidden(batch: Batch) -> Tensor:
    """The hidden states in front of the part at hand."""
    assert batch.hidden is not None, "calls come before blocks"
    return batch.hidden


def _few(batch: Batch, device: torch.device) -> Tensor:
    """The hidden states of one batch: its call knows no smaller one."""
    return hidden(batch).to(device)
