"""Which sizes each block of a checkpoint has, found by comparing its tensors with blocks built from the config.

No table of families: keys of the configuration that set a width are tried until transformers' own class builds a block
of exactly the tensors' shapes. What the class has no place for, a bias, is named apart.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig

from prunus.errors import FormatError

# Keys by which configurations set the widths of a block, the common names first.
WIDTHS = (
    *("num_attention_heads", "num_key_value_heads", "intermediate_size", "n_inner", "ffn_dim", "n_head", "num_heads"),
    "ffn_hidden_size",
    *("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"),
    *("shared_expert_intermediate_size",),
)
MISSING = object()

Shape = tuple[int, ...]


@dataclass(frozen=True)
class BlockFit:
    """What makes one block of a checkpoint differ from what its configuration builds.

    Attributes:
        widths: key of the configuration -> value in this block; only those that differ.
        biases: modules with a bias that the class does not give them, relative to the block.
    """

    widths: Mapping[str, int] = field(default_factory=dict)
    biases: tuple[str, ...] = ()


class Fitter:
    """Explains blocks of one class.

    Attributes:
        kind: class of the blocks.
        config: the configuration with its global sizes.
    """

    def __init__(self, kind: type[nn.Module], config: PreTrainedConfig):
        """Remember how the blocks are built; a head's size is made explicit, or it would follow their number."""
        self.kind = kind
        self._indexed = len(inspect.signature(kind).parameters) > 1  # some do not ask for their position
        self.config = copy.copy(config)
        sizes = {
            size for part in self.build(0, {}).modules() if isinstance(size := getattr(part, "head_dim", None), int)
        }
        if getattr(config, "head_dim", None) is None and len(sizes) == 1:
            self.config.head_dim = sizes.pop()
        self._known: dict[tuple, BlockFit] = {}

    def __call__(self, name: str, index: int, tensors: Mapping[str, Shape], experts: Mapping[str, int]) -> BlockFit:
        """The sizes of one block.

        Args:
            name: of the block, for complaints.
            index: its position, which decides about kinds of attention.
            tensors: name relative to the block -> shape.
            experts: tensor that transformers stacks while loading, relative to the block -> how many experts lie on
                disk.

        Raises:
            FormatError: no widths of the configuration explain the shapes.
        """
        key = (self._type(index), tuple(sorted(tensors.items())), tuple(sorted(experts.items())))
        if key not in self._known:
            self._known[key] = self._search(name, index, tensors, experts)
        return self._known[key]

    def shapes(self, index: int, widths: Mapping[str, Any]) -> dict[str, Shape]:
        """Tensors of the block that transformers builds with these widths; empty if it refuses them."""
        try:
            return {name: tuple(value.shape) for name, value in self.build(index, widths).state_dict().items()}
        except (ValueError, TypeError, RuntimeError, ZeroDivisionError, AssertionError, StrictDataclassError):
            return {}

    def width(self, widths: Mapping[str, int]) -> dict[str, int]:
        """All widths of a block, those of the configuration where it says nothing of its own."""
        given = {key: widths.get(key, getattr(self.config, key, None)) for key in WIDTHS}
        return {key: value for key, value in given.items() if isinstance(value, int)}

    def build(self, index: int, widths: Mapping[str, Any]) -> nn.Module:
        """The block itself, its parameters on the meta device."""
        config = copy.copy(self.config)
        for key, value in widths.items():
            setattr(config, key, value)
        with torch.device("meta"):
            return self.kind(config, index) if self._indexed else self.kind(config)

    def _type(self, index: int) -> Any:
        kinds = getattr(self.config, "layer_types", None)
        return kinds[index] if kinds else None

    def _search(self, name: str, index: int, tensors: Mapping[str, Shape], experts: Mapping[str, int]) -> BlockFit:
        dense = self.shapes(index, {})
        known, biases = _apart(tensors, dense)
        for widths in self._trials(dense, known):
            shapes = self.shapes(index, widths)
            whole = all(stack in shapes and shapes[stack][0] == count for stack, count in experts.items())
            same = all(shapes.get(tensor) == shape for tensor, shape in known.items())
            if shapes and whole and same and set(shapes) - set(known) <= set(experts):
                return BlockFit(widths, biases)
        odd = next((tensor for tensor, shape in known.items() if dense.get(tensor) != shape), next(iter(known), ""))
        raise FormatError(
            f"{name}: no widths of {type(self.config).__name__} give the shapes of its tensors (first: {odd}, "
            f"{list(known.get(odd, ()))}, the configuration says {list(dense.get(odd, ()))})."
        )

    def _trials(self, dense: Mapping[str, Shape], found: Mapping[str, Shape]) -> Iterator[dict[str, int]]:
        """Widths worth a trial, the unchanged first: those that some changed length of a tensor suggests."""
        pairs = {
            (before, after)
            for name, shape in found.items()
            if len(dense.get(name, ())) == len(shape)
            for before, after in zip(dense[name], shape, strict=True)
            if before != after
        }
        options = []
        for key in WIDTHS:
            value = getattr(self.config, key, MISSING)
            if value is MISSING or not isinstance(value, int | None) or key in self.config.attribute_map:
                continue
            if value is None:
                values = {after for _, after in pairs}
            else:
                scaled = {(after * value, before) for before, after in pairs if before % value == 0}
                values = {a // b for a, b in scaled if a % b == 0 and a >= b} - {value}
            options.append([{}, *({key: new} for new in sorted(values))])
        for chosen in sorted(itertools.product(*options), key=lambda parts: sum(map(len, parts))):
            yield {key: value for part in chosen for key, value in part.items()}


def _apart(tensors: Mapping[str, Shape], dense: Mapping[str, Shape]) -> tuple[dict[str, Shape], tuple[str, ...]]:
    """Tensors that the class has a place for, and modules with an extra bias."""
    known, biases = {}, []
    for name, shape in tensors.items():
        module, _, last = name.rpartition(".")
        if name in dense:
            known[name] = shape
        elif last == "bias" and f"{module}.weight" in dense:
            biases.append(module)
        else:
            known[name] = shape  # the class has no such tensor: no trial will explain it
    return known, tuple(sorted(biases))
