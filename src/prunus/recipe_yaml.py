"""YAML as recipes use it: safe, YAML 1.2 numbers, no key twice, paths beside the file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from prunus.errors import RecipeError

LARGEST_BYTES = 1_000_000
DATA_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".npy", ".npz", ".gz", ".gguf", ".yaml", ".yml")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 2:4 as 124, 1e-3 as text and `no` as false; recipes follow YAML 1.2, which does not."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - replaces PyYAML's own table, whole
        first: [(tag, pattern) for tag, pattern in rows if tag.endswith((":null", ":merge"))]
        for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^(?:[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN))$"),
    list("-+.0123456789"),
)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # 010 is ten, not eight


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    return float(
        loader.construct_scalar(node)
        .replace(".inf", "inf")
        .replace(".Inf", "inf")
        .replace(".nan", "nan")
        .replace(".NaN", "nan")
    )


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: the file is missing, unreadable, too large, not YAML, repeats a key or is not a mapping.
    """
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise RecipeError(f"{path} has more than {LARGEST_BYTES:,} bytes; a recipe is a page of YAML.")
        data = yaml.load(path.read_text("utf-8"), _Loader)
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe {path}.") from None
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not text in UTF-8; a recipe is YAML.") from None
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply for a recipe.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{path} is not valid YAML: {_where(error)}.") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RecipeError(f"{path} must hold a mapping such as `model: smollm2`, not {_kind(data)}.")
    return data


def _where(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}" if mark else problem


def _kind(data: Any) -> str:
    return {type(None): "nothing", list: "a list", str: "text", dict: "a mapping with keys that are not words"}.get(
        type(data), repr(data)
    )


def scalar(text: str) -> str | int | float | bool:
    """One value as YAML reads it: `0.01` a number, `true` a truth value, anything else text."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, str | int | float) else text


def beside(data: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of a recipe relative to the folder that the recipe lies in, in place.

    A model or a text may be a name instead of a path: it counts as a path if it begins with a dot, ends as a data
    file does, or exists beside the recipe.
    """
    _join(data, "out", folder, always=True)
    _join(data, "model", folder)
    _join(data.get("calibration"), "source", folder)
    _join(data.get("recover"), "text", folder)
    _join(data.get("recover"), "dense", folder)
    _join(data.get("evaluate"), "text", folder)
    _join(data.get("evaluate"), "task_data", folder, always=True)
    prune = data.get("prune")
    if isinstance(prune, Mapping):
        _join(prune.get("settings"), "allocation.file", folder, always=True)
        _join(prune.get("allocation"), "file", folder, always=True)


def _join(part: Any, key: str, folder: Path, always: bool = False) -> None:
    if not isinstance(part, dict) or not isinstance(part.get(key), str) or not part[key]:
        return
    value = str(Path(part[key]).expanduser()) if part[key].startswith("~") else part[key]
    named = value.startswith(".") or value.endswith(DATA_SUFFIXES) or (folder / value).exists()
    if Path(value).is_absolute() or always or named:
        part[key] = os.path.normpath(folder / value)


def dump_yaml(data: Mapping[str, Any]) -> str:
    """YAML text in the order of the mapping; what another YAML reader could misread is quoted."""
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=100)
