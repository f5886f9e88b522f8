"""The Python file that is put beside the weights of a model whose blocks differ, and the keys that it reads.

It is written from one template, so that prunus can tell its own file from any other: byte for byte.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "modeling_pruned.py"
PREFIX = "pruned_"  # of `model_type`
KEY = "pruned"  # of config.json: {"blocks": path, "biases": [...], "ranks": {...}}

TEMPLATE = '''"""{base} with every block at its own widths, as `per_layer_config` in config.json says.

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
        for name, rank in shape["ranks"].items():
            parent, _, child = name.rpartition(".")
            dense = self.get_submodule(name)
            first = nn.Linear(dense.in_features, rank, bias=False)
            second = nn.Linear(rank, dense.out_features, bias=dense.bias is not None)
            setattr(self.get_submodule(parent), child, nn.Sequential(first, second))
        self.post_init()


Pruned{config}.register_for_auto_class()
Pruned{base}.register_for_auto_class("AutoModelForCausalLM")
'''


def source(config: dict[str, Any]) -> str:
    """The file for a config.json made by `describe`."""
    base = str(config["architectures"][0]).removeprefix("Pruned")
    kind = str(config["model_type"]).removeprefix(PREFIX)
    settings = str(config["auto_map"]["AutoConfig"]).rpartition(".")[2].removeprefix("Pruned")
    return TEMPLATE.format(base=base, config=settings, kind=kind, prefix=PREFIX, key=KEY)


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
        KEY: shape,
    }


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `describe`: config.json with the dense model's sizes and of its own class."""
    if not str(config.get("model_type", "")).startswith(PREFIX):
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
    """True if all the code that the folder's config.json names is, byte for byte, the file that prunus ships."""
    module = FILE.removesuffix(".py")
    names = config.get("auto_map")
    if not isinstance(names, dict) or not str(config.get("model_type", "")).startswith(PREFIX):
        return False
    try:
        expected = source(config)
        found = (folder / FILE).read_text(encoding="utf-8")
    except (KeyError, IndexError, TypeError, OSError, UnicodeDecodeError):
        return False
    ours = {"AutoConfig", "AutoModelForCausalLM"}
    return (
        set(names) == ours
        and all(str(name).startswith(f"{module}.Pruned") for name in names.values())
        and (found == expected and _identifiers(config))
    )


def _identifiers(config: dict[str, Any]) -> bool:
    """Names that were put into the file are plain names: nothing else can have come in with them."""
    names = [*config["architectures"], *(value.rpartition(".")[2] for value in config["auto_map"].values())]
    return all(name.isidentifier() for name in [*names, str(config["model_type"])])
