"""What can be made smaller: a matrix seen as `[out, in]` whatever its module stores, a width, or a whole block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["heads", "neurons", "experts", "ranks"]


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


@dataclass(frozen=True, eq=False)
class Member:
    """The part of a matrix that belongs to a width.

    Attributes:
        matrix: name of the site.
        groups: int64, for each of its rows (or columns) the group that it goes with, -1 for none.
    """

    matrix: str
    groups: Tensor

    def kept(self, keep: Tensor) -> Tensor:
        """Bool, as long as `groups`: which rows (or columns) stay if the groups in `keep` (bool `[groups]`) do."""
        return torch.where(self.groups < 0, True, keep[self.groups.clamp(min=0)])

    def of_groups(self, values: Tensor, groups: int) -> Tensor:
        """Sums over groups, `[groups]`, of values of single rows (or columns)."""
        mine = self.groups >= 0
        total = torch.zeros(groups, dtype=values.dtype, device=values.device)
        return total.index_add_(0, self.groups.to(values.device)[mine], values[mine])


@dataclass(frozen=True, eq=False)
class Width:
    """Channels inside a block that can only be removed together: groups of rows, and the columns that read them.

    Attributes:
        name: dotted path of the module that holds it (`model.layers.0.mlp`).
        block: dotted path of its block.
        kind: `heads` if tokens are mixed between rows and columns (one group for each head of keys and values, with
            the query heads that read it), else `neurons`.
        groups: how many there are.
        rows: producers, whose rows go.
        columns: consumers, whose columns go.
        weights: int64 `[groups]`, how many weights of matrices each group holds.
    """

    name: str
    block: str
    kind: Kind
    groups: int
    rows: tuple[Member, ...]
    columns: tuple[Member, ...]
    weights: Tensor

    @property
    def consumer(self) -> Member:
        """The one matrix that reads the channels."""
        assert len(self.columns) == 1, f"{self.name} is read by {len(self.columns)} matrices"
        return self.columns[0]

    def matrices(self) -> list[str]:
        """Names of all matrices that shrink with it."""
        return [member.matrix for member in (*self.rows, *self.columns)]


@dataclass(frozen=True, eq=False)
class Pool:
    """The experts of a block, of which some can go with their rows of the router.

    Attributes:
        name: dotted path of the module that stacks them.
        block: dotted path of its block.
        groups: how many there are.
        router: dotted path of the module that chooses among them.
        chosen: how many it picks for a token.
        spans: groups of equal size that it chooses among first; 1: none.
        opened: how many of those groups it then chooses experts from.
        weights: int64 `[groups]`, how many weights of matrices each expert holds.
        kind: `experts`.
    """

    name: str
    block: str
    groups: int
    router: str
    chosen: int
    spans: int
    opened: int
    weights: Tensor
    kind: Kind = "experts"

    @property
    def least(self) -> int:
        """Experts that must stay: as many as the router picks from the groups it opens, in groups of one size."""
        return -(-self.chosen // self.opened) * self.spans


@dataclass(frozen=True)
class BlockSite:
    """A whole block that can go.

    Attributes:
        name: dotted path of the block.
        weights: number of weights in its matrices.
    """

    name: str
    weights: int


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
        widths: groups of channels in it, where a method asked for them.
        pools: its mixtures of experts, where a method asked for them.
        thin: names of its matrices that can become two, where a method asked for them.
    """

    name: str
    tower: str
    index: int
    module: nn.Module
    slots: list[Slot] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)
    widths: list[Width] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    thin: frozenset[str] = frozenset()

    @property
    def infos(self) -> list[SiteInfo]:
        """Its prunable matrices without their weights."""
        return [slot.info for slot in self.slots]

    def matrices(self) -> list[Matrix]:
        """Its prunable matrices as `[out, in]` views of the loaded parameters."""
        return [slot.matrix() for slot in self.slots]

    def slot(self, name: str) -> Slot:
        """Where the matrix of this name lies."""
        return next(slot for slot in self.slots if slot.info.name == name)

    def resize(self, name: str, shape: tuple[int, int]) -> None:
        """Note that the matrix of this name now has another shape."""
        place = next(place for place, slot in enumerate(self.slots) if slot.info.name == name)
        slot = self.slots[place]
        self.slots[place] = replace(slot, info=replace(slot.info, shape=shape))
