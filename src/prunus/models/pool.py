"""The experts of a block as one thing that can be made smaller, with the router that chooses among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunus.errors import ModelError
from prunus.models.experts import is_experts
from prunus.sites import Block, Pool

# Names under which modules of transformers count their experts, and those that they choose.
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
CHOSEN = ("top_k", "num_experts_per_tok")
GROUPS = ("num_group", "n_group")
OPENED = ("topk_group",)
# A score that is never chosen, also behind a sigmoid to which a correction is added.
NEVER = -1e9


def find_pools(block: Block) -> list[Pool]:
    """The mixtures of a block.

    Raises:
        ModelError: experts whose router is not found, or that the recipe leaves out in part.
    """
    pools = []
    for path, module in block.module.named_modules():
        if is_experts(module):
            pools.append(_pool(block, path, module))
    return pools


def attach_pools(blocks: list[Block]) -> None:
    """Give every block its mixtures.

    Raises:
        ModelError: no block has experts.
    """
    for block in blocks:
        block.pools = find_pools(block)
    if not any(block.pools for block in blocks):
        raise ModelError("This model has no experts that transformers stacks; choose a method for widths or depth.")


def _pool(block: Block, path: str, module: nn.Module) -> Pool:
    count = len(module.down_proj)  # type: ignore[arg-type]
    above = path.rpartition(".")[0]
    parent = block.module.get_submodule(above)
    routers = [
        name for name, part in parent.named_children() if name != path.rpartition(".")[2] and _routes(part, count)
    ]
    if len(routers) != 1:
        raise ModelError(f"{block.name}.{path}: no single router with a row for each of {count} experts is found.")
    router = parent.get_submodule(routers[0])
    places = (router, parent, module)
    chosen = next((getattr(part, name) for part in places for name in CHOSEN if hasattr(part, name)), None)
    groups = next((getattr(part, name) for part in places for name in GROUPS if getattr(part, name, None)), 1)
    opened = next((getattr(router, name) for name in OPENED if hasattr(router, name)), None) or groups
    if not isinstance(chosen, int):
        raise ModelError(f"{block.name}.{path}: how many experts the router chooses is not found.")
    name = f"{block.name}.{path}"
    each = sum(slot.info.size for slot in block.slots if slot.info.name.startswith(f"{name}.0."))
    own = sum(slot.info.name.startswith(f"{name}.") for slot in block.slots)
    if own % count or not own:
        raise ModelError(f"{name}: some of its matrices are left out by --ignore; experts go as a whole.")
    dot = f"{above}." if above else ""
    sizes = torch.full((count,), each, dtype=torch.int64)
    return Pool(name, block.name, count, f"{block.name}.{dot}{routers[0]}", chosen, groups, opened, sizes)


def _routes(part: nn.Module, count: int) -> bool:
    weight = getattr(part, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == count


def parts(block: Block, pool: Pool) -> tuple[Any, Any, Any]:
    """The experts, the router, and the module that holds both."""
    inside = [path.removeprefix(f"{block.name}.") for path in (pool.name, pool.router)]
    above = inside[0].rpartition(".")[0]
    experts, router = (block.module.get_submodule(path) for path in inside)
    return experts, router, block.module.get_submodule(above)


def per_expert(block: Block, pool: Pool) -> Iterator[tuple[str, nn.Module, str]]:
    """Tensors with one entry for each expert: full name, the module that owns it, and its name there."""
    experts, router, _ = parts(block, pool)
    for path, module in ((pool.name, experts), (pool.router, router)):
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if value.ndim and value.shape[0] == pool.groups:
                yield f"{path}.{name}", module, name


def fewer(block: Block, pool: Pool, keep: Tensor) -> None:
    """Cut the experts that go, and the router's rows; on the meta device only the shapes change."""
    index = keep.nonzero().flatten()
    for _, module, name in list(per_expert(block, pool)):
        value = getattr(module, name)
        if value.device.type == "meta":
            cut = torch.empty((len(index), *value.shape[1:]), dtype=value.dtype, device="meta")
        else:
            cut = value.detach().index_select(0, index.to(value.device)).contiguous()
        if isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(cut, requires_grad=False))
        else:
            module._buffers[name] = cut
    for part in parts(block, pool):
        for name in COUNTS:
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, len(index))
    vars(parts(block, pool)[1]).pop("forward", None)  # what `closed` put there
    for slot in list(block.slots):
        number = slot.info.name.removeprefix(f"{pool.name}.").partition(".")[0]
        if slot.info.name.startswith(f"{pool.name}.") and not keep[int(number)]:
            block.resize(slot.info.name, (0, slot.info.shape[1]))


def close(block: Block, pool: Pool, keep: Tensor) -> None:
    """Let the router see −∞ for the experts that go, until `fewer`: what is sliced must compute the same."""
    _, router, _ = parts(block, pool)
    router.forward = _closed(router, keep)
    for _, module, name in per_expert(block, pool):
        value = getattr(module, name)
        if module is router and value.ndim == 1:
            value.data[~keep.to(value.device)] = NEVER


@contextmanager
def closed(block: Block, pool: Pool, keep: Tensor) -> Iterator[None]:
    """`close`, undone afterwards."""
    _, router, _ = parts(block, pool)
    vectors = [getattr(m, name) for _, m, name in per_expert(block, pool) if m is router and getattr(m, name).ndim == 1]
    before = [value.clone() for value in vectors]
    close(block, pool, keep)
    try:
        yield
    finally:
        del router.forward
        for value, old in zip(vectors, before, strict=True):
            value.data.copy_(old)


def _closed(router: nn.Module, keep: Tensor) -> Callable[..., Any]:
    linear = functional.linear

    def masked(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = linear(inputs, weight, bias)
        return logits.masked_fill(~keep.to(logits.device), float("-inf"))

    def forward(*args: Any, **kwargs: Any) -> Any:
        # The router's class decides what follows its one product: softmax, sigmoid, groups. Only the logits are closed.
        functional.linear = masked
        try:
            return type(router).forward(router, *args, **kwargs)
        finally:
            functional.linear = linear

    return forward


def check_keep(pool: Pool, keep: Tensor) -> None:
    """See that the router still has enough to choose from.

    Raises:
        ModelError: fewer experts than the router picks would be left, or its groups would differ in size.
    """
    left = int(keep.sum())
    if left < pool.least:
        raise ModelError(f"{pool.name}: {left} experts would be left, and the router needs {pool.least}.")
    sizes = set(keep.unflatten(0, (pool.spans, -1)).sum(1).tolist())
    if len(sizes) != 1:
        raise ModelError(f"{pool.name}: its router chooses among {pool.spans} groups, which must stay equally large.")
