"""From the names and settings of a recipe to the parts that do the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from prunus.allocations import ALLOCATIONS, Allocation
from prunus.errors import RecipeError, near
from prunus.methods import METHODS, Elementwise, Shape
from prunus.methods.shape import Uneven
from prunus.metrics import METRICS
from prunus.patterns import parse
from prunus.updates import UPDATES

Setting = str | float | int | bool
Part = TypeVar("Part")
_AXES = ("metric", "pattern", "update", "allocation")
# Fields of methods that are no settings.
_PARTS = ("paper", "score", "ranking", "choice")


def compose(
    method: str,
    *,
    metric: str | None = None,
    update: str | None = None,
    pattern: str = "unstructured",
    allocation: str = "uniform",
    settings: Mapping[str, Setting] | None = None,
    compat: Literal["exact", "reference"] = "exact",
    portable: bool = False,
) -> tuple[Elementwise | Shape, Allocation]:
    """A method and an allocation, by name.

    A hyper-parameter that metric and update both have (`damp`) and that is set for one of them is set for both.

    Args:
        method: a key of `METHODS`.
        metric: a key of `METRICS`, instead of the method's own.
        update: a key of `UPDATES`, instead of the method's own.
        pattern: `unstructured` (row or matrix as the method says), `N:M` or `capped:K/M`.
        allocation: a key of `ALLOCATIONS`.
        settings: `axis.field` -> value, such as `{"update.block": 64}`; text is read as the type of the field.
        compat: `reference` makes every part follow the published code where that differs from what it promises.
        portable: a method that may give blocks different shapes shall give all of them one.

    Raises:
        RecipeError: for an unknown name, setting or value, or if no part knows `compat="reference"`.
    """
    base = _look_up("method", method, METHODS)
    if isinstance(base, Shape):
        _refuse_axes(method, metric=metric, update=update, pattern=pattern, allocation=allocation)
        made = shaped(base, settings or {}, compat)
        if portable and "ranks" in made.touches:
            raise RecipeError(
                f"--portable: no stock class holds a matrix as two factors, and {method} makes two of it. Leave it "
                "out; prunus export --portable multiplies the factors back, at no gain."
            )
        return made.even() if portable and isinstance(made, Uneven) else made, ALLOCATIONS["uniform"]
    if portable:
        raise RecipeError(
            f"--portable is about tensors that get smaller, and {method} only sets weights to zero: the result loads "
            "wherever the model does. Leave it out."
        )
    parts: dict[str, Any] = {
        "metric": base.metric if metric is None else _look_up("metric", metric, METRICS),
        "pattern": parse(pattern) or base.pattern,
        "update": base.update if update is None else _look_up("update", update, UPDATES),
        "allocation": _look_up("allocation", allocation, ALLOCATIONS),
    }
    if "method.round_to" in (settings or {}):
        raise RecipeError(f"--round-to is about tensors that get smaller, and {method} only sets weights to zero.")
    wanted = _by_axis(settings or {})
    if compat != "exact":
        _ask(compat, wanted, parts)
    parts = {axis: _set(axis, part, wanted[axis]) for axis, part in parts.items()}
    shared = _shared(wanted, parts)
    parts = {axis: _set(axis, part, shared.get(axis, {})) for axis, part in parts.items()}
    paper = base.paper if metric is None and update is None else ""
    return Elementwise(parts["metric"], parts["pattern"], parts["update"], paper), parts["allocation"]


def _look_up(kind: str, name: str, table: Mapping[str, Part]) -> Part:
    if name not in table:
        raise RecipeError(f"There is no {kind} {name!r}.{near(name, table)}")
    return table[name]


def _refuse_axes(method: str, **given: str | None) -> None:
    """See that no other part is asked for with a method that removes whole groups or blocks."""
    usual = {"pattern": "unstructured", "allocation": "uniform"}
    for axis, name in given.items():
        if name != usual.get(axis):
            raise RecipeError(
                f"--{axis} {name} has no meaning with {method}, which makes tensors smaller and divides the "
                "sparsity itself. Leave it out."
            )


def shaped(base: Shape, settings: Mapping[str, Setting], compat: str) -> Shape:
    """A method that makes shapes smaller, with its settings: `method.`, `score.`, `ranking.` or `choice.field`."""
    axes = ("method", *(axis for axis in ("score", "ranking", "choice") if hasattr(base, axis)))
    wanted = _by_axis(settings, axes)
    parts = {axis: base if axis == "method" else getattr(base, axis) for axis in axes}
    if compat != "exact":
        _ask(compat, wanted, parts)
    for axis in axes[1:]:
        base = replace(base, **{axis: _set(axis, parts[axis], wanted[axis])})  # type: ignore[type-var]
    return _set("method", base, wanted["method"])


def _by_axis(settings: Mapping[str, Setting], axes: tuple[str, ...] = _AXES) -> dict[str, dict[str, Setting]]:
    """Settings sorted by axis."""
    wanted: dict[str, dict[str, Setting]] = {axis: {} for axis in axes}
    for key, value in settings.items():
        axis, _, field = key.partition(".")
        if axis not in wanted or not field:
            raise RecipeError(f"Setting {key!r} must be axis.field, such as update.damp.{near(axis, axes)}")
        wanted[axis][field] = value
    return wanted


def _names(part: Any) -> list[str]:
    return [item.name for item in fields(part) if item.name not in _PARTS]


def _shared(wanted: Mapping[str, Mapping[str, Setting]], parts: Mapping[str, Any]) -> dict[str, dict[str, Setting]]:
    """What was set for only one of metric and update, for the other, where that has it too."""
    return {
        other: {
            field: value
            for field, value in wanted[one].items()
            if field in _names(parts[other]) and field not in wanted[other] and field != "compat"
        }
        for one, other in (("metric", "update"), ("update", "metric"))
    }


def _ask(compat: str, wanted: dict[str, dict[str, Setting]], parts: Mapping[str, Any]) -> None:
    """Ask in place every part that can for the published behaviour."""
    able = [axis for axis, part in parts.items() if "compat" in _names(part)]
    if not able:
        raise RecipeError(
            f"compat: {compat} changes nothing here: no part of this combination differs from its published code."
            " Leave it out."
        )
    for axis in able:
        wanted[axis].setdefault("compat", compat)


def _set(axis: str, part: Part, values: Mapping[str, Setting]) -> Part:
    """The part with these fields, read as their types."""
    types = get_type_hints(type(part))
    typed = {}
    for field, value in values.items():
        if field not in _names(part):
            known = near(field, _names(part)) if _names(part) else " It has no settings."
            raise RecipeError(f"{axis} {type(part).__name__} has no setting {field!r}.{known}")
        try:
            typed[field] = TypeAdapter(types[field]).validate_python(value)
        except ValidationError as error:
            raise RecipeError(f"{axis}.{field} = {value!r}: {error.errors()[0]['msg']}.") from error
    return replace(part, **typed)  # type: ignore[type-var]
