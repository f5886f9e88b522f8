"""Allocations: how the wanted sparsity is divided over the sites. A new one is a file here and a row below."""

from __future__ import annotations

from prunus.allocations.allocation import Allocation, Measure, Survey
from prunus.allocations.alpha import AlphaPruning
from prunus.allocations.dlp import DLP
from prunus.allocations.ecoflap import ECoFLaP
from prunus.allocations.er import ErdosRenyi
from prunus.allocations.global_magnitude import GlobalMagnitude
from prunus.allocations.lamp import LAMP
from prunus.allocations.manual import Manual
from prunus.allocations.owl import OWL
from prunus.allocations.project import project, scale
from prunus.allocations.search import Search
from prunus.allocations.uniform import Uniform

ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Uniform(),
    "owl": OWL(),
    "dlp": DLP(),
    "alphapruning": AlphaPruning(),
    "lamp": LAMP(),
    "er": ErdosRenyi(),
    "ecoflap": ECoFLaP(),
    "search": Search(),
    "manual": Manual(),
    "global_magnitude": GlobalMagnitude(),
}

__all__ = [
    "ALLOCATIONS",
    "DLP",
    "LAMP",
    "OWL",
    "Allocation",
    "AlphaPruning",
    "ECoFLaP",
    "ErdosRenyi",
    "GlobalMagnitude",
    "Manual",
    "Measure",
    "Search",
    "Survey",
    "Uniform",
    "project",
    "scale",
]
