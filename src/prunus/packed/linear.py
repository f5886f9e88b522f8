"""Packed matrices inside a transformers model, for architectures that the engine does not cover."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunus.errors import ModelError
from prunus.models.skeleton import skeleton
from prunus.models.weights import Weights
from prunus.packed.folder import PackedFolder
from prunus.packed.matrix import PackedMatrix
from prunus.packed.model import Restored, load_dense
from prunus.packed.reference import unpack
from prunus.runtime.kernels import Linear
from prunus.runtime.native import Native

FEW = 16  # tokens up to which the kernels beat unpacking and a dense product


class SparseLinear(nn.Module):
    """`nn.Linear` on a packed matrix; it cannot be trained.

    Few tokens go through the compiled kernels. For many the matrix is unpacked for the moment of one dense product.
    """

    def __init__(self, packed: PackedMatrix, bias: Tensor | None, native: Native) -> None:
        super().__init__()
        self.packed, self.kernel, self.bias = packed, Linear(packed, native), bias
        self.in_features, self.out_features = packed.columns, packed.rows

    def forward(self, x: Tensor) -> Tensor:
        """`x Wᵀ + b`, `[..., rows]`, in the dtype of `x`."""
        if x.numel() <= FEW * x.shape[-1]:
            y = self.kernel(x).to(x.dtype)
            return y if self.bias is None else y + self.bias
        return nn.functional.linear(x, unpack(self.packed).to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.packed.kind}"


def load_sparse(folder: Path, native: Native) -> Any:
    """The transformers model of a packed folder, its packed matrices as `SparseLinear` where they are `nn.Linear`s.

    Raises:
        FormatError: the folder is damaged.
        ModelError: its config.json is of another model.
    """
    packed = PackedFolder.open(folder)
    plain = skeleton(folder)
    view: Any = Restored(packed)  # looks like a Checkpoint
    weights = Weights(plain, view, torch.device("cpu"))
    modules: dict[str, Any] = dict(plain.named_modules())
    chosen = {}
    for name, entry in packed.entries.items():
        target = weights.targets[name][0]
        owner, _, attribute = target.rpartition(".")
        linear = type(modules.get(owner)) is nn.Linear and attribute == "weight"
        if entry.form == "packed" and len(entry.shape) == 2 and linear and name not in weights.converted:
            wanted = tuple(modules[owner].weight.shape)
            if entry.shape != wanted:
                raise ModelError(f"{name}: the folder has the shape {entry.shape}, the config {wanted}.")
            chosen[name] = owner
    model: Any = load_dense(folder, keep=chosen)
    for name, owner in chosen.items():
        found = packed.read(name)
        assert isinstance(found, PackedMatrix)
        parent, _, child = owner.rpartition(".")
        old = model.get_submodule(owner)
        setattr(model.get_submodule(parent), child, SparseLinear(found, getattr(old, "bias", None), native))
    return model
