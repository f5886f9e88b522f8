"""What can be made smaller: today a matrix inside a block, seen as `[out, in]` whatever its module stores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass(frozen=True)
class SiteInfo:
    """A site without its weights, as allocations, plans and reports need it.

    Attributes:
        name: dotted path of the matrix in the model, experts numbered (`model.layers.0.mlp.experts.3.down_proj`).
        block: dotted path of the block that holds it (`model.layers.0`).
        shape: `(out, in)`.
    """

    name: str
    block: str
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


def block_sizes(sites: Iterable[SiteInfo]) -> dict[str, int]:
    """Block -> number of weights in its sites, in the order of the sites."""
    sizes: dict[str, int] = {}
    for site in sites:
        sizes[site.block] = sizes.get(site.block, 0) + site.size
    return sizes


@dataclass(frozen=True)
class Matrix:
    """One 2-D weight as a view in `nn.Linear` orientation.

    Attributes:
        name: dotted path of the matrix in the model.
        weight: `[out, in]`; writing into it changes the model (a transpose for `Conv1D`, a slice for an expert).
        block: dotted path of the block that holds it.
    """

    name: str
    weight: Tensor
    block: str


@dataclass(frozen=True)
class Slot:
    """Where a matrix lies in its module.

    Attributes:
        info: the site.
        parameter: dotted path of the parameter that stores it, relative to the model.
        module: the module that owns the parameter.
        attribute: the parameter's name in that module.
        expert: index in the first dimension when the parameter stacks experts, else None.
        transposed: True if the parameter stores `[in, out]`.
    """

    info: SiteInfo
    parameter: str
    module: nn.Module
    attribute: str
    expert: int | None
    transposed: bool

    def matrix(self) -> Matrix:
        """The matrix as an `[out, in]` view of the parameter as it is now (loaded or on meta)."""
        return Matrix(self.info.name, self.view(getattr(self.module, self.attribute).detach()), self.info.block)

    def view(self, stored: Tensor) -> Tensor:
        """The part of a tensor of the parameter's shape that belongs to this matrix, as `[out, in]`."""
        own = stored if self.expert is None else stored[self.expert]
        return own.T if self.transposed else own


@dataclass
class Block:
    """One transformer layer, the unit that is loaded, pruned, saved and dropped.

    Attributes:
        name: dotted path in the model.
        tower: dotted path of the list that holds it; a model with an image and a text part has two.
        index: position in its tower.
        module: the layer itself; its parameters are on the meta device while it is not loaded.
        slots: where its prunable matrices lie, in module order.
        ignored: parameters of matrices that were left out on purpose.
    """

    name: str
    tower: str
    index: int
    module: nn.Module
    slots: list[Slot] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)

    @property
    def infos(self) -> list[SiteInfo]:
        """Its prunable matrices without their weights."""
        return [slot.info for slot in self.slots]

    def matrices(self) -> list[Matrix]:
        """Its prunable matrices as `[out, in]` views of the loaded parameters."""
        return [slot.matrix() for slot in self.slots]
