"""What is learned about a matrix from gradients: running sums with one value per weight, one set per matrix."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from prunus.statistics import Counted, Source


class WeightGradient(Counted):
    """Σ_k |scale·∂L_k/∂W_ij|^power over calibration samples k, in `dtype`: what the kinds below have in common.

    Signs are lost on purpose: gradients of single samples point in all directions and would cancel.
    """

    source: ClassVar[Source]
    power: ClassVar[int]
    # float32: float16 drops increments below 1/2048 of the sum.
    dtype: ClassVar[torch.dtype] = torch.float32
    scale: ClassVar[float] = 1.0

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu") -> None:
        """Start from no samples; `shape` is `(out, in)`."""
        self._sum = torch.zeros(shape, dtype=self.dtype, device=device)
        super().__init__(device)

    @property
    def mean(self) -> Tensor:
        """(Σ_k |g_k|^power / samples)^(1/power), `[out, in]`, float32: mean of |g|, or root mean square. Fresh."""
        mean = self._sum.float() / (max(self.samples, 1) * self.scale**self.power)
        return mean.sqrt_() if self.power == 2 else mean

    def update(self, gradient: Tensor | None) -> None:
        """Add the gradient `[out, in]` of one sample; None where the sample did not reach the matrix."""
        reached = gradient is not None and bool(gradient.any())
        self._count(1, int(reached))
        if gradient is not None:
            sized = gradient.float().abs() * self.scale
            self._sum += (sized.square() if self.power == 2 else sized).to(self.dtype)

    def finite(self) -> bool:
        """Whether no NaN or infinite gradient has been added."""
        return bool(self._sum.isfinite().all())

    def tensors(self) -> list[Tensor]:
        """The running sums, to be summed over processes in place, and to be kept on disk."""
        return [self._sum, self._counts]

    def restore(self, tensors: list[Tensor]) -> None:
        """Continue from what `tensors` gave."""
        for own, stored in zip(self.tensors(), tensors, strict=True):
            own.copy_(stored)


class LossGradientL1(WeightGradient):
    """|∂L/∂W| of the language-modelling loss of the dense model (GBLM-Pruner, Das et al. 2023, arXiv:2311.04902)."""

    source: ClassVar[Source] = "loss"
    power: ClassVar[int] = 1


class LossGradientL1Published(WeightGradient):
    """|∂L/∂W| as GBLM-Pruner's code keeps it: a hundredfold, summed in float16. Only to repeat published results."""

    source: ClassVar[Source] = "loss"
    power: ClassVar[int] = 1
    dtype: ClassVar[torch.dtype] = torch.float16
    scale: ClassVar[float] = 100.0


class LossGradientL2(WeightGradient):
    """(∂L/∂W)² of the language-modelling loss of the dense model, the empirical Fisher information."""

    source: ClassVar[Source] = "loss"
    power: ClassVar[int] = 2


class RegionalGradient(WeightGradient):
    """(∂‖block(X)‖₂/∂W)², which needs no pass through the model (Wanda++, Yang et al. 2025, arXiv:2503.04992)."""

    source: ClassVar[Source] = "output"
    power: ClassVar[int] = 2
