"""A pruned part beside its dense twin: what its matrices are given now, and what they should give for it.

The dense matrix gives W·x̃ for the inputs x̃ of the dense model; the pruned one is given x, which blocks and matrices
before it have changed already. Fitting it to W·x̃, token by token, has it undo their errors, where W·x would only keep
its own small. A matrix whose output is added to the residual stream as it is can do better still: it is told what is
missing there, the errors of all before it included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.errors import ModelError
from prunus.factor import Unit, unit_diagonal
from prunus.gather import inputs_shown
from prunus.recovery.abreast import Facing
from prunus.recovery.compensate import DAMP, Aims
from prunus.recovery.fit import Lesson, error
from prunus.sites import Slot

# Largest difference between what a part adds and the output of the matrix that is held to add it, over the largest.
_SAME = 1e-2


@dataclass(frozen=True, eq=False)
class Wanted:
    """What a matrix should give, by the other side of a `Meeting`: W·y + b, or y itself.

    Attributes:
        weight: W of the dense twin `[out, other]`; None: y is what it should give.
        bias: b `[out]`, if there is one.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None

    def images(self, met: Meeting) -> Tensor:
        """Σ w·t·xᵀ `[out, in]`, a fresh tensor."""
        if self.weight is None:
            return met.crossed.clone()
        found = self.weight.float() @ met.crossed
        return found if self.bias is None else found.addr_(self.bias.float(), met.own)

    def total(self, met: Meeting) -> Tensor:
        """Σ w·t `[out]`."""
        if self.weight is None:
            return met.other
        found = self.weight.float() @ met.other
        return found if self.bias is None else found + self.bias.float() * met.weight


@dataclass(eq=False)
class Meeting:
    """Sums over the tokens of one input of the pruned part, which several matrices may share, in float32.

    Attributes:
        hessian: Σ w·x·xᵀ `[in, in]`.
        crossed: Σ w·y·xᵀ `[other, in]`; y are the inputs of the dense twin, or what is wanted of the matrix.
        own: Σ w·x `[in]`.
        other: Σ w·y `[other]`.
        paired: y is another tensor than x. A matrix that only sees some of the tokens, such as an expert's, is fitted
            to what the dense one gives for the same inputs, since the dense model may have sent it other tokens.
        weight: Σ w.
        units: the damped Hessian, and (True) that around the mean.
    """

    hessian: Tensor
    crossed: Tensor
    own: Tensor
    other: Tensor
    paired: bool = True
    weight: float = 0.0
    units: dict[bool, Unit] = field(default_factory=dict)

    @classmethod
    def empty(cls, columns: int, other: int, device: torch.device, paired: bool = True) -> Meeting:
        """No token yet."""
        sums = torch.zeros(columns, columns, device=device), torch.zeros(other, columns, device=device)
        return cls(*sums, torch.zeros(columns, device=device), torch.zeros(other, device=device), paired)

    def update(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add tokens: `x [tokens, in]`, `y [tokens, other]`, `weights [tokens, 1]`."""
        x, y = x.float(), y.float()
        heavy = x * weights
        self.hessian.addmm_(heavy.T, x)
        self.crossed.addmm_(y.T, heavy)
        self.own += heavy.sum(0)
        self.other += (y * weights).sum(0)
        self.weight += float(weights.sum())

    def aims(self, wanted: Wanted, centred: bool) -> Aims:
        """What a matrix should give here; `centred`: around the means, of which a bias takes care (`bias`)."""
        hessian, images = (self.hessian + self.hessian.T) / 2, wanted.images(self)
        if centred:
            hessian.addr_(self.own, self.own, alpha=-1 / self.weight)
            hessian.diagonal().clamp_(min=0)
            images.addr_(wanted.total(self), self.own, alpha=-1 / self.weight)
        if centred not in self.units:
            self.units[centred] = unit_diagonal(hessian.clone(), DAMP)
        return Aims(hessian, images, self.units[centred])

    def bias(self, wanted: Wanted, weight: Tensor) -> Tensor:
        """The bias that goes with a weight: the mean of what it does not give, float32 `[out]`."""
        return (wanted.total(self) - weight.float() @ self.own) / self.weight


@dataclass
class Met:
    """What a first pass over the text shows of a part.

    Attributes:
        meetings: name of a matrix -> its sums; the same object for matrices with the same input. One that no token
            reached is not there.
        found: outputs of the part, one tensor for each lesson, on the CPU.
        shares: each lesson's share of the error.
    """

    meetings: dict[str, Meeting] = field(default_factory=dict)
    found: list[Tensor] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)


@torch.no_grad()
def meet(facing: Facing, last: Slot | None, lessons: Sequence[Lesson], device: torch.device) -> Met:
    """Run the dense part and the pruned one on every lesson; the pruned one last, inside the context of its part.

    Args:
        facing: the parts.
        last: a matrix that is not watched, because it will be met when the others are what they will be (`meet_end`).
        lessons: the text.
        device: where blocks are computed.

    Raises:
        ModelError: inputs of a matrix are NaN or infinite.
    """
    met, whole = Met(), {slot.info.name for slot in facing.part.slots if slot.expert is None}
    for lesson in lessons:
        theirs: dict[str, Tensor] = {}
        with facing.same.alone(), inputs_shown(facing.twin, theirs.setdefault):
            lesson.beside(facing.twin.module, lesson.source.to(device))
        weights, seen = lesson.weights.to(device).reshape(-1, 1), {}

        def show(name: str, inputs: Tensor, theirs=theirs, weights=weights, seen=seen) -> None:
            if last is not None and name == last.info.name:
                return
            leader, _ = seen.setdefault(id(inputs), (name, inputs))  # kept, so that no address is given out twice
            if leader != name:
                met.meetings.setdefault(name, met.meetings[leader])
                return
            x, other = flat(inputs), theirs.get(name) if name in whole else None
            y = None if other is None or len(flat(other)) != len(x) or len(x) != len(weights) else flat(other)
            if name not in met.meetings:
                columns, wide = x.shape[1], x.shape[1] if y is None else y.shape[1]
                met.meetings[name] = Meeting.empty(columns, wide, device, paired=y is not None)
            if not met.meetings[name].paired:
                met.meetings[name].update(x, x, torch.ones(len(x), 1, device=device))
            elif y is not None:
                met.meetings[name].update(x, y, weights)

        with inputs_shown(facing.block, show):
            result = lesson.call(facing.block.module, lesson.inputs.to(device))
        met.found.append(result.cpu())
        met.shares.append(float(error(lesson, result)))
    for name, one in met.meetings.items():
        if not bool(one.hessian.diagonal().isfinite().all()):
            raise ModelError(f"The inputs of {name} are NaN or infinite on the text that is learnt from.")
    return met


def flat(inputs: Tensor) -> Tensor:
    """`[tokens, in]`."""
    return inputs.reshape(-1, inputs.shape[-1])


@torch.no_grad()
def closing(facing: Facing, lesson: Lesson, device: torch.device) -> Slot | None:
    """The matrix whose output, and nothing else, the part adds to the residual stream, if there is one."""
    outputs: dict[str, Tensor] = {}
    modules = {slot.module: slot for slot in facing.part.slots if slot.expert is None}
    handles = [
        module.register_forward_hook(lambda _, args, result, name=slot.info.name: outputs.update({name: result}))
        for module, slot in modules.items()
    ]
    try:
        inputs = lesson.inputs.to(device)
        result = lesson.call(facing.block.module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    for slot in reversed(list(modules.values())):
        own = outputs.get(slot.info.name)
        if own is None or own.numel() != result.numel():
            continue
        missing = result.float() - inputs.float() - own.reshape(result.shape).float()
        if float(missing.norm()) <= _SAME * float(own.float().norm()):
            return slot
    return None


@torch.no_grad()
def meet_end(facing: Facing, slot: Slot, lessons: Sequence[Lesson], device: torch.device) -> Meeting:
    """Sums over the inputs of the matrix that closes the part, as they are now, and over what it should add."""
    rows, columns = slot.info.shape
    met = Meeting.empty(columns, rows, device)
    for lesson in lessons:
        inputs = lesson.inputs.to(device)
        wanted = flat(lesson.targets.to(device).float() - inputs.float())

        def show(name: str, x: Tensor, wanted=wanted, weights=lesson.weights) -> None:
            if name == slot.info.name:
                met.update(flat(x), wanted, weights.to(device).reshape(-1, 1))

        with inputs_shown(facing.block, show):
            lesson.call(facing.block.module, inputs)
    return met
