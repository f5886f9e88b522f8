"""Methods: published combinations of a metric, a pattern and an update. A new one is a row in `METHODS`."""

from __future__ import annotations

from prunus.methods.elementwise import Elementwise
from prunus.metrics import OBS, RIA, Magnitude, Wanda
from prunus.patterns import Unstructured
from prunus.updates import OBSSweep

METHODS: dict[str, Elementwise] = {
    "magnitude": Elementwise(Magnitude(), Unstructured("matrix"), paper=Magnitude.paper),
    "wanda": Elementwise(Wanda(), Unstructured("row"), paper=Wanda.paper),
    "sparsegpt": Elementwise(OBS(), Unstructured("matrix"), OBSSweep(), paper=OBSSweep.paper),
    "ria": Elementwise(RIA(), Unstructured("row"), paper=RIA.paper),
}

__all__ = ["METHODS", "Elementwise"]
