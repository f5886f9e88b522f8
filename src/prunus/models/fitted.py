"""Models whose blocks have shapes of their own: built from config.json, then fitted to the tensors on disk."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from prunus.errors import ModelError
from prunus.models.checkpoint import Checkpoint
from prunus.models.skeleton import skeleton
from prunus.models.thin import paired, put, thin
from prunus.models.weights import Weights, disk_targets


def is_fitted(folder: Path) -> bool:
    """Whether prunus wrote this folder and said that stock classes have no place for its shapes.

    Raises:
        ModelError: its `prunus.json` is damaged.
    """
    file = folder / "prunus.json"
    if not file.is_file():
        return False
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise ModelError(f"{file} is no JSON. Copy the folder again, or make it anew.") from None
    result = record.get("result") if isinstance(record, dict) else None
    return isinstance(result, dict) and result.get("loads") == "prunus"


def as_stored(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """`skeleton`, fitted to the tensors on disk where prunus alone has a place for them."""
    model = skeleton(checkpoint.folder, dtype, trust_remote_code)
    if is_fitted(checkpoint.folder):
        fit(model, checkpoint)
    return model


def load_fitted(
    folder: Path, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """A model in its own shapes, and the names of tensors on disk that it has no place for.

    Raises:
        ModelError: a parameter is in no shard, or a tensor fits nowhere.
    """
    checkpoint = Checkpoint.open(folder)
    model = skeleton(folder, dtype, trust_remote_code)
    fit(model, checkpoint)
    weights = Weights(model, checkpoint, device)
    known = weights.known(weights.targets)
    weights.load(known)
    model.tie_weights()
    return model, sorted(set(weights.targets) - set(known))


def fit(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Give the matrices of a model on the meta device the shapes on disk, and a bias where one lies beside its matrix.

    Only matrices and their biases change; anything else that differs is refused when it is loaded.
    """
    mapping = get_model_conversion_mapping(model)
    targets, converted = disk_targets(model, checkpoint.tensors, mapping)
    pairs = paired({places[0]: checkpoint.tensors[name].shape for name, places in targets.items()}, model)
    for path, rank in pairs.items():
        put(model, path, thin(model.get_submodule(path), rank))
    modules = dict(model.named_modules())
    for name, places in targets.items():
        path, _, attribute = places[0].rpartition(".")
        module, shape = modules.get(path), checkpoint.tensors[name].shape
        if name in converted or attribute not in ("weight", "bias") or module is None or not hasattr(module, "weight"):
            continue
        old = getattr(module, attribute, None)
        if (old is None and attribute == "bias") or (old is not None and tuple(old.shape) != shape):
            empty = torch.empty(shape, dtype=model.dtype, device="meta")
            setattr(module, attribute, nn.Parameter(empty, requires_grad=False))
        if attribute == "weight" and isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif attribute == "weight" and hasattr(module, "nf"):
            for size, value in zip(("nx", "nf"), shape, strict=True):
                setattr(module, size, value)
