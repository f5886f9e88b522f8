"""Train one part of a block so that it gives the dense model's hidden states again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from prunus.capture import Call
from prunus.recovery.trainables import Trainable


@dataclass
class Lesson:
    """One forward pass of a part: how the block is called, what it is given, and what it should give.

    Attributes:
        call: the block's.
        inputs: `[samples, length, d]`, on the CPU.
        targets: likewise.
        weights: of each token's squared error, `[samples, length, 1]`; they add up to 1 / d over all lessons, after
            division by the energy that errors are relative to.
        beside: how the dense model calls its block.
        source: what the dense part was given for the targets, on the CPU.
    """

    call: Call
    inputs: Tensor
    targets: Tensor
    weights: Tensor
    beside: Call
    source: Tensor


@dataclass(frozen=True)
class Schedule:
    """Adam's settings and how the learning rate runs.

    Attributes:
        lr: at its peak, relative to the size of what is trained: the share of their root mean square by which Adam
            moves weights in a step. Models differ by a factor of ten and more in the size of their weights.
        steps: optimizer steps in all.
        together: lessons in one step.
        warmup: share of the steps in which the rate rises.
        betas: of the two moments.
        decay: of the weights (decoupled): the share `rate * decay` in a step; a removed weight stays 0.
        clip: largest norm of the gradient; 0: any.
        seed: of the order of the lessons.
    """

    lr: float
    steps: int
    together: int
    warmup: float
    betas: tuple[float, float]
    decay: float
    clip: float
    seed: int

    def rate(self, step: int) -> float:
        """Up in a line, then down in a line that ends at 0 behind the last step."""
        rise = max(1, round(self.steps * self.warmup))
        return self.lr * min((step + 1) / rise, (self.steps - step) / max(self.steps - rise + 1, 1), 1.0)

    def order(self, lessons: int) -> list[list[int]]:
        """Lessons of every step: each once in random order, then again in another."""
        generator, drawn = torch.Generator().manual_seed(self.seed), []
        while len(drawn) < self.steps * self.together:
            drawn += torch.randperm(lessons, generator=generator).tolist()
        return [drawn[step * self.together : (step + 1) * self.together] for step in range(self.steps)]


@dataclass
class Fitted:
    """What a training has to tell.

    Attributes:
        losses: of each step.
        diverged: the step at which loss or gradient were not finite, if they were not.
        share: of the learning rate with which it made the part better; 0 if it did not.
    """

    losses: list[float] = field(default_factory=list)
    diverged: int | None = None
    share: float = 0.0


def weigh(targets: Sequence[Tensor], real: Sequence[Tensor], by_token: bool) -> list[Tensor]:
    """Weights of the squared errors that make of them a relative error.

    Args:
        targets: hidden states `[samples, length, d]` of every lesson.
        real: bool `[samples, length]` of every lesson, False for tokens that only fill a row up.
        by_token: each token's error counts relative to that token's own energy, as the next norm will see it; otherwise
            relative to the mean energy, of which a few tokens may hold nearly all.
    """
    energies = [target.float().square().mean(-1, keepdim=True) for target in targets]
    counts = [one.unsqueeze(-1).float() for one in real]
    tokens = sum(float(count.sum()) for count in counts)
    if by_token:
        tiny = torch.finfo(torch.float32).tiny
        return [count / energy.clamp_min(tiny) / tokens for count, energy in zip(counts, energies, strict=True)]
    total = sum(float((count * energy).sum()) for count, energy in zip(counts, energies, strict=True))
    return [count / max(total, torch.finfo(torch.float32).tiny) for count in counts]


def error(lesson: Lesson, outputs: Tensor) -> Tensor:
    """This lesson's share of the relative squared error, float32; differentiable."""
    device = outputs.device
    squares = (outputs.float() - lesson.targets.to(device).float()).square().mean(-1, keepdim=True)
    return (squares * lesson.weights.to(device)).sum()


@torch.no_grad()
def outputs(module: nn.Module, lessons: Sequence[Lesson], device: torch.device) -> tuple[list[Tensor], list[float]]:
    """What the part gives now for every lesson, on the CPU, and its share of the relative squared error."""
    found, errors = [], []
    for lesson in lessons:
        result = lesson.call(module, lesson.inputs.to(device))
        errors.append(float(error(lesson, result)))
        found.append(result.cpu())
    return found, errors


def fit(
    module: nn.Module,
    lessons: Sequence[Lesson],
    trainable: Trainable,
    leaves: Sequence[nn.Parameter],
    how: Schedule,
    device: torch.device,
) -> Fitted:
    """Minimise the relative error by AdamW; the weights are as they were last when this returns.

    A loss or gradient that is not finite ends it: the parameters stay as the step before left them.

    Args:
        module: the block, inside the context of its part.
        lessons: what to learn.
        trainable: what is trained.
        leaves: the stored tensors whose gradients it folds.
        how: the settings.
        device: where blocks are computed.
    """
    found = Fitted()
    # Several tensors at a time in one kernel, where the device has one.
    fused = device.type in ("cpu", "cuda")
    groups = [
        {"params": [parameter], "lr": how.lr, "scale": scale}
        for parameter, scale in zip(trainable.parameters, trainable.scales, strict=True)
    ]
    adam = torch.optim.AdamW(groups, betas=how.betas, weight_decay=0.0, fused=fused)
    for leaf in leaves:
        leaf.requires_grad_(True)
    try:
        for step, numbers in enumerate(how.order(len(lessons))):
            loss = _step(module, [lessons[number] for number in numbers], len(lessons), device)
            trainable.fold()
            norm = float(nn.utils.get_total_norm([p.grad for p in trainable.parameters if p.grad is not None]))
            if not math.isfinite(loss + norm):
                found.diverged = step
                break
            if how.clip and norm > how.clip:
                for parameter in trainable.parameters:
                    parameter.grad.mul_(how.clip / norm)  # type: ignore[union-attr]
            with torch.no_grad():
                for group in adam.param_groups:
                    group["lr"] = how.rate(step) * group["scale"]
                    group["params"][0].mul_(1 - how.rate(step) * how.decay)
                adam.step()
                trainable.unfold()
            found.losses.append(loss)
    finally:
        for leaf in leaves:
            leaf.requires_grad_(False)
            leaf.grad = None
    return found


@torch.enable_grad()
def _step(module: nn.Module, lessons: Sequence[Lesson], of: int, device: torch.device) -> float:
    """Add up the gradients of some lessons; returns their loss on the scale of all."""
    total = 0.0
    for lesson in lessons:
        # Weights add up over all lessons; here they stand for the mean of a sample of them.
        loss = error(lesson, lesson.call(module, lesson.inputs.to(device))) * (of / len(lessons))
        loss.backward()
        total += float(loss.detach())
    return total
