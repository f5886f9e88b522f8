"""The walk of local reconstruction: block after block, part after part, each written before the next is loaded."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from prunus.job import BATCH_TOKENS
from prunus.progress import Progress
from prunus.recovery.abreast import Abreast, Facing, hidden
from prunus.recovery.fit import Lesson, weigh
from prunus.recovery.masks import clear
from prunus.recovery.rebuild import Rebuilt, rebuild
from prunus.recovery.recovery import Outcome
from prunus.recovery.trainables import vectors
from prunus.sites import Block

if TYPE_CHECKING:
    from prunus.recovery.job import RecoveryJob
    from prunus.recovery.reconstruct import Reconstruct


@dataclass
class Walk:
    """One run of local reconstruction."""

    how: Reconstruct
    job: RecoveryJob
    progress: Progress

    def run(self) -> Outcome:
        """Walk both models, write every block and what lies outside of blocks, and judge."""
        job, length = self.job, self.job.lessons.train.ids.shape[1]
        samples = len(job.lessons.train)
        rows = max(1, min(job.part.batch, BATCH_TOKENS // length))
        self.together = -(-job.part.batch // rows)
        self.text = Abreast(job, rows)
        self.progress.stage("reconstruct", len(job.blocks))
        reports = []
        for block, twin in self.text.pairs:
            finished = job.output.report(block)
            reports.append(self._replay(block, twin, finished) if finished else self._block(block, twin))
            self.progress.advance(block.name, error=reports[-1]["error"])
        job.output.outside()
        whole = sum(report["parts"][0]["name"] == "block" for report in reports)
        if whole and self.how.granularity == "parts":
            job.warnings.append(
                f"{whole} blocks add to the hidden states once only; they were reconstructed as a whole."
            )
        before, after = (self.text.heldout(held) for held in (self.text.given, self.text.judged[:-1]))
        if after >= before:
            job.warnings.append(
                f"The held-out loss is not lower than before ({before:.4f} → {after:.4f}): too little text to learn "
                "from, or another kind than what is held out. Give more --samples, or other text."
            )
        facts = {"sequences": samples, "tokens": samples * length, "memory": needed(job), "blocks": reports}
        trainable = sum(part["trainable"] for report in reports for part in report["parts"])
        return Outcome(trainable, before, after, job.stream.logits(job.probe.inputs), facts)

    def _replay(self, block: Block, twin: Block, report: dict[str, Any]) -> dict[str, Any]:
        """Run a block that an earlier call has finished."""
        for facing in self.text.begin(block, twin, self.job.output.shard(block), self.how.granularity):
            _, targets = self._aims(facing)
            self._pass_on(facing, targets, None)
        self.text.end(block, twin)
        return report

    def _block(self, block: Block, twin: Block) -> dict[str, Any]:
        """Reconstruct a block and write it."""
        begun, parts, changed = time.monotonic(), [], {slot.parameter for slot in block.slots}
        facings = self.text.begin(block, twin, None, self.how.granularity)
        for slot in block.slots:
            clear(slot.matrix(), self.job.masks)  # a foreign checkpoint may hold -0.0
        for facing in facings:
            lessons, targets = self._lessons(facing)
            found = rebuild(self.how, self.job, facing, lessons, self.together)
            self._pass_on(facing, targets, found.found if self.how.inputs == "pruned" else None)
            self._say(facing, found)
            changed |= {f"{block.name}.{path}" for path in vectors(facing.part, self.how.norms)}
            parts.append({"name": facing.part.name or "block", **found.report})
        report = {"name": block.name, "error": parts[-1]["after"], "parts": parts, "seconds": time.monotonic() - begun}
        self.job.output.block(block, report, changed)
        self.text.end(block, twin)
        return report

    def _aims(self, facing: Facing) -> tuple[list[Tensor], list[Tensor]]:
        """What the dense part is given for every batch, and what it gives."""
        sources = [hidden(batch) for batch in (self.text.text if self._local else self.text.original)]
        pairs = zip(self.text.original, sources, strict=True)
        return sources, [self.text.run(facing.twin, facing.same, batch, source) for batch, source in pairs]

    @property
    def _local(self) -> bool:
        """Whether the dense part is shown the pruned model's hidden states, so that its own are not needed."""
        return self.how.target == "local" and self.how.inputs == "pruned"

    def _lessons(self, facing: Facing) -> tuple[list[Lesson], list[Tensor]]:
        """What the part is given and should give for every batch, and what the dense one gives."""
        sources, targets = self._aims(facing)
        own = self.text.text if self.how.inputs == "pruned" else self.text.original
        weights = weigh(targets, self.text.real, by_token=self.how.relative == "token")
        calls = [batch.calls[facing.block.name] for batch in self.text.text]
        beside = [batch.calls[facing.twin.name] for batch in self.text.original]
        inputs = [hidden(batch) for batch in own]
        parts = zip(calls, inputs, targets, weights, beside, sources, strict=True)
        return [Lesson(*one) for one in parts], targets

    def _pass_on(self, facing: Facing, targets: list[Tensor], found: list[Tensor] | None) -> None:
        """Give both models' text to the next part."""
        for number, batch in enumerate(self.text.text):
            batch.hidden = found[number] if found else self.text.run(facing.block, facing.part, batch, hidden(batch))
        if not self._local:
            for batch, target in zip(self.text.original, targets, strict=True):
                batch.hidden = target

    def _say(self, facing: Facing, found: Rebuilt) -> None:
        """What the user should know about a part."""
        where = f"{facing.block.name}.{facing.part.name}".rstrip(".")
        if found.fitted.diverged is not None and not found.fitted.share:
            text = f"{where}: the loss was not finite in step {found.fitted.diverged + 1}; a lower --lr would help."
        elif found.given:
            text = f"{where}: nothing was gained, it stays as it was; a lower --lr or more --samples would help."
        else:
            return
        self.job.warnings.append(text)
        self.progress.warn(text)


def needed(job: RecoveryJob) -> dict[str, int]:
    """Memory besides what the process holds, bytes; none of it grows with the number of blocks."""
    model, blocks, tokens = job.model, job.blocks, job.lessons.train.ids.numel()
    size = model.dtype.itemsize
    block = max(sum(value.numel() for value in block.module.parameters()) for block in blocks)
    features = max(sum(sum(info.shape) for info in block.infos if ".experts." not in info.name) for block in blocks)
    inputs = max(sum(columns**2 for columns in {info.shape[1] for info in block.infos}) for block in blocks)
    return {
        # In front of a part and behind it, of both models.
        "hidden states": 4 * tokens * model.config.get_text_config().hidden_size * size,
        # Pruned, dense, as given and as begun with; gradients, two moments and a copy in float32; masks.
        "blocks": block * (4 * size + 16 + 1),
        # Of the pruned inputs and across to the dense ones; damped, its inverse, and the next one begun.
        "sums over inputs": 5 * 4 * inputs,
        "activations": 2 * BATCH_TOKENS * features * size,
    }
