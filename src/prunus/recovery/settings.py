"""Hyper-parameters by name, put into the frozen dataclasses of a recovery."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from prunus.errors import RecipeError, near

Value = str | int | float | bool
Part = TypeVar("Part")


def configure(part: Part, settings: Mapping[str, Value]) -> Part:
    """A recovery with other hyper-parameters.

    `field` sets a field of the recovery, or, if it has none of that name, of every part of it that has one;
    `part.field` sets it in the part of that name alone.

    Args:
        part: a frozen dataclass; its parts are dataclasses with a `name` in its fields, alone or in tuples.
        settings: name → value; text is read as the type of the field.

    Raises:
        RecipeError: an unknown name, with the nearest known ones, or a value out of range.
    """
    known = names(part)
    for key in settings:
        if key not in known:
            raise RecipeError(f"There is no setting {key!r} in this recovery.{near(key, known)}")
    own = {key: value for key, value in settings.items() if key in _fields(part)}
    inner = {key: value for key, value in settings.items() if key not in own}
    changed: dict[str, Any] = {name: _typed(part, name, value) for name, value in own.items()}
    for name in (item.name for item in fields(part) if item.name not in own):  # type: ignore[arg-type]
        value = getattr(part, name)
        if isinstance(value, tuple) and any(_is_part(item) for item in value):
            changed[name] = tuple(_inner(item, inner) for item in value)
        elif _is_part(value):
            changed[name] = _inner(value, inner)
    return replace(part, **changed)  # type: ignore[type-var]


def names(part: Any) -> list[str]:
    """Every name that `configure` takes."""
    found = list(_fields(part))
    for inner in parts(part):
        found += [f"{inner.name}.{name}" for name in _fields(inner)] + list(_fields(inner))
    return sorted(set(found))


def defaults(part: Any) -> dict[str, Any]:
    """Setting → default, parts' fields under `part.field`."""
    found = {name: getattr(part, name) for name in _fields(part)}
    return found | {f"{inner.name}.{name}": getattr(inner, name) for inner in parts(part) for name in _fields(inner)}


def parts(part: Any) -> list[Any]:
    """The parts that a recovery is made of."""
    found = []
    for item in fields(part):
        value = getattr(part, item.name)
        found += [inner for inner in (value if isinstance(value, tuple) else (value,)) if _is_part(inner)]
    return found


def _is_part(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type) and hasattr(value, "name")


def _fields(part: Any) -> list[str]:
    """Fields that a user may set: neither parts nor the paper."""
    plain = []
    for item in fields(part):
        value = getattr(part, item.name)
        inner = _is_part(value) or (isinstance(value, tuple) and any(_is_part(one) for one in value))
        if item.name != "paper" and not inner:
            plain.append(item.name)
    return plain


def _inner(part: Any, settings: Mapping[str, Value]) -> Any:
    if not _is_part(part):
        return part
    wanted = {key.removeprefix(f"{part.name}."): value for key, value in settings.items()}
    return replace(part, **{key: _typed(part, key, value) for key, value in wanted.items() if key in _fields(part)})


def _typed(part: Any, name: str, value: Value) -> Any:
    try:
        return TypeAdapter(get_type_hints(type(part))[name]).validate_python(value)
    except ValidationError as error:
        raise RecipeError(f"{name} = {value!r}: {error.errors()[0]['msg']}.") from error
