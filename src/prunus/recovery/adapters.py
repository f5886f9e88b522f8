"""Adapters that keep the zeros: their shapes, their beginnings, and how they are written into the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from prunus.errors import RecipeError
from prunus.recovery.effective import Effective, Form
from prunus.recovery.forms import Masked, RowsTimesColumns, Scaled, kaiming, ones
from prunus.recovery.student import Student
from prunus.sites import Block, Slot

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Around:
    """What adapters around matrices have in common: which matrices, and the merge."""

    def callbacks(self, student: Student) -> list[TrainerCallback]:
        """None."""
        return []

    def merge(self, student: Student) -> None:
        """Write every effective weight into the frozen one."""
        for module in list(student.model.modules()):
            if isinstance(module, Effective):
                module.merge()
                student.merged.add(module.slot.parameter)


def surround(
    student: Student, targets: str, make: Callable[[Block, Slot, torch.Generator], tuple[Form, dict[str, Tensor]]]
) -> None:
    """Put an adapter around every matrix that fits.

    Args:
        student: changed.
        targets: globs of matrix names, separated by blanks.
        make: for each matrix the form and its first parameters.

    Raises:
        RecipeError: a glob fits no matrix; or stacked experts are all there is.
    """
    generator = torch.Generator().manual_seed(student.seed)
    for block, slot in chosen(student, targets):
        device = slot.matrix().weight.device
        form, parameters = make(block, slot, generator)
        bits = student.masks.bits(slot.info, device)
        module = Effective(slot, bits, form, parameters)
        for value in module.parameters(recurse=False):
            student.train(value)
        student.wrap(slot.info.name, module)


def chosen(student: Student, targets: str) -> list[tuple[Block, Slot]]:
    """The matrices that any of the globs fits.

    Raises:
        RecipeError: a glob fits none.
    """
    known = student.linears()
    if not known:
        raise RecipeError("This model has no linear module that adapters fit around (stacked experts only); use full.")
    left = sum(slot.expert is not None for block in student.blocks for slot in block.slots)
    if left:
        student.notes.append(f"{left} matrices of stacked experts get no adapter; the method full trains them.")
    for glob in targets.split():
        if not any(_fits(slot, glob) for _, slot in known):
            raise RecipeError(f"The target {glob!r} fits no matrix. Names look like {known[0][1].info.name!r}.")
    return [(block, slot) for block, slot in known if any(_fits(slot, glob) for glob in targets.split())]


def _fits(slot: Slot, glob: str) -> bool:
    return fnmatchcase(slot.info.name, glob) or fnmatchcase(slot.info.name, f"*.{glob}")


def low_rank(slot: Slot, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A by Kaiming, B zero: the product begins at zero."""
    rows, columns = slot.info.shape
    device = slot.matrix().weight.device
    return {"A": kaiming(rank, columns, generator, device), "B": torch.zeros(rows, rank, device=device)}


def positive(values: Iterable[tuple[str, float]]) -> None:
    """Refuse hyper-parameters below 1 (ranks) or not above 0.

    Raises:
        RecipeError: naming the field.
    """
    for name, value in values:
        if value <= 0 or (name == "rank" and value < 1):
            raise RecipeError(f"{name} = {value} must be {'at least 1' if name == 'rank' else 'above 0'}.")


@dataclass(frozen=True)
class MaskLoRA(Around):
    """W + (alpha / rank)·P∘(B·A) (Zimmer et al. 2023, PERP, arXiv:2312.15230): exact merge, zeros kept.

    Attributes:
        rank: of the update; 16 as in the paper's code.
        alpha: the update's size is alpha / rank.
        targets: globs of the matrices that get one, separated by blanks.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str = "*"

    name: ClassVar[str] = "masklora"

    def __post_init__(self) -> None:
        """Check the ranges."""
        positive([("rank", self.rank), ("alpha", self.alpha)])

    def attach(self, student: Student) -> None:
        """Around every target."""
        form = Masked(self.alpha / self.rank)
        surround(student, self.targets, lambda block, slot, random: (form, low_rank(slot, self.rank, random)))


@dataclass(frozen=True)
class ScaleLoRA(Around):
    """W∘(B·A) with B·A = 1 at the beginning (PERP's ScaleLoRA, later MultLoRA); zeros kept by construction.

    The published code begins with equal entries, whose gradients stay equal: the rank of B·A remains 1 for ever. A
    little noise that adds up to zero over the terms mends that and still begins with the model as it is.

    Attributes:
        rank: of the factor.
        spread: relative size of the noise in A; 0 is the published beginning.
        targets: as of `MaskLoRA`.
    """

    rank: int = 16
    spread: float = 0.02
    targets: str = "*"

    name: ClassVar[str] = "scalelora"

    def __post_init__(self) -> None:
        """Check the ranges."""
        positive([("rank", self.rank)])

    def attach(self, student: Student) -> None:
        """Around every target."""

        def make(block: Block, slot: Slot, random: torch.Generator) -> tuple[Form, dict[str, Tensor]]:
            a, b = ones(self.rank, slot.info.shape, self.spread, random, slot.matrix().weight.device)
            return Scaled(), {"A": a, "B": b}

        surround(student, self.targets, make)


@dataclass(frozen=True)
class SPP(Around):
    """W∘(1 + scale·S), each row of S a multiple of one of `rank` templates (Lu et al. 2024, arXiv:2405.16057).

    Attributes:
        rank: number of templates; 16 as in the published code.
        scale: of S; 2, the published alpha / rank of 16 / 8.
        targets: as of `MaskLoRA`.
    """

    rank: int = 16
    scale: float = 2.0
    targets: str = "*"

    name: ClassVar[str] = "spp"

    def __post_init__(self) -> None:
        """Check the ranges."""
        positive([("rank", self.rank), ("scale", self.scale)])

    def attach(self, student: Student) -> None:
        """Around every target: rank·in + out numbers each."""

        def make(block: Block, slot: Slot, random: torch.Generator) -> tuple[Form, dict[str, Tensor]]:
            rows, columns = slot.info.shape
            device = slot.matrix().weight.device
            a = kaiming(self.rank, columns, random, device)
            return RowsTimesColumns(self.scale), {"A": a, "b": torch.zeros(rows, 1, device=device)}

        surround(student, self.targets, make)


@dataclass(frozen=True)
class Head:
    """Plain LoRA on the head, which is not pruned (PERP): W + (alpha / rank)·B·A.

    Attributes:
        rank: of the update.
        alpha: the update's size is alpha / rank.
        tied: what to do where the head is the embeddings: "skip" the head, "untie" it (a copy of its own, in the files
            too), or change "both".
    """

    rank: int = 16
    alpha: float = 32.0
    tied: Literal["skip", "untie", "both"] = "skip"

    name: ClassVar[str] = "head"

    def __post_init__(self) -> None:
        """Check the ranges."""
        positive([("rank", self.rank), ("alpha", self.alpha)])

    def attach(self, student: Student) -> None:
        """Around the head, and around the embeddings if both are to change."""
        model = student.model
        head: Any = model.get_output_embeddings()
        embeddings: Any = model.get_input_embeddings()
        tied = head.weight is embeddings.weight
        if tied and self.tied == "skip":
            student.notes.append(
                "The head is tied to the embeddings and is not trained. head.tied=untie gives it a copy of its own, "
                "head.tied=both changes both."
            )
            return
        paths = {id(module): path for path, module in model.named_modules()}
        if tied and self.tied == "untie":
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            student.added[f"{paths[id(head)]}.weight"] = head.weight
            student.config["tie_word_embeddings"] = False
        rows, columns = head.weight.shape
        generator = torch.Generator().manual_seed(student.seed)
        a = nn.Parameter(kaiming(self.rank, columns, generator, head.weight.device))
        b = nn.Parameter(torch.zeros(rows, self.rank, device=head.weight.device))
        for module in (head, embeddings) if tied and self.tied == "both" else (head,):
            student.wrap(paths[id(module)], Beside(module, a, b, self.alpha / self.rank))
        student.train(a)
        student.train(b)

    def callbacks(self, student: Student) -> list[TrainerCallback]:
        """None."""
        return []

    def merge(self, student: Student) -> None:
        """Add the update, once to each tensor."""
        done: set[int] = set()
        for path, module in list(student.model.named_modules()):
            if isinstance(module, Beside) and id(module.weight) not in done:
                done.add(id(module.weight))
                module.merge()
                student.merged.add(f"{path}.weight")


class Beside(nn.Module):
    """A frozen head or embedding with a low-rank update beside it, which is never as large as the weight."""

    def __init__(self, module: nn.Module, a: nn.Parameter, b: nn.Parameter, scale: float):
        """Take over a module; `a` `[rank, width]` and `b` `[vocabulary, rank]` may be shared with another."""
        super().__init__()
        self.A, self.B, self.scale = a, b, scale
        self.base_layer: Any = module

    @property
    def weight(self) -> Tensor:
        """The frozen weight, which callers look at for its dtype and device."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """The module's own output, and the update's."""
        if isinstance(self.base_layer, nn.Embedding):
            return self.base_layer(x) + (self.scale * self.B[x] @ self.A).to(self.weight.dtype)
        low = nn.functional.linear(nn.functional.linear(x.to(self.A.dtype), self.A), self.B)
        return self.base_layer(x) + (self.scale * low).to(self.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """W + scale·B·A, computed in float32 and rounded once."""
        weight = self.base_layer.weight
        weight.copy_(weight.float().add_(self.scale * (self.B @ self.A)))
