"""PRILoRA: ranks that grow with depth, and an A that is pruned again and again while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from prunus.errors import RecipeError
from prunus.recovery.adapters import Around, low_rank, surround
from prunus.recovery.effective import Effective, Form
from prunus.recovery.forms import Masked
from prunus.recovery.student import Student
from prunus.sites import Block, Slot


def ranks(blocks: int, first: int, last: int) -> list[int]:
    """The rank of each block: from `first` to `last` in a straight line, rounded so that the sum is exact.

    Linear in the number of the block (Benedek & Wolf 2024, arXiv:2401.11316). Rounded down, then up where the remainder
    is largest, the first block winning among equals, until the sum is that of the straight line; ranks never fall.
    """
    line = [first + (last - first) * index / max(blocks - 1, 1) for index in range(blocks)]
    found = [int(value + 1e-9) for value in line]
    missing = round(sum(line) + 1e-9) - sum(found)
    order = sorted(range(blocks), key=lambda index: (found[index] - line[index], index))
    for index in order[:missing]:
        found[index] += 1
    return sorted(found)


@dataclass(frozen=True)
class PRILoRA(Around):
    """MaskLoRA with ranks from `first` to `last`, its A pruned every so many steps (arXiv:2401.11316).

    The score of A_ij is |A_ij| times a running norm of input j: Wanda's, on A. In each row of A the lowest `share`
    becomes zero every `every` steps and may grow again until the next time. Around a sparse matrix the update is
    masked, so that the merge is exact; around a dense one it is the paper's.

    Attributes:
        first: rank in the first block.
        last: rank in the last block.
        share: of each row of A that is set to zero, in [0, 1).
        every: optimizer steps between prunings.
        beta: of the running norm, in [0, 1).
        scale: alpha / rank, the same in every block.
        targets: globs of the matrices that get one, separated by blanks.
    """

    first: int = 4
    last: int = 12
    share: float = 0.5
    every: int = 40
    beta: float = 0.9
    scale: float = 2.0
    targets: str = "*"

    name: ClassVar[str] = "prilora"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: naming the field.
        """
        if not 1 <= self.first <= self.last:
            raise RecipeError(f"Ranks grow from first={self.first} to last={self.last}: 1 <= first <= last.")
        if not (0 <= self.share < 1 and 0 <= self.beta < 1 and self.every >= 1 and self.scale > 0):
            raise RecipeError("PRILoRA needs share and beta in [0, 1), every at least 1 and scale above 0.")

    def attach(self, student: Student) -> None:
        """Around every target, with its block's rank."""
        wanted = ranks(len(student.blocks), self.first, self.last)
        rank = {block.name: wanted[index] for index, block in enumerate(student.blocks)}

        def make(block: Block, slot: Slot, random: torch.Generator) -> tuple[Form, dict[str, Tensor]]:
            return Masked(self.scale), low_rank(slot, rank[block.name], random)

        surround(student, self.targets, make)

    def callbacks(self, student: Student) -> list[TrainerCallback]:
        """The pruning of A."""
        return [Ongoing(self, student)] if self.share else []


class Ongoing(TrainerCallback):
    """Prunes the A of every adapter every so many optimizer steps; Adam's moments are left alone, as published."""

    def __init__(self, part: PRILoRA, student: Student):
        """Give every adapter a running norm of its inputs, which is saved and resumed with it."""
        self.part = part
        self.adapters: list[Any] = [module for module in student.model.modules() if isinstance(module, Effective)]
        for module in self.adapters:
            module.register_buffer("norm", torch.zeros(module.slot.info.shape[1], device=module.A.device))
            module.register_forward_pre_hook(self._watch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune, if it is time."""
        if state.global_step % self.part.every == 0:
            for module in self.adapters:
                prune_rows(module.A, module.norm, self.part.share)

    @torch.no_grad()
    def _watch(self, module: Any, args: tuple[Any, ...]) -> None:
        """‖x_j‖₂ over the tokens of this pass, smoothed: c̄ ← β·c̄ + (1 - β)·c; not while judging."""
        if module.training:
            squares = args[0].flatten(0, -2).float().square().sum(0)
            if dist.is_initialized():
                dist.all_reduce(squares)  # the batch is all processes' together
            module.norm.mul_(self.part.beta).add_(squares.sqrt(), alpha=1 - self.part.beta)


@torch.no_grad()
def prune_rows(a: Tensor, norm: Tensor, share: float) -> None:
    """Set the ⌊share·in⌋ entries of each row with the lowest |A_ij|·norm_j to zero, in place."""
    scores = a.abs() * norm
    lowest = scores.argsort(dim=1, stable=True)[:, : int(share * a.shape[1] + 1e-9)]
    a.scatter_(1, lowest, 0.0)
