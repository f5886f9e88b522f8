"""Iterative magnitude pruning with full masked retraining: the baseline that PERP is measured against."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load_file

from prunus.errors import RecipeError
from prunus.patterns.selection import count, keep_highest
from prunus.recovery.masks import Masks, clear
from prunus.recovery.recovery import Outcome
from prunus.recovery.retrain import STEPS, Retrain
from prunus.recovery.student import Student, loaded
from prunus.recovery.training import judged, micro_rows, save_state

if TYPE_CHECKING:
    from prunus.progress import Progress
    from prunus.recipe import RecoverPart
    from prunus.recovery.job import RecoveryJob


@dataclass(frozen=True)
class IMP:
    """Prune the smallest weights, retrain all others, and again (Han et al. 2015, arXiv:1506.02626).

    Round j of k prunes every matrix to 1 - (1 - sparsity)^(j/k) by magnitude among the weights that are left, and
    retrains everything for its share of the steps, with a schedule of its own. What was pruned before stays pruned; one
    round is one-shot pruning. Begins with a dense model (`--allow-dense`) or a pruned one.

    Attributes:
        training: what retrains; the method `full`.
        sparsity: share of each matrix that is removed in the end, in (0, 1).
        rounds: k.
        paper: where it was published.
    """

    training: Retrain
    sparsity: float = 0.5
    rounds: int = 3
    paper: str = "Han et al. 2015, arXiv:1506.02626"

    samples: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: naming the field.
        """
        if not (0 < self.sparsity < 1 and self.rounds >= 1):
            raise RecipeError("IMP needs a sparsity between 0 and 1 and at least one round.")

    def check(self, job: RecoveryJob) -> None:
        """As what retrains."""
        self.training.check(job)

    def needs_dense(self, part: RecoverPart) -> bool:
        """As what retrains."""
        return self.training.needs_dense(part)

    def reads(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def recover(self, job: RecoveryJob, progress: Progress) -> Outcome:
        """All rounds; a finished round is not done again."""
        with loaded(job.stream.weights):
            student = Student(job.model, job.blocks, job.masks, job.stream.weights, job.part.seed)
            before = judged(job, student, micro_rows(job) * job.lessons.train.ids.shape[1])
            self.training.attach(student)
            done: list[Any] = job.processes.agree(job.work.read("training/rounds.json")) or []
            if done:
                self._continue(job, student, len(done))
            active = 0
            for number in range(len(done) + 1, self.rounds + 1):
                facts, active = self._round(job, student, number, progress)
                done.append(facts)
                job.processes.on_first(lambda number=number: self._keep(job, student, number, done))
            active = active or sum(value.numel() for value in student.chosen) - job.masks.removed
            return self.training.written(job, student, before, {**done[-1], "rounds": done}, active)

    def _round(self, job: RecoveryJob, student: Student, number: int, progress: Progress) -> tuple[dict[str, Any], int]:
        """Prune and retrain once."""
        job.processes.on_first(lambda: _clean(job, number))
        prune_smallest(student, 1 - (1 - self.sparsity) ** (number / self.rounds))
        steps, minutes = job.part.steps, job.part.minutes
        own = {
            "steps": max(1, (steps or STEPS) // self.rounds) if minutes is None else None,
            "minutes": None if minutes is None else minutes / self.rounds,
        }
        mine = replace(job, part=job.part.model_copy(update=own))
        pruned = judged(mine, student, micro_rows(job) * job.lessons.train.ids.shape[1])
        facts, active = self.training.trained(mine, student, pruned, progress)
        return {"sparsity": job.masks.removed / sum(map(job.masks.size, job.masks.packed)), **facts}, active

    def _keep(self, job: RecoveryJob, student: Student, number: int, done: list[Any]) -> None:
        save_state(student, job.work.training / f"round-{number}.safetensors")
        job.masks.write(job.work.training / f"round-{number}.masks")
        job.work.write("training/rounds.json", done)

    def _continue(self, job: RecoveryJob, student: Student, number: int) -> None:
        found = Masks.read(job.work.training / f"round-{number}.masks")
        job.masks.packed.update(found.packed)
        student.restore(load_file(job.work.training / f"round-{number}.safetensors"))


@torch.no_grad()
def prune_smallest(student: Student, sparsity: float) -> None:
    """Remove the smallest weights of every matrix until `sparsity` of it is gone; what is gone stays so."""
    for block in student.blocks:
        for matrix in block.matrices():
            kept = student.masks.keep(matrix.name, matrix.weight.device)
            # Removed weights are the lowest whatever else is zero.
            scores = matrix.weight.abs().float().masked_fill(~kept, -1.0).reshape(1, -1)
            keep = keep_highest(scores, count(scores.numel(), sparsity)).view(kept.shape) & kept
            student.masks.add(matrix.name, keep)
            clear(matrix, student.masks)


def _clean(job: RecoveryJob, number: int) -> None:
    """Forget the training state of the round before, unless it is this round's own, which is then resumed."""
    if job.work.read("training/current.json") == {"round": number}:
        return
    for path in list(job.work.training.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name in ("plan.json", "last.json", "best.safetensors", "log.jsonl"):
            path.unlink()
    job.work.write("training/current.json", {"round": number})
