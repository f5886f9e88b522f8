"""Updates: how the kept weights make up for the lost ones. A new one is a file here and a row in `UPDATES`."""

from __future__ import annotations

from prunus.updates.admm import ADMM
from prunus.updates.dsnot import DSnoT
from prunus.updates.keep import Keep
from prunus.updates.least_squares import LeastSquares
from prunus.updates.obs_sweep import OBSSweep
from prunus.updates.update import Choose, Update

UPDATES: dict[str, Update] = {
    "keep": Keep(),
    "obs": OBSSweep(),
    "lsq": LeastSquares(),
    "admm": ADMM(),
    "dsnot": DSnoT(),
}

__all__ = ["ADMM", "UPDATES", "Choose", "DSnoT", "Keep", "LeastSquares", "OBSSweep", "Update"]
