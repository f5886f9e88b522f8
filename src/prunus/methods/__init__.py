"""Methods: published combinations of a metric, a pattern and an update. A new one is a row in `METHODS`."""

from __future__ import annotations

from prunus.methods.elementwise import Elementwise
from prunus.metrics import GBLM, OBS, RIA, Magnitude, Regional, Wanda
from prunus.patterns import Unstructured
from prunus.updates import ADMM, DSnoT, OBSSweep

METHODS: dict[str, Elementwise] = {
    "magnitude": Elementwise(Magnitude(), Unstructured("matrix"), paper=Magnitude.paper),
    "wanda": Elementwise(Wanda(), Unstructured("row"), paper=Wanda.paper),
    "sparsegpt": Elementwise(OBS(), Unstructured("matrix"), OBSSweep(), paper=OBSSweep.paper),
    "alps": Elementwise(Wanda(), Unstructured("matrix"), ADMM(), paper=ADMM.paper),
    "dsnot": Elementwise(Wanda(), Unstructured("row"), DSnoT(), paper=DSnoT.paper),
    "ria": Elementwise(RIA(), Unstructured("row"), paper=RIA.paper),
    "gblm": Elementwise(GBLM(), Unstructured("row"), paper=GBLM.paper),
    "wanda++": Elementwise(Regional(), Unstructured("row"), paper=Regional.paper),
}

__all__ = ["METHODS", "Elementwise"]
