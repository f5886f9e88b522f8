"""Which tensors of a checkpoint are matrices of blocks, and which are embeddings: read from the model's own modules."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prunus.models.checkpoint import Checkpoint
from prunus.models.discover import find_blocks
from prunus.models.skeleton import skeleton
from prunus.models.weights import Weights
from prunus.packed.folder import DTYPES


@dataclass(frozen=True)
class Layout:
    """Names on disk, by what becomes of them.

    Attributes:
        matrices: linear weights inside blocks, routers left out.
        tables: embeddings and the head.
    """

    matrices: frozenset[str]
    tables: frozenset[str]


def layout(folder: Path, checkpoint: Checkpoint, trust_remote_code: bool = False) -> Layout:
    """Build the model without weights and look.

    Raises:
        ModelError: the configuration is unknown, or no blocks are found.
    """
    model = skeleton(folder, torch.float32, trust_remote_code)
    weights = Weights(model, checkpoint, torch.device("cpu"))
    slots = {slot.parameter for block in find_blocks(model) for slot in block.slots}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    tables = {names.get(id(module.weight)) for module in ends if isinstance(module, (nn.Embedding, nn.Linear))}
    flat = {name: checkpoint.tensors[name] for name in weights.targets if len(checkpoint.tensors[name].shape) >= 2}
    floats = {name for name, stored in flat.items() if stored.dtype in DTYPES.values()}
    return Layout(
        frozenset(name for name in floats if slots.issuperset(weights.targets[name])),
        frozenset(name for name in floats if weights.targets[name][0] in tables),
    )
