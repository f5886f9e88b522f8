"""Turns pydantic's list of errors into sentences: what is wrong, where, what was given, what would be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from prunus.errors import near

# Keys of a JSON schema that bound a number, in words.
_BOUNDS = (
    ("minimum", "at least"),
    ("exclusiveMinimum", "more than"),
    ("exclusiveMaximum", "below"),
    ("maximum", "at most"),
)


def explain(error: ValidationError, schema: Mapping[str, Any], source: str, names: Mapping[str, str]) -> str:
    """One sentence for each error, one to a line.

    Args:
        error: what pydantic found.
        schema: JSON schema of the model that refused; ranges and known keys are read from it.
        source: the file, put in front where the user did not write the value as an option.
        names: dotted place -> the name under which the user wrote it.
    """
    sentences = []
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"])
        prefix = f"{source}: " if source and place not in names else ""
        sentences.append(prefix + _sentence(item, schema, names.get(place, place)))
    return "\n".join(sentences)


def _sentence(item: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> str:
    if item["type"] == "sentence":
        return f"{item['msg']}."
    if item["type"] == "extra_forbidden":
        return _unknown(item["loc"], schema)
    node = _node(schema, item["loc"])
    if item["type"] == "missing":
        return f"{where} is missing: give {node.get('description', _expected(node))}."
    hint = f" ({node['description']})" if "description" in node else ""
    return f"{where} must be {_expected(node)}, not {_given(item['input'])}{_percent(node, item['input'])}{hint}."


def _percent(node: Mapping[str, Any], value: Any) -> str:
    """`; for 50 % write 0.5` where a share was given as a percentage."""
    try:
        number = float(str(value).strip().removesuffix("%"))
    except ValueError:
        return ""
    share = node.get("type") == "number" and node.get("exclusiveMaximum") == 1
    return f"; for {number:g} % write {number / 100:g}" if share and 1 < number < 100 else ""


def _unknown(place: tuple[str | int, ...], schema: Mapping[str, Any]) -> str:
    """An unknown key: the section it belongs in, if another one knows it, or the nearest known."""
    *parents, key = place
    part = ".".join(map(str, parents))
    known = _node(schema, tuple(parents)).get("properties", {})
    inside = f" under `{part}`" if part else ""
    for section, node in schema["properties"].items():
        if section != part and str(key) in _resolve(schema, node).get("properties", {}):
            return f"There is no `{key}`{inside}; it belongs under `{section}`."
    if str(key) in schema["properties"]:
        return f"There is no `{key}`{inside}; it belongs at the top of the recipe."
    return f"There is no `{key}`{inside}.{near(str(key), known)}"


def _resolve(schema: Mapping[str, Any], node: Mapping[str, Any]) -> Mapping[str, Any]:
    """The node behind `$ref`; of `anyOf` with null, the part that is not null. Its own description wins."""
    choices = [part for part in node.get("anyOf", ()) if part.get("type") != "null"]
    if len(choices) == 1:
        node = {**_resolve(schema, choices[0]), **{key: node[key] for key in ("description",) if key in node}}
    if "$ref" in node:
        target = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    return node


def _node(schema: Mapping[str, Any], place: tuple[str | int, ...]) -> Mapping[str, Any]:
    node: Mapping[str, Any] = schema
    for key in place:
        node = _resolve(schema, node)
        if "properties" in node:
            node = node["properties"].get(key, {})
        elif "items" in node:
            node = node["items"]
    return _resolve(schema, node)


def _expected(node: Mapping[str, Any]) -> str:
    """`{"type": "number", "minimum": 0, "exclusiveMaximum": 1}` -> "a number of at least 0 and below 1"."""
    if "expected" in node:
        return node["expected"]
    if "enum" in node:
        return " or ".join(", ".join(map(str, node["enum"])).rsplit(", ", 1))
    kinds = {"number": "a number", "integer": "a whole number", "boolean": "true or false", "array": "a list"}
    kinds |= {"object": "a mapping", "string": "text"}
    # Seeds reach up to 2**63: a bound that nobody meets would only make the sentence longer.
    bounds = [f"{word} {node[key]:g}" for key, word in _BOUNDS if key in node and node[key] < 2**62]
    return kinds.get(node.get("type", ""), "text") + (f" of {' and '.join(bounds)}" if bounds else "")


def _given(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
