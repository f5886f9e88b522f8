"""Which rank every matrix gets, so that all together lose the asked share of their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.sites import SiteInfo


def most(info: SiteInfo, step: int) -> int:
    """The largest multiple of `step` at which two factors hold fewer weights than the matrix; 0: none does."""
    return (info.size - 1) // sum(info.shape) // step * step


def reachable(infos: list[SiteInfo], step: int, target: int) -> None:
    """See that so many weights can go.

    Raises:
        RecipeError: they cannot; says how many can.
    """
    can = sum(info.size - step * sum(info.shape) for info in infos if most(info, step))
    if target > can:
        raise RecipeError(
            f"At rank {step}, the lowest, {can:,} weights of {len(infos)} matrices go, and {target:,} were to. Ask for "
            "less, or ignore less."
        )


def uniform(infos: list[SiteInfo], step: int, target: int) -> dict[str, int]:
    """The same share of every matrix, to within one step of one of them.

    Args:
        infos: the matrices.
        step: ranks are multiples of this.
        target: weights to remove.

    Returns:
        Matrix -> rank, of those that become two factors.
    """
    if not target:
        return {}
    infos = [info for info in infos if most(info, step)]
    share = target / sum(info.size for info in infos)
    exact = {info.name: (1 - share) * info.size / sum(info.shape) / step for info in infos}
    ranks = {info.name: min(max(step * int(exact[info.name]), step), most(info, step)) for info in infos}
    # Rounded down, a little too much goes; those that lost most by it get a step back while that leaves enough.
    surplus = sum(info.size - ranks[info.name] * sum(info.shape) for info in infos) - target
    order = sorted(infos, key=lambda info: int(exact[info.name]) - exact[info.name])
    for info in order:
        while step * sum(info.shape) <= surplus and ranks[info.name] + step <= most(info, step):
            ranks[info.name] += step
            surplus -= step * sum(info.shape)
    for info in order:  # of a tiny share, matrices that need not go at all
        saved = info.size - ranks[info.name] * sum(info.shape)
        if saved <= surplus:
            surplus -= saved
            del ranks[info.name]
    # Where rank `step` is the end for some matrices, others give what is missing.
    for info in reversed(order):
        while surplus < 0 and ranks.get(info.name, 0) > step:
            ranks[info.name] -= step
            surplus += step * sum(info.shape)
    return ranks


def water_filled(infos: list[SiteInfo], losses: Mapping[str, Tensor], step: int, target: int) -> dict[str, int]:
    """Ranks of the smallest summed loss: weights go where a weight costs least, all matrices together.

    A matrix that stays whole loses nothing, and the first rank that saves anything loses much at once; so each matrix
    first jumps to the rank where loss per weight is smallest, and then goes on rank by rank.

    Args:
        infos: the matrices.
        losses: matrix -> loss at every rank, float64 `[min(out, in) + 1]`, convex and falling to 0.
        step: ranks are multiples of this.
        target: weights to remove.

    Returns:
        Matrix -> rank, of those that become two factors; at least `target` weights go, and less than one step of one
        matrix more.
    """
    if not target:
        return {}
    infos = [info for info in infos if most(info, step)]
    moves = [_moves(info, losses[info.name], step) for info in infos]
    owner = torch.cat([torch.full((len(gains),), number) for number, (_, gains) in enumerate(moves)])
    price, gain = (torch.cat(parts) for parts in zip(*moves, strict=True))
    order = price.sort(stable=True).indices
    gone = gain[order].cumsum(0)
    taken = int((gone < target).sum()) + 1  # the move that reaches the target is the last
    counts = torch.bincount(owner[order[:taken]], minlength=len(infos)).tolist()
    ranks = {}
    for info, (_, gains), count in zip(infos, moves, counts, strict=True):
        if count:
            ranks[info.name] = (info.size - int(gains[:count].sum())) // sum(info.shape)
    last = infos[int(owner[order[taken - 1]])]
    # A jump may go further than is needed: any rank on its way does as well.
    cost = step * sum(last.shape)
    spare = (int(gone[taken - 1]) - target) // cost * step
    ranks[last.name] = min(ranks[last.name] + spare, most(last, step))
    return ranks


def _moves(info: SiteInfo, loss: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Ways to make a matrix smaller, in order: loss per weight, float64, not falling; and weights that each saves."""
    top = most(info, step)
    ranks = torch.arange(top, 0, -step)
    saved = info.size - ranks * sum(info.shape)
    lost = loss.cpu()[ranks]
    first = int((lost / saved).argmin())
    price = torch.cat([(lost / saved)[first : first + 1], lost[first:].diff() / (step * sum(info.shape))])
    gain = torch.cat([saved[first : first + 1], saved[first:].diff()])
    return price.cummax(0).values, gain
