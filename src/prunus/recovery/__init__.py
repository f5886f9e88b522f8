"""Ways back to quality after pruning that keep the zeros."""

from __future__ import annotations

from prunus.recovery.reconstruct import Reconstruct
from prunus.recovery.recovery import Outcome, Recovery

# Name → the recovery with its default hyper-parameters.
RECOVERIES: dict[str, Recovery] = {
    "reconstruct": Reconstruct(),
}

__all__ = ["RECOVERIES", "Outcome", "Recovery"]
