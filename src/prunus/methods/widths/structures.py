"""How many groups each width keeps, and which: FLAP's four structures, priced by true parameter counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.methods.shape import Blocks
from prunus.sites import Kind, Width

# `refusal(groups of heads in each block, None: as they are) -> why they cannot be, or nothing`.
Refusal = Callable[[int | None], str]
Structure = Literal["UL-UM", "UL-MM", "AL-MM", "AL-AM", "local"]


class Part(Protocol):
    """What of a model a method narrows."""

    @property
    def first(self) -> int:
        """Blocks at the beginning that are left alone."""
        ...

    @property
    def last(self) -> int:
        """Blocks at the end that are left alone."""
        ...

    @property
    def touches(self) -> tuple[Kind, ...]:
        """Kinds of widths."""
        ...


def chosen(survey: Blocks, part: Part) -> list[Width]:
    """The widths of all blocks but those that are left alone."""
    blocks = survey.blocks
    return [width for block in blocks[part.first : max(part.first, len(blocks) - part.last)] for width in block.widths]


def reachable(survey: Blocks, widths: Sequence[Width], sparsity: float, part: Part) -> int:
    """How many weights are to go: the share of all matrices of all blocks.

    Args:
        survey: the dense model.
        widths: all that may be narrowed; one group of each stays.
        sparsity: wanted, in [0, 1).
        part: what the widths were chosen by, named in the complaint.

    Raises:
        RecipeError: not so many can go.
    """
    size = sum(info.size for block in survey.blocks for info in block.infos)
    most = sum(int(width.weights.sum() - width.weights.min()) for width in widths)
    target = round(sparsity * size)
    if target > most or not widths:
        spared = f" (the first {part.first} and last {part.last} blocks left alone)" if part.first or part.last else ""
        raise RecipeError(
            f"A sparsity of {sparsity:g} cannot be reached by removing {' and '.join(part.touches)}{spared}: at most "
            f"{most:,} of {size:,} weights can go, so ask for 0 to {int(1000 * most / size) / 1000:g}."
        )
    return target


def grouped(channels: Tensor, width: Width, structure: Structure) -> Tensor:
    """Scores of groups from those of channels, `[groups]`.

    UL and local: the sum over a group's channels. AL: channels are standardised within their width (unbiased), which
    makes widths comparable, and averaged over the group.
    """
    member = width.consumer
    if not structure.startswith("AL"):
        return member.of_groups(channels, width.groups)
    deviation = channels.std()
    standard = (channels - channels.mean()) / deviation if deviation > 0 else torch.zeros_like(channels)
    count = member.of_groups(torch.ones_like(channels), width.groups)
    return member.of_groups(standard, width.groups) / count.clamp(min=1)


def to_multiple(width: Width, count: int, step: int) -> int:
    """The nearest number of neurons that kernels like, at least one step; heads, and widths left whole, stay."""
    if width.kind != "neurons" or count == width.groups or width.groups < step:
        return count
    return max(step, min(step * round(count / step), width.groups // step * step))


def highest(scores: Tensor, count: int) -> Tensor:
    """Bool mask of the `count` highest; of equal ones the first are kept."""
    order = scores.argsort(descending=True, stable=True)
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[order[:count].cpu()] = True
    return keep


def check_even(part: Part) -> None:
    """See that no block is left alone, which would give it another shape.

    Raises:
        RecipeError: some are.
    """
    if part.first or part.last:
        raise RecipeError(
            f"--portable gives all blocks one shape, and the first {part.first} and last {part.last} are left alone. "
            "--set method.first=0 --set method.last=0 prunes them too; without --portable, prunus export --portable "
            "can fill the others up with zeros, at no gain in speed."
        )


def allowed(widths: Sequence[Width], target: int, count: int, refusal: Refusal, fixed: bool) -> int:
    """The number of groups of heads nearest to `count` that every block may keep, and that neurons can make up for.

    Args:
        widths: all that may be narrowed; all blocks have equal ones where anything is refused.
        target: weights to remove.
        count: wanted.
        refusal: why a number cannot be; empty if it can.
        fixed: no other number will do.

    Raises:
        RecipeError: no number can be; says why.
    """
    of_heads = [width for width in widths if width.kind == "heads"]
    whole = sum(_cost(width) * width.groups for width in widths if width.kind == "neurons")
    reasons = {}
    groups = of_heads[0].groups
    # Of two equally near ones the larger: heads are worth more.
    for left in sorted(range(1, groups + 1), key=lambda left: (abs(left - count), -left)):
        spent = sum(_cost(width) * (groups - left) for width in of_heads)
        possible = not whole or 0 <= target - spent < whole
        if possible and not reasons.setdefault(left, refusal(left)):
            return left
        if fixed:
            break
    reason = reasons.get(count) or next(iter(reasons.values()), "none of them reaches the sparsity")
    raise RecipeError(
        f"--portable: no stock class holds {count} of {groups} groups of heads in each block ({reason}). What would: "
        "--set method.kinds=neurons, or --set method.bias=false where biases are the reason; without --portable the "
        "result loads with its own modelling file, which costs trust_remote_code=True."
    )


def uniform_counts(
    widths: Sequence[Width],
    target: int,
    sparsity: float,
    heads: int,
    structure: Structure,
    compat: str,
    refusal: Refusal = lambda heads: "",
) -> dict[str, int]:
    """How many groups of each width stay when all blocks are treated alike.

    Args:
        widths: all that may be narrowed.
        target: weights to remove.
        sparsity: share of each width to remove.
        heads: how many groups of heads go in all (UL-MM), divided evenly over the blocks.
        structure: `UL-UM`, `UL-MM` or `local`.
        compat: `reference`: int(share·groups) of both kinds (or what LLM-Pruner makes of it, `local`), however much
            less than the target that removes; `exact`: the same for heads, and as many neurons as fill up the target.
        refusal: why a number of groups of heads cannot be; the nearest that can is taken.

    Raises:
        RecipeError: the heads alone exceed the target, or too few neurons are left to fill it.
    """
    of_heads = [width for width in widths if width.kind == "heads"]
    neurons = [width for width in widths if width.kind == "neurons"]
    counts = {}
    for width in of_heads:
        gone = heads // len(of_heads) if structure == "UL-MM" else _published(width, sparsity, structure)
        counts[width.name] = _left(width, gone)
    if of_heads and refusal(counts[of_heads[0].name]):
        wanted = counts[of_heads[0].name]
        counts = dict.fromkeys(counts, allowed(widths, target, wanted, refusal, structure == "UL-MM"))
    if not of_heads and (reason := refusal(None)):
        raise RecipeError(f"--portable: no stock class holds the result ({reason}). --set method.bias=false may do.")
    if structure != "UL-MM" and (compat == "reference" or not neurons):
        return counts | {width.name: _left(width, _published(width, sparsity, structure)) for width in neurons}
    by_name = {width.name: width for width in widths}
    spent = sum(_cost(by_name[name]) * (by_name[name].groups - count) for name, count in counts.items())
    whole = sum(_cost(width) * width.groups for width in neurons)
    share = (target - spent) / whole if whole else 0.0
    if not 0 <= share < 1:
        raise RecipeError(f"{spent:,} weights go with the heads; that does not leave 0 to {whole:,} for the neurons.")
    return counts | {width.name: width.groups - _round(share * width.groups, compat, width) for width in neurons}


def uniform(widths: Sequence[Width], scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Width → mask with so many of its own highest."""
    return {width.name: highest(scores[width.name], counts[width.name]) for width in widths}


def adaptive(
    widths: Sequence[Width], scores: Mapping[str, Tensor], target: int, heads: int | None, compat: str
) -> dict[str, Tensor]:
    """Width → mask, from one threshold over the standardised scores of all widths.

    At least the best group of every width stays, whatever its score.

    Args:
        widths: all that may be narrowed.
        scores: of their groups, comparable between widths.
        target: weights to remove.
        heads: None (AL-AM): heads and neurons compete at the price of their weights; else (AL-MM) so many heads go.
        compat: `exact`: groups stay, best first, as long as they fit into what may stay. `reference`: the published
            search, whose head costs a whole number of neurons and which also removes the group at the threshold.

    Raises:
        RecipeError: more heads are to go than can.
    """
    if heads is None:
        return _pooled(widths, scores, target, compat)
    of_heads = [width for width in widths if width.kind == "heads"]
    neurons = [width for width in widths if width.kind == "neurons"]
    check_heads(widths, heads)
    masks = _drop_lowest(of_heads, scores, heads)
    spent = sum(int(width.weights[~masks[width.name]].sum()) for width in of_heads)
    unit = max((_cost(width) for width in neurons), default=1.0)
    return masks | _drop_lowest(neurons, scores, max(0, int((target - spent) / unit)))


def check_heads(widths: Sequence[Width], heads: int) -> None:
    """See that so many groups of heads can go.

    Raises:
        RecipeError: there are not so many to spare.
    """
    most = sum(width.groups - 1 for width in widths if width.kind == "heads")
    if not 0 <= heads <= most:
        raise RecipeError(f"method.heads is {heads}; 0 to {most} groups of heads of this model can go.")


def _pooled(widths: Sequence[Width], scores: Mapping[str, Tensor], target: int, compat: str) -> dict[str, Tensor]:
    values = torch.cat([scores[width.name].double().cpu() for width in widths])
    costs = torch.cat([width.weights for width in widths])
    safe = torch.cat([_best(scores[width.name]) for width in widths])
    total = int(costs.sum())
    if compat == "reference":
        unit = min(_cost(width) for width in widths)
        prices = torch.cat([(width.weights / unit).long() for width in widths]).double()
        order = values.argsort(descending=True, stable=True)
        kept = (1 - target / total) * prices.sum()
        threshold = values[order][(prices[order].cumsum(0) - kept).abs().argmin()]
        keep = (values > threshold) | safe
    else:
        # Those that must stay come first.
        order = torch.where(safe, torch.inf, values).argsort(descending=True, stable=True)
        keep = safe.clone()
        keep[_fitting(order, costs, total - target)] = True
    parts = keep.split([width.groups for width in widths])
    return {width.name: part for width, part in zip(widths, parts, strict=True)}


def _fitting(order: Tensor, costs: Tensor, room: int) -> Tensor:
    """Groups that stay: in this order as long as they fit, and behind the first that does not, those that still do.

    So heads at the threshold that do not fit make way for neurons below it, at most as many as they cost: the budget is
    met to the price of a neuron, and shares that are compared are equal.
    """
    prices = costs[order].tolist()
    kept = []
    for group, price in zip(order.tolist(), prices, strict=True):
        if price <= room:
            kept.append(group)
            room -= price
    return torch.tensor(kept, dtype=torch.int64)


def _drop_lowest(widths: Sequence[Width], scores: Mapping[str, Tensor], gone: int) -> dict[str, Tensor]:
    """Masks without the `gone` lowest groups of all widths together."""
    if not widths:
        return {}
    values = torch.cat([scores[width.name].double().cpu() for width in widths])
    safe = torch.cat([_best(scores[width.name]) for width in widths])
    order = torch.where(safe, torch.inf, values).argsort(stable=True)
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[order[: min(gone, int((~safe).sum()))]] = False
    parts = keep.split([width.groups for width in widths])
    return {width.name: part for width, part in zip(widths, parts, strict=True)}


def _published(width: Width, sparsity: float, structure: Structure) -> int:
    """How many groups go of one width. LLM-Pruner counts channels of the smallest producer and keeps int(share)."""
    if structure != "local":
        return int(sparsity * width.groups)
    channels = min(len(member.groups) for member in width.rows)
    return (channels - int(channels * (1 - sparsity))) // (channels // width.groups)


def _left(width: Width, gone: int) -> int:
    if gone >= width.groups:
        raise RecipeError(f"{gone} of {width.groups} {width.kind} of {width.name} would go; at least one must stay.")
    return width.groups - gone


def _best(scores: Tensor) -> Tensor:
    return highest(scores.cpu(), 1)


def _cost(width: Width) -> float:
    """Weights in one group, on average."""
    return float(width.weights.sum()) / width.groups


def _round(value: float, compat: str, width: Width) -> int:
    gone = int(value) if compat == "reference" else round(value)
    return min(gone, width.groups - 1)
