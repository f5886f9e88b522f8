"""Matrices with heavy-tailed spectra keep more; no data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from prunus.allocations.allocation import Survey
from prunus.allocations.project import scale
from prunus.allocations.remember import fingerprint, remembered
from prunus.allocations.spectrum import Fit, eigenvalues, tail_exponent
from prunus.errors import RecipeError, near
from prunus.models.source import default_cache
from prunus.sites import Matrix, SiteInfo
from prunus.statistics import SiteStats

Level = Literal["block", "matrix"]
Compat = Literal["exact", "reference"]

_VERSION = 1  # of the estimator; part of the cache's keys
_EQUAL = 1e-9  # exponents nearer than this, relative to their size, differ by rounding alone


@dataclass(frozen=True)
class AlphaPruning:
    """s_i = t·(1 - span + 2·span·(α_i - min α) / (max α - min α)), t such that the total is met (Lu et al. 2024).

    α is the exponent of the tail of a matrix' squared singular values: small for heavy tails, which mark well-trained
    matrices. Weights only. Helps from 60 % on. A matrix without a tail (zeros, rank 1) takes the mean of its block.

    Attributes:
        fit: where the tail begins. `peak`: near the peak of the spectrum, where it is nearest to a power law; `median`:
            at the median; `peak_compat`: `peak` with the published lower bound, the logarithm of what was meant, which
            makes α depend on the scale of the matrix.
        span: the authors' ε (or τ), in [0, 1): before t, sparsities reach from 1 - span to 1 + span; 0.3 as their code
            has it, 0.1 to 0.5 in their scripts; smaller for higher sparsities.
        level: `block` gives all matrices of a block the mean of their α, as the authors do; `matrix` each its own,
            which mostly tells the kinds of matrices apart.
        aspect: 0 for whole matrices; from 1 on, α is that of the squared singular values of sub-matrices whose sides
            have this ratio (FARMS, Hu et al. 2025, who use 1), so that shapes do not matter.
        compat: `exact` keeps every sparsity in [0, 0.99]; `reference` multiplies as published, and refuses where that
            removes more than there is. For all of the published code also set `fit=peak_compat`.
    """

    fit: Fit = "peak"
    span: float = 0.3
    level: Level = "block"
    aspect: float = 0.0
    compat: Compat = "exact"

    paper: ClassVar[str] = "Lu et al. 2024, arXiv:2410.10912"
    needs = frozenset[type]()
    foreseeable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: if span is outside [0, 1), aspect is neither 0 nor at least 1, or a word is unknown.
        """
        if not 0 <= self.span < 1:
            raise RecipeError(f"allocation.span is {self.span:g}; it must be in [0, 1) (the authors use 0.1 to 0.5).")
        if self.aspect != 0 and not 1 <= self.aspect < math.inf:
            raise RecipeError(
                f"allocation.aspect is {self.aspect:g}; it must be 0, for whole matrices, or at least 1 (FARMS uses 1)."
            )
        for name, words in (("fit", get_args(Fit)), ("level", get_args(Level)), ("compat", get_args(Compat))):
            word = getattr(self, name)
            if word not in words:
                raise RecipeError(f"allocation.{name} is {word!r}.{near(word, words)}")

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity.

        Raises:
            RecipeError: if the target is above 0.99; with `compat=reference`, if a sparsity would be above 1.
        """
        alphas = self._by_site(survey.sites, survey.measure(self.exponents))
        wanted = self._spread(alphas)
        if self.compat == "reference":
            return self._published(survey.sites, wanted, sparsity)
        return scale(wanted, {site.name: site.size for site in survey.sites}, sparsity)

    def exponents(self, matrices: list[Matrix], stats: Mapping[str, SiteStats]) -> Tensor:
        """α of each matrix, float64; NaN where there is no tail. Those of weights seen before come from the cache."""
        folder = default_cache() / "spectra"
        found = []
        for matrix in matrices:
            key = fingerprint(matrix.weight, _VERSION, self.fit, self.aspect)
            found.append(remembered(folder, key, lambda weight=matrix.weight: self._exponent(weight)))
        return torch.tensor(found, dtype=torch.float64)

    def _exponent(self, weight: Tensor) -> float:
        return tail_exponent(eigenvalues(weight, self.aspect), self.fit)

    def _by_site(self, sites: Sequence[SiteInfo], found: Mapping[str, Tensor]) -> dict[str, float]:
        """α by site; where there is none, the mean of the block, then of the model, then 1."""
        model = _mean([value for values in found.values() for value in values.tolist()], 1.0)
        alphas = {}
        for block, values in found.items():
            mean = _mean(values.tolist(), model)
            names = [site.name for site in sites if site.block == block]
            for name, value in zip(names, values.tolist(), strict=True):
                alphas[name] = mean if self.level == "block" or math.isnan(value) else value
        return {site.name: alphas[site.name] for site in sites}

    def _spread(self, alphas: Mapping[str, float]) -> dict[str, float]:
        """1 - span for the least α to 1 + span for the greatest; 1 for all if they are equal."""
        low, high = min(alphas.values(), default=1.0), max(alphas.values(), default=1.0)
        if high - low <= _EQUAL * high:
            return dict.fromkeys(alphas, 1.0)
        return {name: 1 + self.span * (2 * (value - low) / (high - low) - 1) for name, value in alphas.items()}

    def _published(self, sites: Sequence[SiteInfo], wanted: Mapping[str, float], sparsity: float) -> dict[str, float]:
        """t·r_i with t = s·Σ n_i / Σ n_i·r_i, if that is at most 1 everywhere."""
        total = sum(site.size for site in sites)
        mean = sum(site.size * wanted[site.name] for site in sites) / max(total, 1)
        budget = {site.name: sparsity * wanted[site.name] / mean for site in sites}
        worst = max(sites, key=lambda site: budget[site.name])
        if budget[worst.name] > 1:
            # s·(1 + span) <= 1 + span·z, with z the mean of (r_i - 1) / span.
            fits = (1 - sparsity) / (sparsity - (mean - 1) / self.span)
            raise RecipeError(
                f"{worst.block if self.level == 'block' else worst.name}: the published formula asks for a sparsity of"
                f" {budget[worst.name]:.4f}, {budget[worst.name] - 1:.2g} above 1. Set allocation.span to at most"
                f" {math.floor(1000 * fits) / 1000:g}, or leave out compat=reference: then none is above 0.99."
            )
        return budget


def _mean(values: Sequence[float], otherwise: float) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else otherwise
