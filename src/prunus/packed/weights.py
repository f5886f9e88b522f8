"""Weights for the compiled engine, by the names of transformers' parameters, from a packed or an ordinary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.errors import ModelError
from prunus.models.checkpoint import Checkpoint
from prunus.models.skeleton import skeleton
from prunus.models.source import is_packed
from prunus.models.weights import Weights
from prunus.packed.folder import VALUES, PackedFolder, Read
from prunus.packed.layout import Layout, layout
from prunus.packed.model import Restored, check_places
from prunus.packed.orders import read_orders
from prunus.packed.pack import quantize_dense
from prunus.packed.writing import form

# How the weights of an ordinary folder are prepared: as `prunus export --values`, or dense for comparison.
DENSE = ("dense-fp32", "dense-bf16", "dense-int8")


def engine_weights(folder: Path, values: str = "lossless") -> dict[str, Read]:
    """Every weight of a model, read one at a time, in the form in which the engine shall hold it.

    Args:
        folder: packed, or an ordinary one that is packed here.
        values: of an ordinary folder: a name of `folder.VALUES` or of `DENSE`. A packed folder has its own, unless a
            dense form is asked for.

    Raises:
        PrunusError: the folder is damaged, or its tensors are not the parameters of its architecture one by one.
    """
    names, read = _packed(folder) if is_packed(folder) else _ordinary(folder, values)
    if values in DENSE:
        restored: Any = Restored(PackedFolder.open(folder)) if is_packed(folder) else Checkpoint.open(folder)
        plan = layout(folder, restored)
        return {names[name]: _dense(name, tensor, values, plan) for name, tensor in restored.read(names)}
    return {names[name]: found for name, found in read()}


def _packed(folder: Path) -> tuple[dict[str, str], Callable[[], Iterator[tuple[str, Read]]]]:
    packed = PackedFolder.open(folder)
    names = parameters(folder, Restored(packed))
    check_places(packed, names)
    return names, lambda: ((name, packed.read(name)) for name in names)


def _ordinary(folder: Path, values: str) -> tuple[dict[str, str], Callable[[], Iterator[tuple[str, Read]]]]:
    checkpoint = Checkpoint.open(folder)
    names = parameters(folder, checkpoint)

    def read() -> Iterator[tuple[str, Read]]:
        assert values in VALUES, values
        plan, orders = layout(folder, checkpoint), read_orders(folder, checkpoint)
        for name, tensor in checkpoint.read(names):
            yield name, form(name, tensor, values, plan, orders.get(name))

    return names, read


def parameters(folder: Path, checkpoint: Any) -> dict[str, str]:
    """Name on disk -> name of the parameter, for tensors that become one parameter as they are.

    Args:
        folder: holds the config.json.
        checkpoint: a `Checkpoint`, or a `Restored` that looks like one.

    Raises:
        ModelError: some are merged or split while loading.
    """
    weights = Weights(skeleton(folder), checkpoint, torch.device("cpu"))
    converted = sorted(weights.converted)
    if converted:
        raise ModelError(f"transformers merges tensors of this model while it loads, such as {converted[0]}.")
    return {name: weights.targets[name][0] for name in weights.known(checkpoint.tensors)}


def _dense(name: str, tensor: Tensor, values: str, plan: Layout) -> Read:
    if name not in plan.matrices | plan.tables:
        return tensor
    if values == "dense-int8":
        return quantize_dense(tensor)
    return tensor.bfloat16() if values == "dense-bf16" else tensor.float()
