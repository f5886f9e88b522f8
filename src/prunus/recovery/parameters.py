"""Sets of the model's own parameters: biases, norms, embeddings, head, kept weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from prunus.errors import RecipeError
from prunus.recovery.masks import Masks
from prunus.recovery.student import Student
from prunus.sites import Slot

if TYPE_CHECKING:
    from transformers import TrainerCallback


class Own:
    """What the sets have in common: nothing to do between steps, and nothing to merge."""

    def callbacks(self, student: Student) -> list[TrainerCallback]:
        """None."""
        return []

    def merge(self, student: Student) -> None:
        """Nothing: they are the model's own."""


# Config flags under which the stock classes build biases: path's end → flag. Only Llama and its kin have both.
FLAGS = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_bias"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp_bias"),
}


@dataclass(frozen=True)
class Biases(Own):
    """Every bias of the model, those of its norms included (Zimmer et al. 2023, PERP).

    Attributes:
        create: give matrices without a bias one that begins at zero, where the configuration has flags for that.
        alone: refuse a model without biases; in a combination the others are trained instead.
    """

    create: bool = False
    alone: bool = True

    name: ClassVar[str] = "biases"

    def attach(self, student: Student) -> None:
        """Train all parameters called `bias`.

        Raises:
            RecipeError: there are none and none may be made.
        """
        if self.create:
            _create(student)
        found = [value for path, value in student.model.named_parameters() if path.endswith(".bias")]
        if not found and self.alone:
            raise RecipeError(
                "This model has no biases, so that 0 parameters would be trained. Use norms, give the matrices biases "
                "with --set biases.create=true, or use masklora."
            )
        if not found:
            student.notes.append("The model has no biases; they are not among what is trained.")
        for value in found:
            student.train(value)


def _create(student: Student) -> None:
    """Zero biases for every matrix, and the flags that make stock classes load them.

    Raises:
        RecipeError: the model's class would not load them.
    """
    config = student.model.config.get_text_config()
    for _, slot in student.linears():
        if getattr(slot.module, "bias", None) is not None:
            continue
        flag = FLAGS.get(slot.info.name.rpartition(".")[2])
        if flag is None or not hasattr(config, flag):
            raise RecipeError(
                f"{slot.info.name} cannot be given a bias: the configuration of {type(student.model).__name__} has no "
                "flag for it, so that no stock class would load it. Use norms or masklora."
            )
        bias = nn.Parameter(torch.zeros(slot.info.shape[0], device=slot.matrix().weight.device))
        slot.module.register_parameter("bias", bias)
        student.added[f"{slot.info.name}.bias"] = bias
        student.config[flag] = True


@dataclass(frozen=True)
class Norms(Own):
    """All parameters of every norm: gain and, where there is one, bias (Zimmer et al. 2023, PERP).

    A norm is a module with a 1-D `weight` whose class name contains "Norm": no list of classes, so that new families'
    norms are not left out.
    """

    name: ClassVar[str] = "norms"

    def attach(self, student: Student) -> None:
        """Train them."""
        for module in student.model.modules():
            weight = getattr(module, "weight", None)
            if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.ndim == 1:
                for value in module.parameters(recurse=False):
                    student.train(value)


@dataclass(frozen=True)
class Embeddings(Own):
    """The input embeddings; where they are tied, the head is the same tensor."""

    name: ClassVar[str] = "embeddings"

    def attach(self, student: Student) -> None:
        """Train them."""
        embeddings: Any = student.model.get_input_embeddings()
        student.train(embeddings.weight)


@dataclass(frozen=True)
class Output(Own):
    """The head's weight itself; where it is tied, the embeddings are the same tensor."""

    name: ClassVar[str] = "output"

    def attach(self, student: Student) -> None:
        """Train it."""
        head: Any = student.model.get_output_embeddings()
        student.train(head.weight)


@dataclass(frozen=True)
class Weights(Own):
    """The kept weights of every matrix in place: masked gradients, and removed weights set to +0.0 after every step.

    With masked gradients from the first step AdamW's moments of removed weights stay zero, so that neither momentum nor
    weight decay moves them; the zeros are set anyway.
    """

    name: ClassVar[str] = "weights"

    def attach(self, student: Student) -> None:
        """Train them, with the masks on their gradients."""
        train_in_place(student, [slot for block in student.blocks for slot in block.slots])


def train_in_place(student: Student, slots: list[Slot]) -> None:
    """Train the parameters of matrices themselves; a parameter may stack several (experts)."""
    members: dict[str, list[Slot]] = {}
    for slot in slots:
        members.setdefault(slot.parameter, []).append(slot)
    for group in members.values():
        parameter = getattr(group[0].module, group[0].attribute)
        student.train(parameter)
        if parameter.device.type != "meta":
            parameter.register_hook(_Mask(group, student.masks))
    student.in_place.extend(slots)


@dataclass
class _Mask:
    """Sets the gradient of removed weights to zero; as a hook it acts before processes add their gradients up."""

    slots: list[Slot]
    masks: Masks

    def __call__(self, gradient: Tensor) -> Tensor:
        masked = gradient.clone()
        for slot in self.slots:
            view = slot.view(masked)
            view.masked_fill_(~self.masks.keep(slot.info.name, gradient.device), 0.0)
        return masked


def inside(student: Student) -> Iterator[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """Block → its parameters with their names in the model."""
    for block in student.blocks:
        yield block.name, [(f"{block.name}.{name}", value) for name, value in block.module.named_parameters()]
