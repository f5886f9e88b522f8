"""Allocations: how the wanted sparsity is divided over the sites. A new one is a file here and a row below."""

from __future__ import annotations

from prunus.allocations.allocation import Allocation, Measure, Survey
from prunus.allocations.global_magnitude import GlobalMagnitude
from prunus.allocations.manual import Manual
from prunus.allocations.owl import OWL
from prunus.allocations.project import project
from prunus.allocations.uniform import Uniform

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Uniform(),
    "owl": OWL(),
    "manual": Manual(),
    "global_magnitude": GlobalMagnitude(),
}

__all__ = ["ALLOCATIONS", "OWL", "Allocation", "GlobalMagnitude", "Manual", "Measure", "Survey", "Uniform", "project"]
