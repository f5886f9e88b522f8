"""The Python file that is put beside the weights of a model whose blocks differ, and the keys that it reads.

It is written from a template, so that prunus can tell its own file from any other: byte for byte. A template that was
released never changes; a better one gets the next number, and folders say which one they were written from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "modeling_pruned.py"
PREFIX = "pruned_"  # of `model_type`
KEY = "pruned"  # of config.json: {"template": number, "blocks": path, "biases": [...], "ranks": {matrix: rank}}

_FIRST = '''"""{base} with every block at its own widths, as `per_layer_config` in config.json says.

Written by prunus. Nothing is overridden but the building of blocks: forward passes, cache and generation are those of
transformers.
"""

import logging

import torch
from torch import nn
from transformers import {config}, {base}
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

# Tensors on disk are named and split as those of {kind}.
if mapping := get_checkpoint_conversion_mapping("{kind}"):
    register_checkpoint_conversion_mapping("{prefix}{kind}", mapping, overwrite=True)

# Global sizes are read while the whole is built, before its blocks get their own; there is nothing to warn of.
logging.getLogger("transformers.integrations.heterogeneity.configuration_utils").setLevel(logging.ERROR)


class Pruned{config}({config}):
    model_type = "{prefix}{kind}"

    def __init__(self, **kwargs):
        # Values that differ between blocks may be read from the whole: they are the dense model's.
        self.allow_global_per_layer_attribute_access = True
        super().__init__(**kwargs)

    def validate_architecture(self):
        """Blocks without some heads are what this class is for, so no number of heads must divide another."""


class Pruned{base}({base}):
    config_class = Pruned{config}

    def __init__(self, config):
        super().__init__(config)
        shape = config.{key}
        blocks = self.get_submodule(shape["blocks"])
        for index in range(len(blocks)):
            blocks[index] = type(blocks[index])(config.per_layer_config[index], index)
        for name in shape["biases"]:
            linear = self.get_submodule(name)
            linear.bias = nn.Parameter(torch.zeros(linear.out_features))
{factors}        self.post_init()


Pruned{config}.register_for_auto_class()
Pruned{base}.register_for_auto_class("AutoModelForCausalLM")
'''
TEMPLATES = {1: _FIRST}
NEWEST = max(TEMPLATES)

# Put into the template where matrices were split; without it the file is what it was before there were any.
FACTORS = """        for name, rank in shape["ranks"].items():
            dense = self.get_submodule(name)
            columns, rows = (dense.nx, dense.nf) if hasattr(dense, "nf") else (dense.in_features, dense.out_features)
            pair = nn.Sequential()
            pair.add_module("inner", nn.Linear(columns, rank, bias=False))
            pair.add_module("outer", nn.Linear(rank, rows, bias=dense.bias is not None))
            parent, _, last = name.rpartition(".")
            setattr(self.get_submodule(parent), last, pair)
"""


def source(config: dict[str, Any]) -> str:
    """The file for a config.json made by `describe`.

    Raises:
        KeyError: it names a template that this prunus does not know.
    """
    base = str(config["architectures"][0]).removeprefix("Pruned")
    kind = str(config["model_type"]).removeprefix(PREFIX)
    settings = str(config["auto_map"]["AutoConfig"]).rpartition(".")[2].removeprefix("Pruned")
    template = TEMPLATES[config[KEY].get("template", 1)]  # the first folders did not say
    factors = FACTORS if config[KEY].get("ranks") else ""
    return template.format(base=base, config=settings, kind=kind, prefix=PREFIX, key=KEY, factors=factors)


def describe(
    config: dict[str, Any], settings: str, shape: dict[str, Any], per_layer: dict[str, dict]
) -> dict[str, Any]:
    """config.json of a model of unequal blocks.

    Args:
        config: config.json with the dense model's sizes.
        settings: name of the configuration's class.
        shape: what stands under `KEY`.
        per_layer: transformers' `per_layer_config`.
    """
    base = config["architectures"][0]
    module = FILE.removesuffix(".py")
    return {
        **config,
        "architectures": [f"Pruned{base}"],
        "model_type": f"{PREFIX}{config['model_type']}",
        "auto_map": {
            "AutoConfig": f"{module}.Pruned{settings}",
            "AutoModelForCausalLM": f"{module}.Pruned{base}",
        },
        "per_layer_config": per_layer,
        KEY: {"template": NEWEST, **shape},
    }


def is_described(config: Mapping[str, Any]) -> bool:
    """Whether config.json was made by `describe`; a third party's `auto_map` alone does not make it so."""
    return str(config.get("model_type", "")).startswith(PREFIX)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `describe`: config.json with the dense model's sizes and of its own class."""
    if not is_described(config):
        return dict(config)
    dropped = ("auto_map", "per_layer_config", KEY)
    base = {name: value for name, value in config.items() if name not in dropped}
    base["architectures"] = [str(config["architectures"][0]).removeprefix("Pruned")]
    base["model_type"] = str(config["model_type"]).removeprefix(PREFIX)
    return base


def ours(folder: Path) -> bool:
    """`is_ours` of a folder by itself; False if it has no configuration."""
    try:
        return is_ours(folder, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def is_ours(folder: Path, config: dict[str, Any]) -> bool:
    """True if all code that the folder can bring in is, byte for byte, the file that prunus ships.

    Trust in a folder is trust in all of it, so nothing else may be there that transformers would run: no other Python
    file, no folder of a generation of its own, no code named by the tokenizer.
    """
    if not is_described(config) or any(path != folder / FILE for path in folder.rglob("*.py")):
        return False
    try:
        expected = source(config)
        found = (folder / FILE).read_text(encoding="utf-8")
        settings = config["auto_map"]["AutoConfig"].rpartition(".")[2]
        base = config["architectures"][0]
        others = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*_config.json")]
    except (KeyError, IndexError, TypeError, AttributeError, OSError, ValueError):
        return False
    module = FILE.removesuffix(".py")
    named = {"AutoConfig": f"{module}.{settings}", "AutoModelForCausalLM": f"{module}.{base}"}
    plain_names = all(name.isidentifier() for name in (settings, base, str(config["model_type"])))
    quiet = not any(isinstance(other, dict) and "auto_map" in other for other in others)
    return found == expected and config["auto_map"] == named and plain_names and quiet
