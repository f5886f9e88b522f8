"""config.json in step with smaller shapes: per-block lists without the dropped blocks, widths where all are equal.

No table of families decides. Values of the configuration that count a width are scaled as the tensors were, and the
model that transformers builds from the result must have exactly the tensors that were written; else the configuration
keeps the dense widths, and the folder is loaded by prunus, which takes every shape from the tensors themselves.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from prunus.errors import ModelError
from prunus.models.checkpoint import Checkpoint
from prunus.models.skeleton import read_config, skeleton_of
from prunus.models.weights import disk_targets

# Names by which configurations of transformers count the widths of a block. `head_dim` is written out beside them,
# since most classes derive it from the number of heads.
HEADS = ("num_attention_heads", "n_head", "num_heads")
GROUPS = ("num_key_value_heads",)
NEURONS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "shared_expert_intermediate_size")
# Switches that give biases to all matrices of a kind.
BIASES = ("attention_bias", "mlp_bias")
# Lists of indices of blocks, and numbers of blocks counted from the first.
INDICES = ("mlp_only_layers", "full_attn_idxs", "attn_layer_indices")
COUNTS = ("max_window_layers", "first_k_dense_replace", "num_dense_layers")


def in_step(
    dense: Path, written: Path, gone: Mapping[str, set[int]], trust_remote_code: bool
) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """The configuration of a folder whose shapes are smaller than those it was made from.

    Args:
        dense: the folder of the dense model.
        written: the new folder, with all its tensors and the dense config.json.
        gone: tower → positions of its dropped blocks.
        trust_remote_code: as the run was allowed.

    Returns:
        config.json; biases that a switch in it asks for and nobody made, all zero; and by what the folder loads:
        `transformers`, or `prunus` where stock classes have no place for these shapes.

    Raises:
        ModelError: dropped blocks cannot be described.
    """
    raw = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    if gone:
        _without(raw, read_config(dense, trust_remote_code), gone)
    checkpoint = Checkpoint.open(written)
    for config in _candidates(raw, dense, checkpoint):
        missing = _missing(config, raw, dense, checkpoint, trust_remote_code)
        if missing is not None:
            return config, missing, "transformers"
    return raw, {}, "prunus"


def _part(raw: dict[str, Any], config: PreTrainedConfig) -> tuple[dict[str, Any], PreTrainedConfig]:
    """The part of config.json that describes the language model, and the same as an object."""
    text = config.get_text_config()
    if text is config:
        return raw, config
    name = next(name for name, value in vars(config).items() if value is text)
    return raw.setdefault(name, {}), text


def _without(raw: dict[str, Any], config: PreTrainedConfig, gone: Mapping[str, set[int]]) -> None:
    """Take dropped blocks out of the number of blocks and out of every list that has an entry for each."""
    if len(gone) != 1:
        raise ModelError("Blocks can be dropped from one tower only; name it with --blocks.")
    ((_, indices),) = gone.items()
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


def _candidates(raw: dict[str, Any], dense: Path, checkpoint: Checkpoint) -> Iterator[dict[str, Any]]:
    """Configurations worth a trial: as it is; with widths scaled as some tensor was; each with and without biases."""
    ratios = _ratios(Checkpoint.open(dense), checkpoint)
    model = _object(raw)
    _, own = _part(copy.deepcopy(raw), model)
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    options: list[list[dict[str, Any]]] = [[{}], [{}]]
    for new, old in ratios:
        heads = {
            name: getattr(own, name) * new // old
            for name in (*HEADS, *GROUPS)
            if isinstance(getattr(own, name, None), int) and getattr(own, name) * new % old == 0
        }
        options[0].append({**heads, "head_dim": head_dim})
        options[1] += [{name: new} for name in NEURONS if getattr(own, name, None) == old]
        if getattr(own, "n_inner", 0) is None and old == 4 * own.hidden_size:
            options[1].append({"n_inner": new})
    switches = [{}, {name: True for name in BIASES if hasattr(own, name)}]
    for heads, neurons, biases in itertools.product(*options, switches):
        config = copy.deepcopy(raw)
        part, _ = _part(config, model)
        known = {own.attribute_map.get(name, name): value for name, value in {**heads, **neurons, **biases}.items()}
        part.update(known)
        yield config


def _ratios(dense: Checkpoint, written: Checkpoint) -> list[tuple[int, int]]:
    """Distinct pairs of a new and an old size of any axis of any tensor."""
    pairs = {
        (new, old)
        for name, tensor in written.tensors.items()
        if name in dense.tensors and len(tensor.shape) == len(dense.tensors[name].shape)
        for new, old in zip(tensor.shape, dense.tensors[name].shape, strict=True)
        if new != old
    }
    return sorted(pairs) if len(pairs) <= 16 else []  # with more, blocks differ and no configuration fits


def _object(raw: dict[str, Any]) -> PreTrainedConfig:
    values = {name: value for name, value in raw.items() if name != "model_type"}
    return CONFIG_MAPPING[raw["model_type"]].from_dict(values)


def _missing(
    config: dict[str, Any], raw: dict[str, Any], folder: Path, checkpoint: Checkpoint, trust_remote_code: bool
) -> dict[str, Tensor] | None:
    """Biases that the model of this configuration has and the checkpoint lacks; None if it does not fit."""
    try:
        model = skeleton_of(_object(config), folder, torch.float32, trust_remote_code)
    except (ModelError, ValueError, TypeError, ZeroDivisionError, RuntimeError):
        return None
    except Exception as error:  # transformers' strict configurations raise a class of their own
        if type(error).__module__.startswith(("huggingface_hub", "transformers")):
            return None
        raise
    return _fits(model, checkpoint)


def _fits(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    targets, converted = disk_targets(model, checkpoint.tensors, get_model_conversion_mapping(model))
    have: dict[str, str] = {}
    for name, places in targets.items():
        for place in places:
            have[place] = name
        unknown = places[0] not in shapes and name.endswith((".weight", ".bias")) and _inside(name)
        other = name not in converted and places[0] in shapes and shapes[places[0]] != checkpoint.tensors[name].shape
        if unknown or other:
            return None
    zeros: dict[str, Tensor] = {}
    for place, _ in model.named_parameters():
        if place in have or place in model.all_tied_weights_keys:
            continue
        weight = have.get(f"{place.removesuffix('bias')}weight")
        if not place.endswith(".bias") or weight is None:
            return None
        kind = checkpoint.tensors[weight].dtype
        zeros[f"{weight.removesuffix('weight')}bias"] = torch.zeros(shapes[place], dtype=kind)
    return zeros


def _inside(name: str) -> bool:
    """Whether a tensor's name holds the number of a block."""
    return any(part.isdigit() for part in name.split("."))
