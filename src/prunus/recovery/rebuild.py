"""One part of one block: a closed form, a training, and the better of what it was and what it became."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunus.errors import ModelError
from prunus.recovery.abreast import Facing
from prunus.recovery.compensate import Form, Refit, Rescaled
from prunus.recovery.fit import Fitted, Lesson, fit, outputs
from prunus.recovery.masks import clear
from prunus.recovery.pairs import Meeting, Met, Wanted, closing, meet, meet_end
from prunus.recovery.trainables import Direct, Together, Trainable, kept, low_rank, vectors
from prunus.sites import Slot

if TYPE_CHECKING:
    from prunus.recovery.job import RecoveryJob
    from prunus.recovery.reconstruct import Reconstruct

# Closed forms before the training, by name.
STARTS: dict[str, Form] = {"refit": Refit(), "scales": Rescaled()}

# An error above this is no error of pruning: the model has come apart.
BROKEN = 1e6

# Parts of the learning rate that are tried in turn until one makes a part better than it began.
SHARES = (1.0, 0.2)


@dataclass
class Rebuilt:
    """What became of a part.

    Attributes:
        before: relative squared error of the hidden states behind it, as it was given.
        after: as it is now; never above `before`.
        found: its outputs now, one tensor for each lesson, on the CPU.
        trainable: number of values that were trained.
        fitted: the losses of the training.
        given: True if it was put back to what it was, because nothing was gained.
    """

    before: float
    after: float
    found: list[Tensor]
    trainable: int
    fitted: Fitted
    given: bool

    @property
    def report(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "before": self.before, "after": self.after, "steps": len(self.fitted.losses), "trainable": self.trainable,
            "rate_share": self.fitted.share, "diverged": self.fitted.diverged, "as_given": self.given,
        }  # fmt: skip


def rebuild(how: Reconstruct, job: RecoveryJob, facing: Facing, lessons: Sequence[Lesson], together: int) -> Rebuilt:
    """Reconstruct a part of a loaded block in place, rounded to the dtype on disk, zeros exact.

    Args:
        how: the settings.
        job: knows masks and the dtype on disk.
        facing: the part and its dense twin, both loaded.
        lessons: what it is given and what it should give.
        together: lessons in one optimizer step.

    Raises:
        ModelError: the hidden states of the pruned model are not finite.
    """
    part, device = facing.part, job.device
    stored = _stored(facing, how)
    given = _copies(stored)
    with part.alone():
        form = STARTS.get(how.start)
        last = closing(facing, lessons[0], device) if form else None
        met = meet(facing, last, lessons, device) if form else Met({}, *outputs(facing.block.module, lessons, device))
        before = sum(met.shares)
        if not before < BROKEN:
            raise ModelError(
                f"{facing.block.name}: behind {part.name or 'it'} the hidden states of the pruned model are not finite "
                "or lie far from the dense ones. Is this the dense model that was pruned (--dense)?"
            )
        if form is not None:
            _start(form, job, facing, last, lessons, met.meetings)
        met.meetings.clear()
        _round(job, facing, stored)
        least = sum(outputs(facing.block.module, lessons, device)[1])
        if not least <= before:  # what is best for every matrix alone need not be for all together
            _put(stored, given)
            least = before
        fitted, found, after = _trained(how, job, facing, lessons, together, least)
        count = _count(_trainable(how, job, facing))
        if after < before:
            return Rebuilt(before, after, found, count, fitted, given=False)
    _put(stored, given)
    return Rebuilt(before, before, met.found, count, fitted, given=True)


def _trained(
    how: Reconstruct, job: RecoveryJob, facing: Facing, lessons: Sequence[Lesson], together: int, least: float
) -> tuple[Fitted, list[Tensor], float]:
    """Train, at a lower rate if that made it worse than it began, and not at all if that does too.

    `least` is the error that it begins with.

    Returns:
        The losses of the training that was kept, the outputs of all lessons, and the error.
    """
    module, device, stored = facing.block.module, job.device, _stored(facing, how)
    schedule, start = how.schedule(job, len(lessons), together), _copies(stored)
    fitted = Fitted()
    for share in SHARES if schedule.steps else ():
        slower = replace(schedule, lr=schedule.lr * share)
        fitted = fit(module, lessons, _trainable(how, job, facing), list(stored.values()), slower, device)
        _round(job, facing, stored)
        found, errors = outputs(module, lessons, device)
        if sum(errors) <= least:
            fitted.share = share
            return fitted, found, sum(errors)
        _put(stored, start)
    found, errors = outputs(module, lessons, device)
    return fitted, found, sum(errors)


def _copies(stored: dict[str, nn.Parameter]) -> list[Tensor]:
    return [value.detach().clone() for value in stored.values()]


@torch.no_grad()
def _put(stored: dict[str, nn.Parameter], copies: list[Tensor]) -> None:
    """Write the copies back."""
    for value, former in zip(stored.values(), copies, strict=True):
        value.copy_(former)


def _stored(facing: Facing, how: Reconstruct) -> dict[str, nn.Parameter]:
    """Dotted path in the model -> every stored tensor that may change, each once."""
    found = {slot.parameter: getattr(slot.module, slot.attribute) for slot in facing.part.slots}
    return found | {f"{facing.block.name}.{path}": value for path, value in vectors(facing.part, how.norms).items()}


@torch.no_grad()
def _start(
    form: Form,
    job: RecoveryJob,
    facing: Facing,
    last: Slot | None,
    lessons: Sequence[Lesson],
    meetings: dict[str, Meeting],
) -> None:
    """Closed forms, matrix by matrix, the one that closes the part last and on the inputs that it then has.

    A matrix that no token reached stays as it is, and one of another shape than its twin.
    """
    twins = {slot.info.name: slot for slot in facing.same.slots}
    for slot in facing.part.slots:
        twin = twins.get(slot.info.name)
        if slot.info.name not in meetings or twin is None or twin.info.shape != slot.info.shape:
            continue
        wanted = Wanted(twin.matrix().weight, None if slot.expert is not None else getattr(twin.module, "bias", None))
        _solve(form, job, slot, twin.matrix().weight, meetings[slot.info.name], wanted)
    twin = twins.get(last.info.name) if last is not None else None
    if last is not None and twin is not None and twin.info.shape == last.info.shape:
        _solve(form, job, last, twin.matrix().weight, meet_end(facing, last, lessons, job.device), Wanted())


def _solve(form: Form, job: RecoveryJob, slot: Slot, base: Tensor, met: Meeting, wanted: Wanted) -> None:
    """Write the weight that a closed form gives, and the bias that belongs to it if there is one."""
    weight, mask = slot.matrix().weight, job.masks.keep(slot.info.name, base.device)
    bias = getattr(slot.module, "bias", None) if slot.expert is None else None
    weight.copy_(form(weight, base, mask, met.aims(wanted, centred=bias is not None)))
    if bias is not None:
        bias.copy_(met.bias(wanted, weight))


def _trainable(how: Reconstruct, job: RecoveryJob, facing: Facing) -> Trainable:
    """What the settings train in this part."""
    found = vectors(facing.part, how.norms)
    own = (
        kept(facing.part, job.masks)
        if how.train == "kept"
        else low_rank(facing.part, job.masks, how.rank, how.alpha, job.part.seed)
    )
    return Together([own, Direct(list(found.values()), [None] * len(found))]) if found else own


def _count(trainable: Trainable) -> int:
    """Number of values that are trained: of a matrix under a mask, those that are kept."""
    parts = trainable.parts if isinstance(trainable, Together) else [trainable]
    total = 0
    for part in parts:
        masks = part.masks if isinstance(part, Direct) else [None] * len(part.parameters)
        sizes = zip(part.parameters, masks, strict=True)
        total += sum(value.numel() if mask is None else int(mask.sum()) for value, mask in sizes)
    return total


@torch.no_grad()
def _round(job: RecoveryJob, facing: Facing, stored: dict[str, nn.Parameter]) -> None:
    """Round to the dtype on disk, so that the next part sees what a reader will; removed weights are +0.0."""
    for path, value in stored.items():
        value.copy_(value.to(job.stream.weights.dtype(path)))
    for slot in facing.part.slots:
        clear(slot.matrix(), job.masks)
