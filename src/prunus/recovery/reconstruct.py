"""Local reconstruction: every part of every block learns to give the dense model's hidden states again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from prunus.errors import RecipeError
from prunus.progress import Progress
from prunus.recovery.fit import Schedule
from prunus.recovery.local import Walk, needed
from prunus.recovery.recovery import Outcome

if TYPE_CHECKING:
    from prunus.recipe import RecoverPart
    from prunus.recovery.job import RecoveryJob


@dataclass(frozen=True)
class Reconstruct:
    """min ‖part(x) - y‖² / ‖y‖² over the kept weights of each part, block after block, y from the dense model.

    Matching attention and MLP apart, each with its residual, against dense activations is the cheapest granularity that
    loses nothing ("A Free Lunch", arXiv:2510.14444). One block of each model is in memory at a time.

    Attributes:
        granularity: parts: what lies between two additions to the residual stream, such as attention and MLP, apart; a
            block without an addition inside is one part. block: whole blocks.
        train: kept: every kept weight. masklora: updates of low rank under the mask.
        inputs: pruned: a part is given what the recovered blocks before it give, and so learns to undo their errors;
            dense: what the dense model gives there.
        target: dense: the hidden states of the dense model at that point. local: what the dense part gives for the same
            inputs (PERP, EBFT).
        start: closed form before the training. refit: least squares for every kept weight of a matrix. scales: one
            factor for each column and row. none: the weights as they are. Biases follow, where there are any.
        relative: token: every token's error counts relative to its own energy. energy: to the mean energy.
        norms: train norms too; biases always are.
        rank, alpha: of masklora.
        lr: peak learning rate, relative to the root mean square of the weights; the option --lr goes before it.
        epochs: passes over the text for each part; the option --steps (of each part) goes before it.
        batch: sequences in one optimizer step; the option --batch goes before it.
        warmup, beta1, beta2, decay, clip: of AdamW; clip 0: none.
    """

    granularity: Literal["parts", "block"] = "parts"
    train: Literal["kept", "masklora"] = "kept"
    inputs: Literal["pruned", "dense"] = "pruned"
    target: Literal["dense", "local"] = "dense"
    start: Literal["refit", "scales", "none"] = "refit"
    relative: Literal["token", "energy"] = "token"
    norms: bool = False
    rank: int = 16
    alpha: float = 32.0
    lr: float = 0.02
    epochs: int = 1
    batch: int = 1
    warmup: float = 0.05
    beta1: float = 0.8
    beta2: float = 0.9
    decay: float = 0.0
    clip: float = 0.0
    paper: str = "A Free Lunch, 2025, arXiv:2510.14444"

    samples: ClassVar[int | None] = 128

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: a number is out of range.
        """
        for name in ("rank", "alpha", "lr", "batch"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} is {getattr(self, name):g}; it must be positive.")
        for name in ("epochs", "decay", "clip"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} is {getattr(self, name):g}; it cannot be negative.")
        for name in ("warmup", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name):g}; it must be in [0, 1).")
        if not self.epochs and self.start == "none":
            raise RecipeError("Neither a closed form (start) nor a pass over the text (epochs): nothing to do.")

    def check(self, job: RecoveryJob) -> None:
        """Refuse what local reconstruction does not know, before any work.

        Raises:
            RecipeError: an option that belongs to the recovery of whole models, or too little memory.
            ModelError: the dense model does not face the pruned one.
        """
        part = job.part
        for name, given in (("minutes", part.minutes), ("patience", part.patience), ("lr auto", part.probe)):
            if given:
                raise RecipeError(f"--{name} is for recoveries of the whole model; this one has --steps and --samples.")
        if part.objective != "text":
            raise RecipeError(
                f"The objective {part.objective!r} is for recoveries of the whole model; this one compares hidden "
                "states, as its setting `target` says."
            )
        if job.processes.world > 1:
            raise RecipeError("Local reconstruction runs in one process; start it without torchrun.")
        job.require_memory(needed(job), "Use fewer sequences (--samples) or shorter ones (--length).")

    def needs_dense(self, part: RecoverPart) -> bool:
        """Always: it is what every part is compared with."""
        return True

    def reads(self) -> dict[str, Any]:
        """Nothing else."""
        return {}

    def recover(self, job: RecoveryJob, progress: Progress) -> Outcome:
        """Walk both models, block by block; a finished block is written before the next one is loaded."""
        return Walk(self, job, progress).run()

    def schedule(self, job: RecoveryJob, lessons: int, together: int) -> Schedule:
        """Adam's settings for one part."""
        steps = job.part.steps or self.epochs * -(-lessons // together)
        return Schedule(
            lr=job.part.lr or self.lr, steps=steps, together=together, warmup=self.warmup,
            betas=(self.beta1, self.beta2), decay=self.decay, clip=self.clip, seed=job.part.seed,
        )  # fmt: skip


# EBFT (Guo et al. 2024, arXiv:2402.12419): every kept weight of whole blocks, against the dense block on pruned inputs.
# The published rate, 2e-4, is about this share of the weights of the 7 B model that it was found for. Decay takes the
# share rate x decay of a weight in each step: as published 2e-4 x 0.1, of the relative rate 0.01 x 0.002.
EBFT = Reconstruct(
    granularity="block", target="local", start="none", relative="energy", norms=True, lr=0.01, epochs=10, batch=8,
    warmup=0.0, beta1=0.9, beta2=0.95, decay=0.002, clip=1.0, paper="Guo et al. 2024, arXiv:2402.12419",
)  # fmt: skip

# PERP block by block (Zimmer et al. 2023, arXiv:2312.15230): low-rank updates under the masks, norms and biases.
PERP_LOCAL = Reconstruct(
    granularity="block", train="masklora", target="local", start="none", relative="energy", norms=True, lr=0.02,
    epochs=8, batch=2, warmup=0.1, beta1=0.9, beta2=0.999, paper="Zimmer et al. 2023, arXiv:2312.15230",
)  # fmt: skip
