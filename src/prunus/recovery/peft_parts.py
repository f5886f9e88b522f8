"""The adapters that the package peft has: plain LoRA, which does not keep zeros when merged, and HiRA, which does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from prunus.errors import RecipeError
from prunus.recovery.adapters import chosen, positive
from prunus.recovery.student import Student
from prunus.sites import Slot

if TYPE_CHECKING:
    from transformers import TrainerCallback


def load_peft() -> Any:
    """The package peft.

    Raises:
        RecipeError: it is not installed; the command that installs it.
    """
    try:
        import peft
    except ImportError:
        raise RecipeError("This recovery needs the package peft: pip install 'prunus[recover]'.") from None
    return peft


class Injected:
    """What peft's adapters have in common: how they get in, and how their update is written into the weights."""

    def callbacks(self, student: Student) -> list[TrainerCallback]:
        """None."""
        return []

    def merge(self, student: Student) -> None:
        """W + P∘ΔW with peft's own ΔW, in float32: the mask loses nothing only where ΔW is zero outside of it."""
        for slot, layer in layers(student):
            add_masked(student, slot, layer.get_delta_weight("default"))


def inject(student: Student, config: Any, targets: str) -> None:
    """Put peft's modules around the targets, seeded, and have their parameters trained in float32."""
    peft = load_peft()
    found = chosen(student, targets)
    config.target_modules = [slot.info.name for _, slot in found]
    before = {name: student.model.get_submodule(name) for name in config.target_modules}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(student.seed)
        peft.inject_adapter_in_model(config, student.model)
    student.wrapped |= {name: module for name, module in before.items() if name not in student.wrapped}
    student.model.requires_grad_(False)
    for _, layer in layers(student):
        for name, value in layer.named_parameters():
            if not name.startswith("base_layer."):
                student.train(value)


def layers(student: Student) -> list[tuple[Slot, Any]]:
    """Every matrix that has one of peft's modules around it, with that module."""
    slots = {slot.info.name: slot for _, slot in student.linears()}
    modules = dict(student.model.named_modules())
    return [(slot, modules[name]) for name, slot in slots.items() if hasattr(modules.get(name), "get_delta_weight")]


@torch.no_grad()
def add_masked(student: Student, slot: Slot, delta: torch.Tensor) -> None:
    """W + P∘Δ, in float32, rounded once; Δ in the orientation that the module stores."""
    weight = slot.matrix().weight
    change = slot.view(delta).float()
    change = change.masked_fill(~student.masks.keep(slot.info.name, weight.device), 0.0)
    weight.copy_(weight.float() + change)
    student.merged.add(slot.parameter)


@dataclass(frozen=True)
class LoRA(Injected):
    """W + (alpha / rank)·B·A (Hu et al. 2021, arXiv:2106.09685), by peft.

    Merged, it would fill the zeros. So where there are any, the weights stay as they are and the adapter is saved
    beside them, in OUT/adapter, in peft's form. Where there are none (a structured or depth-pruned model) it is merged.

    Attributes:
        rank: of the update.
        alpha: the update's size is alpha / rank.
        targets: globs of the matrices that get one, separated by blanks.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: str = "*"

    name: ClassVar[str] = "lora"
    kept_apart: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        positive([("rank", self.rank), ("alpha", self.alpha)])

    def config(self) -> Any:
        """Peft's configuration."""
        return load_peft().LoraConfig(r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, task_type="CAUSAL_LM")

    def attach(self, student: Student) -> None:
        """Around every target."""
        inject(student, self.config(), self.targets)

    def merge(self, student: Student) -> None:
        """Only into a model without zeros, where the mask takes nothing away."""
        if not student.masks.removed:
            super().merge(student)

    def save(self, student: Student, folder: Path, base: str) -> None:
        """Write the adapter as peft's own loader reads it."""
        from safetensors.torch import save_file

        peft = load_peft()
        state = peft.get_peft_model_state_dict(student.model, adapter_name="default")
        named = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
        folder.mkdir(exist_ok=True)
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = self.config()
        config.target_modules = sorted(slot.info.name for slot, _ in layers(student))
        config.base_model_name_or_path, config.inference_mode = base, True
        config.save_pretrained(str(folder))


@dataclass(frozen=True)
class LoRAPrune(LoRA):
    """Plain LoRA while training, W + (alpha / rank)·P∘(B·A) when merged (PERP's LoRA-Prune).

    The merged model is not the trained one: what the update does at removed weights is lost. The report says how far
    the logits move (`merge_gap`).
    """

    rank: int = 16
    alpha: float = 32.0

    name: ClassVar[str] = "loraprune"
    kept_apart: ClassVar[bool] = False

    def merge(self, student: Student) -> None:
        """Under the mask."""
        Injected.merge(self, student)


@dataclass(frozen=True)
class HiRA(Injected):
    """W + W∘(B·A) (Huang et al. 2025), by peft: exact merge, zeros kept by construction.

    Attributes:
        rank: of the factor; 32 as in peft.
        targets: as of `LoRA`.
    """

    rank: int = 32
    targets: str = "*"

    name: ClassVar[str] = "hira"

    def __post_init__(self) -> None:
        """Check the ranges."""
        positive([("rank", self.rank)])

    def attach(self, student: Student) -> None:
        """Around every target."""
        peft = load_peft()
        config = peft.HiraConfig(r=self.rank)
        config.fan_in_fan_out = any(slot.transposed for _, slot in student.linears())
        inject(student, config, self.targets)

    def merge(self, student: Student) -> None:
        """W + W∘(B·A); what peft calls the delta is B·A alone."""
        for slot, layer in layers(student):
            stored = getattr(slot.module, slot.attribute).detach()
            add_masked(student, slot, stored.float() * layer.get_delta_weight("default"))
