"""What there is to choose from, as data for `prunus methods`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from prunus.allocations import ALLOCATIONS
from prunus.methods import METHODS
from prunus.methods.compose import compose
from prunus.metrics import METRICS
from prunus.patterns import NM, Capped, Unstructured
from prunus.presets import PRESETS, Preset
from prunus.updates import UPDATES

_EXAMPLES = {"unstructured": Unstructured(), "N:M": NM(), "capped:K/M": Capped()}


def rows() -> list[dict[str, Any]]:
    """One row per name, from the registries.

    Returns:
        Dictionaries with `name`, `kind` (preset, method, metric, update, pattern, allocation), `paper` (empty if
        none), `needs` (names of statistics) and `defaults` (hyper-parameter -> value; for a method the names of its
        parts, for a preset what it stands for), and for a preset its `purpose`. The kinds recovery and objective
        follow: what `prunus recover` trains, and what it minimises.
    """
    kinds = {"method": METHODS, "metric": METRICS, "update": UPDATES, "pattern": _EXAMPLES, "allocation": ALLOCATIONS}
    presets = [_preset(name, one) for name, one in PRESETS.items()]
    parts = [_row(name, kind, part) for kind, table in kinds.items() for name, part in table.items()]
    return presets + parts + _recoveries()


def _preset(name: str, preset: Preset) -> dict[str, Any]:
    method, allocation = compose(
        preset.method, update=preset.update, allocation=preset.allocation, settings=preset.settings
    )
    needs = sorted(statistic.__name__ for statistic in method.needs | allocation.needs)
    update = {"update": preset.update} if preset.update else {}
    defaults = {"method": preset.method, **update, "allocation": preset.allocation, **preset.settings}
    return {
        "name": name, "kind": "preset", "paper": method.paper, "needs": needs, "defaults": defaults,
        "purpose": preset.purpose,
    }  # fmt: skip


def _recoveries() -> list[dict[str, Any]]:
    from prunus.recovery import RECOVERIES
    from prunus.recovery.objectives import OBJECTIVES
    from prunus.recovery.settings import defaults

    kinds: dict[str, Any] = {"recovery": RECOVERIES, "objective": OBJECTIVES}
    return [
        {"name": name, "kind": kind, "paper": part.paper, "needs": [], "defaults": defaults(part)}
        for kind, table in kinds.items()
        for name, part in table.items()
    ]


def _row(name: str, kind: str, part: Any) -> dict[str, Any]:
    defaults = {item.name: getattr(part, item.name) for item in fields(part) if item.name != "paper"}
    if kind == "method":
        defaults = {axis: str(value) for axis, value in defaults.items()}
    needs = sorted(statistic.__name__ for statistic in getattr(part, "needs", ()))
    return {"name": name, "kind": kind, "paper": part.paper, "needs": needs, "defaults": defaults}
