"""Weights by name become the structures that describe a model to the library."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus.errors import ModelError
from prunus.packed.matrix import PackedMatrix, QuantizedMatrix
from prunus.runtime.kernels import DenseLinear, Handle, Linear
from prunus.runtime.native import MATRICES, LayerStruct, ModelStruct, Native
from prunus.runtime.plan import Architecture, Block, Norm, NotCovered

Weight = Tensor | PackedMatrix | QuantizedMatrix


class Parts:
    """Weights by name, each handed to the library once."""

    def __init__(
        self, native: Native, weights: Mapping[str, Weight], rounded: bool, layout: str | None, kept: list[object]
    ) -> None:
        self._native, self._weights, self._rounded, self._layout, self._kept = native, weights, rounded, layout, kept
        self._handles: dict[tuple[str, bool], Handle] = {}
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}

    def has(self, name: str) -> bool:
        """Whether a weight of this name was given."""
        return name in self._weights

    def matrix(self, name: str, rows: bool = False) -> Handle:
        """The matrix of a module; `rows`: single rows are read from it, as from an embedding."""
        key = f"{name}.weight", rows
        if key not in self._handles:
            weight = self._weight(key[0])
            if isinstance(weight, PackedMatrix):
                made = Linear(weight, self._native, rounded=self._rounded and not rows, layout=self._layout)
            else:
                made = DenseLinear(weight, self._native)
                self._handles[key[0], not rows] = made
            self._handles[key] = made
            self._kept.append(made)
        return self._handles[key]

    def vector(self, name: str, size: int, offset: float = 0.0) -> int:
        """Address of a vector of float32 with an offset added.

        Raises:
            ModelError: it is missing or of another size.
        """
        weight = self._weight(name)
        if not isinstance(weight, Tensor) or weight.shape != (size,):
            raise ModelError(f"{name} must be a vector of {size} numbers.")
        return self.keep(weight.detach().to("cpu", torch.float32) + offset)

    def bias(self, name: str, size: int) -> int | None:
        """Address of a module's bias, None if it has none."""
        return self.vector(f"{name}.bias", size) if self.has(f"{name}.bias") else None

    def keep(self, tensor: Tensor) -> int:
        """Address of a tensor that lives as long as the engine."""
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def tables(self, kind: str, architecture: Architecture, context: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a kind of layer."""
        if kind not in self._tables:
            self._tables[kind] = architecture.rotary[kind](context)
        return self._tables[kind]

    def _weight(self, name: str) -> Weight:
        if name not in self._weights:
            raise ModelError(f"The model's weights lack {name}; copy or export it again.")
        return self._weights[name]


def assemble(architecture: Architecture, parts: Parts, context: int) -> ModelStruct:
    """What the library is told of a model; addresses are valid as long as what `parts` keeps.

    Raises:
        ModelError: weights are missing or of the wrong size.
        NotCovered: the norms of a layer differ in a way that the library cannot express.
    """
    embedding = parts.matrix(architecture.embedding, rows=True)
    if (embedding.rows, embedding.columns) != architecture.size:
        rows, columns = architecture.size
        raise ModelError(
            f"{architecture.embedding} is {embedding.rows} x {embedding.columns}, the configuration asks {rows} x "
            f"{columns}. Its config.json does not belong to its weights."
        )
    given = "lm_head" if parts.has("lm_head.weight") else architecture.head
    head = parts.matrix(given)
    blocks = [_layer(block, architecture, parts, embedding.columns, context) for block in architecture.blocks]
    layers = (LayerStruct * len(blocks))(*blocks)
    return ModelStruct(
        layers=layers,
        layer_count=len(blocks),
        hidden=embedding.columns,
        vocabulary=embedding.rows,
        context=context,
        embedding=embedding.pointer,
        head=head.pointer,
        norm=_norm(architecture.norm, embedding.columns, parts),
        head_bias=parts.bias(given, head.rows),
        norm_eps=architecture.norm.eps,
        embedding_scale=architecture.embedding_scale,
        logit_softcap=architecture.logit_softcap,
    )


def _layer(block: Block, architecture: Architecture, parts: Parts, hidden: int, context: int) -> LayerStruct:
    """One layer; numbers of heads follow from its matrices, which may differ from layer to layer."""
    matrices = {name: parts.matrix(block.matrices[name]) for name in MATRICES}
    for name in ("q", "k"):
        if matrices[name].rows % block.head_dim:
            raise ModelError(f"{block.matrices[name]} has {matrices[name].rows} rows, no multiple of {block.head_dim}.")
    sizes = dict.fromkeys(block.norms, hidden) | {"q_norm": block.head_dim, "k_norm": block.head_dim}
    cos, sin = parts.tables(block.rotary, architecture, context)
    epsilons = {norm.eps for name, norm in block.norms.items() if name not in ("q_norm", "k_norm")}
    if len(epsilons) > 1:
        raise NotCovered(f"The norms of {block.norms['attention_norm'].name} and its layer have different epsilons.")
    return LayerStruct(
        **{name: matrix.pointer for name, matrix in matrices.items()},
        **{f"{name}_bias": parts.bias(block.matrices[name], matrix.rows) for name, matrix in matrices.items()},
        **{name: _norm(norm, sizes[name], parts) for name, norm in block.norms.items()},
        cos=parts.keep(cos),
        sin=parts.keep(sin),
        heads=matrices["q"].rows // block.head_dim,
        kv_heads=matrices["k"].rows // block.head_dim,
        head_dim=block.head_dim,
        rotary=cos.shape[1],
        window=block.window,
        norm_eps=epsilons.pop(),
        qk_eps=block.norms["q_norm"].eps if "q_norm" in block.norms else 0.0,
        scale=block.scale,
        softcap=block.softcap,
        activation=block.activation,
    )


def _norm(norm: Norm, size: int, parts: Parts) -> int:
    return parts.vector(norm.name, size, norm.offset)
