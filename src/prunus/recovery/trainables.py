"""What of a part is trained, and how its gradients and its weights follow.

Gradients are taken with respect to the matrices themselves, as if they were dense; `fold` turns them into those of what
is trained, and `unfold` writes the matrices anew. So nothing is put around a module, and a stack of experts or a
transposed matrix is trained like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from prunus.recovery.forms import Masked, kaiming
from prunus.recovery.masks import Masks
from prunus.recovery.parts import Part
from prunus.sites import Slot


class Trainable(Protocol):
    """Parameters in float32 and their tie to the weights of a part."""

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizer changes."""
        ...

    @property
    def scales(self) -> list[float]:
        """For each parameter the step that changes its weights by as much as they are in root mean square."""
        ...

    def fold(self) -> None:
        """Give the parameters their gradients, from those of the weights, which are cleared."""
        ...

    def unfold(self) -> None:
        """Write the weights that follow from the parameters; removed weights are +0.0."""
        ...


def size(values: Tensor) -> float:
    """Root mean square, 1 of nothing but zeros."""
    return float(values.float().square().mean().sqrt()) if bool(values.any()) else 1.0


@dataclass
class Direct:
    """Stored tensors that are trained themselves: matrices under their masks, and vectors.

    A tensor in 16 bits is trained on a float32 copy, since small steps would be lost in it. Removed weights are +0.0 to
    begin with and have no gradient: AdamW's moments of them stay zero, and neither a step nor decay moves them. Writing
    the zeros again in every step would take an eighth of the whole reconstruction.
    """

    stored: list[nn.Parameter]
    masks: list[Tensor | None]

    def __post_init__(self) -> None:
        """Take copies where they are needed."""
        self.parameters = [value.detach().float() for value in self.stored]
        kept = zip(self.parameters, self.masks, strict=True)
        self.scales = [size(value if mask is None else value[mask]) for value, mask in kept]

    def fold(self) -> None:
        """Gradients of removed weights are zero."""
        for value, parameter, mask in zip(self.stored, self.parameters, self.masks, strict=True):
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            parameter.grad = gradient.float() if mask is None else gradient.float().mul_(mask)
            value.grad = None

    def unfold(self) -> None:
        """Round to the dtype that is computed in."""
        for value, parameter in zip(self.stored, self.parameters, strict=True):
            if value.data_ptr() != parameter.data_ptr():
                value.data.copy_(parameter)


@dataclass
class LowRank:
    """W + s·P∘(B·A) for every matrix (MaskLoRA of PERP, arXiv:2312.15230): only A and B are trained.

    Attributes:
        slots: the matrices.
        bits: their masks, packed.
        form: gives E and the gradients.
        rank: of B·A.
        generator: draws A; B begins at zero, so that the first forward pass is that of the pruned model.
    """

    slots: tuple[Slot, ...]
    bits: list[Tensor]
    form: Masked
    rank: int
    generator: torch.Generator

    def __post_init__(self) -> None:
        """Draw A and keep the frozen weights, the gradients of which will be folded."""
        self.frozen = [slot.matrix().weight.clone() for slot in self.slots]
        pairs, self.scales = [], []
        for weight in self.frozen:
            rank = min(self.rank, *weight.shape)
            pairs.append((
                kaiming(rank, weight.shape[1], self.generator, weight.device),
                torch.zeros(weight.shape[0], rank, device=weight.device),
            ))  # fmt: skip
            spread = size(pairs[-1][0])
            kept = size(weight[weight != 0])
            self.scales += [spread, kept / (self.form.scale * rank**0.5 * spread)]
        self.pairs = pairs
        self.parameters = [value for pair in pairs for value in pair]

    def fold(self) -> None:
        """∂A = s·Bᵀ·(P∘G), ∂B = s·(P∘G)·Aᵀ."""
        for slot, bits, weight, pair in zip(self.slots, self.bits, self.frozen, self.pairs, strict=True):
            stored = getattr(slot.module, slot.attribute)
            own = slot.view(torch.zeros_like(stored) if stored.grad is None else stored.grad)
            found = self.form.gradients(own.float().clone(), weight, bits, pair)
            for parameter, gradient in zip(pair, found, strict=True):
                parameter.grad = gradient
        for slot in self.slots:
            getattr(slot.module, slot.attribute).grad = None

    def unfold(self) -> None:
        """Merge: computed in float32 and rounded once."""
        for slot, bits, weight, pair in zip(self.slots, self.bits, self.frozen, self.pairs, strict=True):
            slot.matrix().weight.copy_(self.form.weight(weight.float(), bits, pair))


def kept(part: Part, masks: Masks) -> Direct:
    """The kept weights of a part's matrices."""
    stored: dict[int, nn.Parameter] = {}
    keep: dict[int, Tensor] = {}
    for slot in part.slots:
        value = getattr(slot.module, slot.attribute)
        stored[id(value)] = value
        # What belongs to no matrix of the part (an ignored expert) is not trained.
        mask = keep.setdefault(id(value), torch.zeros_like(value, dtype=torch.bool))
        slot.view(mask).copy_(masks.keep(slot.info.name, value.device))
    return Direct(list(stored.values()), list(keep.values()))


def low_rank(part: Part, masks: Masks, rank: int, alpha: float, seed: int) -> LowRank:
    """Updates of low rank under the masks of a part's matrices; s = alpha / rank."""
    bits = [masks.packed[slot.info.name].to(slot.matrix().weight.device) for slot in part.slots]
    return LowRank(part.slots, bits, Masked(alpha / rank), rank, torch.Generator().manual_seed(seed))


def vectors(part: Part, norms: bool) -> dict[str, nn.Parameter]:
    """Biases of a part's modules, and with `norms` every other vector; by their paths below the block."""
    found: dict[str, nn.Parameter] = {}
    for path, module in part.modules.items():
        for name, value in module.named_parameters(path):
            if value.ndim == 1 and value.is_floating_point() and (norms or name.endswith("bias")):
                found[name] = value
    return found


@dataclass
class Together:
    """Several trainables as one."""

    parts: list[Trainable]

    @property
    def parameters(self) -> list[Tensor]:
        """Those of all parts."""
        return [value for part in self.parts for value in part.parameters]

    @property
    def scales(self) -> list[float]:
        """Those of all parts."""
        return [value for part in self.parts for value in part.scales]

    def fold(self) -> None:
        """All parts."""
        for part in self.parts:
            part.fold()

    def unfold(self) -> None:
        """All parts."""
        for part in self.parts:
            part.unfold()
