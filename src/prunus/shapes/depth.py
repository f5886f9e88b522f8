"""config.json in step with fewer blocks: their number, and every list or number that counts them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from prunus.errors import ModelError
from prunus.models.modelling import is_described, plain
from prunus.models.skeleton import config_of, read_config

# Lists of indices of blocks, and numbers of blocks counted from the first.
INDICES = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices")
COUNTS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")


def without(dense: Path, gone: Mapping[str, set[int]], trust_remote_code: bool) -> dict[str, Any]:
    """config.json of a folder from which blocks are dropped; of its own class, if its blocks had sizes of their own.

    Args:
        dense: the folder that they are dropped from.
        gone: tower -> positions of its dropped blocks; empty: nothing but the class changes.
        trust_remote_code: as the run was allowed.

    Raises:
        ModelError: blocks of several towers are dropped, which one number cannot say.
    """
    raw = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    if is_described(raw):  # sizes of single blocks are found again in their tensors
        raw = plain(raw)
        config = config_of(raw)
    else:
        config = read_config(dense, trust_remote_code)
    if len(gone) > 1:
        raise ModelError("Blocks can be dropped from one tower only; name it with --blocks.")
    for indices in gone.values():
        _renumber(raw, config, indices)
    return raw


def _renumber(raw: dict[str, Any], config: PreTrainedConfig, indices: set[int]) -> None:
    """Take dropped blocks out of the number of blocks and out of every list that has an entry for each."""
    part, own = _part(raw, config)
    depth_name = own.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    depth = own.num_hidden_layers
    part[depth_name] = depth - len(indices)
    # Also lists that the class makes itself from the depth (Gemma 3: every sixth block is global): written out, they
    # keep each block what it was.
    for name, value in {**own.to_dict(), **part}.items():
        if isinstance(value, list) and len(value) == depth and name not in INDICES:
            part[name] = [item for place, item in enumerate(value) if place not in indices]
        elif name in INDICES and isinstance(value, list):
            part[name] = [place - sum(i < place for i in indices) for place in value if place not in indices]
        elif name in COUNTS and isinstance(value, int):
            part[name] = value - sum(place < value for place in indices)


def _part(raw: dict[str, Any], config: PreTrainedConfig) -> tuple[dict[str, Any], PreTrainedConfig]:
    """The part of config.json that describes the language model, and the same as an object."""
    text = config.get_text_config()
    if text is config:
        return raw, config
    name = next(name for name, value in vars(config).items() if value is text)
    return raw.setdefault(name, {}), text
