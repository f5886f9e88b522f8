"""Sparsities from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

import yaml

from prunus.allocations.allocation import Survey
from prunus.errors import RecipeError, near
from prunus.sites import SiteInfo


@dataclass(frozen=True)
class Manual:
    """What the file says for the sites it names, the recipe's sparsity for all others.

    The file maps globs to sparsities, in YAML or JSON:

        "model.layers.0": 0            # a block: all its sites
        "*.down_proj": 0.4             # sites by name
        "model.layers.1.*": 0.7

    A glob is held against the names of sites and of blocks. Of several that fit, the last one counts. The numbers are
    taken as they are, so the model as a whole need not come out at the recipe's sparsity.

    Attributes:
        file: path of the file.
    """

    file: str = ""

    paper: ClassVar[str] = ""
    needs = frozenset[type]()
    foreseeable: ClassVar[bool] = True

    def divide(self, survey: Survey, sparsity: float) -> dict[str, float]:
        """Site name -> sparsity.

        Raises:
            RecipeError: if the file is missing or no such mapping, a sparsity is outside [0, 1), or a glob fits
                nothing.
        """
        wanted = self._read()
        for glob in wanted:
            if not any(_fits(site, glob) for site in survey.sites):
                names = {site.block for site in survey.sites} | {site.name for site in survey.sites}
                raise RecipeError(f"{self.file}: {glob!r} fits no block and no site.{_some(glob, names)}")
        budget = dict.fromkeys((site.name for site in survey.sites), sparsity)
        for glob, value in wanted.items():
            budget.update({site.name: value for site in survey.sites if _fits(site, glob)})
        return budget

    def _read(self) -> dict[str, float]:
        """The file, checked."""
        if not self.file:
            raise RecipeError("Allocation manual needs a file: --set allocation.file=ratios.yaml, glob -> sparsity.")
        try:
            content = yaml.safe_load(Path(self.file).read_text(encoding="utf-8"))  # JSON is YAML
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise RecipeError(f"{self.file} cannot be read as YAML or JSON: {error}") from error
        if not isinstance(content, Mapping) or not content:
            raise RecipeError(f'{self.file} must map globs to sparsities, such as "model.layers.0.*": 0.3')
        for glob, value in content.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not isinstance(glob, str) or not number or not 0 <= value < 1:
                raise RecipeError(
                    f"{self.file}: {glob!r}: {value!r} must be a name and the fraction removed, in [0, 1)."
                )
        return {glob: float(value) for glob, value in content.items()}


def _fits(site: SiteInfo, glob: str) -> bool:
    return fnmatchcase(site.name, glob) or fnmatchcase(site.block, glob)


def _some(glob: str, names: set[str]) -> str:
    """Near names, without the list of all, which may be thousands."""
    return near(glob, names).split(" Known:")[0] + f" An example: {min(names, default='none')}."
