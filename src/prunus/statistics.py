"""What is learned about a site from calibration tokens: running sums, one set per distinct input tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")
Kind = TypeVar("Kind", bound="Sums")

# Where a statistic comes from: the inputs of a matrix, seen while the block runs; the gradient of the model's loss; the
# gradient of the norm of the block's outputs; trials with the whole model in memory; or the hidden states themselves.
Source = Literal["inputs", "loss", "output", "trials", "states"]

_TOKENS = 256  # tokens squared at a time: the temporary then stays in a core's cache
_PANELS = 4  # of the Gram matrix: 5/8 of the full product's work; narrower panels multiply more slowly


class Sums(Protocol):
    """Running sums over calibration samples. Those of parts of the data add up to those of the whole."""

    source: ClassVar[Source]

    @property
    def tokens(self) -> int:
        """How much was seen: rows of input, or samples with a gradient."""
        ...

    def finite(self) -> bool:
        """Whether nothing that is NaN or infinite has been seen; ask before use, and name the site if not."""
        ...

    def tensors(self) -> list[Tensor]:
        """The running sums themselves, to be summed over processes in place."""
        ...


class Statistic(Sums, Protocol):
    """Running sums over the inputs of a matrix, one set per distinct input tensor."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from no tokens.

        Args:
            features: length of one input row.
            device: where the sums live, the device of the inputs.
        """
        ...

    def update(self, x: Tensor, samples: int) -> None:
        """Add inputs `x [tokens, in]` of any floating dtype, which belong to `samples` calibration sequences."""
        ...


class BlockStates:
    """Not a running sum: the hidden states in front of and behind each block, on the calibration text."""

    source: ClassVar[Source] = "states"


class Counted:
    """How much went into a running sum: `_counts` is `[samples, tokens]`, int64, and adds up over processes."""

    def __init__(self, device: torch.device | str) -> None:
        """Start from nothing."""
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)

    @property
    def samples(self) -> int:
        """Number of calibration sequences seen."""
        return int(self._counts[0])

    @property
    def tokens(self) -> int:
        """Number of input rows seen; of gradients, of samples that reached the matrix."""
        return int(self._counts[1])

    def _count(self, samples: int, tokens: int) -> None:
        self._counts += torch.tensor([samples, tokens], device=self._counts.device)


class InputNorm(Counted):
    """Σ_t x_tj² per input j: the size of each input (Wanda, Sun et al. 2023, arXiv:2306.11695, §3)."""

    source: ClassVar[Source] = "inputs"

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from no tokens."""
        # float64: a sum of 10^6 squares would lose its last tokens in float32.
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        super().__init__(device)

    @property
    def mean_square(self) -> Tensor:
        """Σ_t x_tj² / samples, float32 `[in]`: per sequence, not per token, as the published code has it."""
        return (self._sum / max(self.samples, 1)).float()

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ / √samples, float32 `[in]`."""
        return self.mean_square.sqrt()

    def update(self, x: Tensor, samples: int) -> None:
        """Add inputs `x [tokens, in]` of any floating dtype, which belong to `samples` calibration sequences."""
        for part in x.split(_TOKENS):
            # float32 before squaring: float16 overflows above 255.
            self._sum += part.float().square().sum(0)
        self._count(samples, len(x))

    def finite(self) -> bool:
        """Whether no NaN or infinite input has been seen."""
        return bool(self._sum.isfinite().all())

    def tensors(self) -> list[Tensor]:
        """The running sums, to be summed over processes in place."""
        return [self._sum, self._counts]


class InputMoments(Counted):
    """Σ_t x_tj and Σ_t x_tj² per input j: where an input lies and how much it varies (DSnoT, arXiv:2310.08915, §3)."""

    source: ClassVar[Source] = "inputs"

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from no tokens."""
        self._sums = torch.zeros(2, features, dtype=torch.float64, device=device)
        super().__init__(device)

    @property
    def mean(self) -> Tensor:
        """Σ_t x_tj / samples, float32 `[in]`: the sum over a sequence, averaged over sequences."""
        return (self._sums[0] / max(self.samples, 1)).float()

    @property
    def variance(self) -> Tensor:
        """Mean of x_tj² minus squared mean of x_tj, both over all tokens, float32 `[in]`, at least 0."""
        first, second = self._sums / max(self.tokens, 1)
        return (second - first.square()).clamp_(min=0).float()

    @property
    def norm(self) -> Tensor:
        """‖X_j‖₂ / √samples, float32 `[in]`, as that of `InputNorm`."""
        return (self._sums[1] / max(self.samples, 1)).sqrt().float()

    @property
    def token_mean(self) -> Tensor:
        """Mean of x_tj over all tokens, float32 `[in]`."""
        return (self._sums[0] / max(self.tokens, 1)).float()

    def update(self, x: Tensor, samples: int) -> None:
        """Add inputs `x [tokens, in]` of any floating dtype, which belong to `samples` calibration sequences."""
        for part in x.split(_TOKENS):
            # float64 before squaring: the variance is a difference, small where an input hardly varies.
            exact = part.double()
            self._sums[0] += exact.sum(0)
            self._sums[1] += exact.square().sum(0)
        self._count(samples, len(x))

    def finite(self) -> bool:
        """Whether no NaN or infinite input has been seen."""
        return bool(self._sums.isfinite().all())

    def tensors(self) -> list[Tensor]:
        """The running sums, to be summed over processes in place."""
        return [self._sums, self._counts]


class RunningFluctuation(Counted):
    """FLAP's published fluctuation: a running sum over sequences, around the mean so far (arXiv:2312.11983, code).

    F_k = F_(k-1)·(k-2)/(k-1) + S_k/k with S_k = Σ_t (x_t - m_k)² of sequence k and m_k the mean of the first k: tokens
    times a variance that leaves out the first sequence. It depends on the order of the sequences, so it is refused for
    several processes.
    """

    source: ClassVar[Source] = "inputs"

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from no tokens."""
        self._mean = torch.zeros(features, dtype=torch.float64, device=device)
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)
        super().__init__(device)

    @property
    def fluctuation(self) -> Tensor:
        """F_N, float32 `[in]`."""
        return self._sum.float()

    @property
    def token_mean(self) -> Tensor:
        """Mean of x_tj over all tokens, float32 `[in]`, of sequences of equal length."""
        return self._mean.float()

    def update(self, x: Tensor, samples: int) -> None:
        """Add inputs `x [tokens, in]` of any floating dtype: `samples` sequences of equal length."""
        for own in x.double().chunk(max(samples, 1)):
            self._count(1, len(own))
            k = self.samples
            self._mean += (own.mean(0) - self._mean) / k
            if k > 1:
                self._sum = self._sum * ((k - 2) / (k - 1)) + (own - self._mean).square().sum(0) / k

    def finite(self) -> bool:
        """Whether no NaN or infinite input has been seen."""
        return bool(self._mean.isfinite().all())

    def tensors(self) -> list[Tensor]:
        """The running sums; they do not add up over processes."""
        return [self._mean, self._sum, self._counts]


# They depend on the order of the sequences, so that sums of parts of the text are not those of the whole.
ORDERED: frozenset[type] = frozenset({RunningFluctuation})


class Gram(Counted):
    """XᵀX: how the inputs of a site move together, the Hessian of its squared output error up to a factor.

    One `[features, features]` buffer. While tokens come in only the lower panels are filled (5/8 of the work); reading
    `hessian` mirrors them in place.
    """

    source: ClassVar[Source] = "inputs"

    def __init__(self, features: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Start from no tokens; `dtype` is that of the sums, float32 or float64."""
        self._sum = torch.zeros(features, features, dtype=dtype, device=device)
        super().__init__(device)

    @property
    def hessian(self) -> Tensor:
        """(2 / samples)·XᵀX, `[in, in]`, symmetric (Frantar & Alistarh 2023, arXiv:2301.00774, §3). A fresh tensor."""
        for panel in self._panels():
            self._sum[panel, panel.stop :] = self._sum[panel.stop :, panel].T
        return self._sum * (2 / max(self.samples, 1))

    def update(self, x: Tensor, samples: int) -> None:
        """Add inputs `x [tokens, in]` of any floating dtype, which belong to `samples` calibration sequences."""
        x = x.to(self._sum.dtype)
        for panel in self._panels():
            self._sum[panel, : panel.stop].addmm_(x[:, panel].T, x[:, : panel.stop])
        self._count(samples, len(x))

    def _panels(self) -> list[slice]:
        """Groups of rows; of each, the columns up to its last row are summed directly."""
        width = self._sum.shape[0]
        step = max(1, -(-width // _PANELS))
        return [slice(start, min(start + step, width)) for start in range(0, width, step)]

    def finite(self) -> bool:
        """Whether no NaN or infinite input has been seen. The diagonal tells: it bounds every other entry."""
        return bool(self._sum.diagonal().isfinite().all())

    def tensors(self) -> list[Tensor]:
        """The running sums, to be summed over processes in place."""
        return [self._sum, self._counts]


class SiteStats(Mapping[type, Any]):
    """The statistics of one site, by type: `stats[InputNorm].norm`.

    Sites with the same input tensor share one `SiteStats` (or at least one `memo`), so that what `derive` computes is
    computed once for q, k and v. It must live no longer than their block.
    """

    def __init__(self, statistics: Mapping[type, Sums], site: str = "", memo: dict[Any, Any] | None = None) -> None:
        """Collect what was gathered.

        Args:
            statistics: type -> instance.
            site: dotted name for messages, of the first site that has this input.
            memo: where `derive` keeps its results; give the same one to sites that share their input but not all of
                their statistics.
        """
        self.site = site
        self._statistics = dict(statistics)
        self._memo = {} if memo is None else memo

    def __getitem__(self, kind: type[Kind]) -> Kind:
        """The statistic of this type.

        Raises:
            TypeError: if it was not gathered; a mistake of ours, in the `needs` of the part that reads it.
        """
        if kind not in self._statistics:
            gathered = ", ".join(sorted(other.__name__ for other in self._statistics))
            raise TypeError(
                f"{self.site or 'a site'}: {kind.__name__} is read but only {{{gathered}}} was gathered;"
                f" add {kind.__name__} to the `needs` of the part that reads it."
            )
        return self._statistics[kind]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[type]:
        """The types gathered."""
        return iter(self._statistics)

    def __len__(self) -> int:
        """How many were gathered."""
        return len(self._statistics)

    @property
    def unseen(self) -> bool:
        """Whether statistics were wanted and not one token came by, as happens to rarely used experts."""
        return bool(self._statistics) and all(statistic.tokens == 0 for statistic in self._statistics.values())

    def joined(self, more: Mapping[type, Any], site: str) -> SiteStats:
        """These and others, which belong to one of the sites alone; what is derived is still shared.

        Only what reads the shared ones alone may be derived.
        """
        return SiteStats({**self._statistics, **more}, site, self._memo)

    def derive(self, function: Callable[[SiteStats], Value]) -> Value:
        """`function(self)`, computed once for all sites that share this input.

        Args:
            function: hashable, and equal to another exactly if it computes the same: a module-level function or a
                frozen dataclass with `__call__`.
        """
        if function not in self._memo:
            self._memo[function] = function(self)
        return self._memo[function]
