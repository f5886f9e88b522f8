"""Metrics: which weights of a matrix matter. A new one is a file here and a row in `METRICS`."""

from __future__ import annotations

from prunus.metrics.gblm import GBLM
from prunus.metrics.magnitude import Magnitude
from prunus.metrics.metric import Metric, Scorer
from prunus.metrics.obs import OBS
from prunus.metrics.regional import Regional
from prunus.metrics.ria import RIA
from prunus.metrics.taylor import Taylor
from prunus.metrics.wanda import Wanda

METRICS: dict[str, Metric] = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "obs": OBS(),
    "ria": RIA(),
    "gblm": GBLM(),
    "regional": Regional(),
    "taylor": Taylor(),
}

__all__ = ["GBLM", "METRICS", "OBS", "RIA", "Magnitude", "Metric", "Regional", "Scorer", "Taylor", "Wanda"]
