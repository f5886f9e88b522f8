"""How many experts each mixture keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from prunus.errors import RecipeError
from prunus.methods.shape import Blocks
from prunus.sites import Pool

Counts = Literal["uniform", "inverse", "rank"]
# An importance below this share of the largest counts as this share: a mixture that is worth nothing loses all it can.
FLOOR = 1e-9


def target(survey: Blocks, sparsity: float) -> float:
    """How many weights of experts are to go, so that the matrices of all blocks lose `sparsity`.

    Raises:
        RecipeError: so many cannot go, since routers need more experts than would be left.
    """
    pools, size = pools_of(survey), _size(survey)
    wanted, unit = sparsity * size, min(_price(pool) for pool in pools)
    most = sum(_units(pool) * _price(pool) for pool in pools)
    if wanted > most + unit / 2:
        tight = min(pools, key=lambda pool: _units(pool) / pool.groups)
        raise RecipeError(
            f"A sparsity of {sparsity:g} needs more experts gone than can go: {tight.name} has {tight.groups}, and its "
            f"router needs {tight.least}. Ask for a sparsity of 0 to {_down(most / size)}."
        )
    return wanted


def uniform(survey: Blocks, sparsity: float) -> dict[str, int]:
    """Mixture -> how many of its experts stay: the same share of each, so that the matrices of blocks lose `sparsity`.

    Raises:
        RecipeError: fewer experts than the router picks would be left.
    """
    pools, size = pools_of(survey), _size(survey)
    share = sparsity * size / sum(int(pool.weights.sum()) for pool in pools)
    left = {}
    for pool in pools:
        gone = round(share * pool.groups / pool.spans) * pool.spans
        if gone > pool.groups - pool.least:
            reach = sum(_units(one) * _price(one) for one in pools) / size
            raise RecipeError(
                f"{pool.name}: {gone} of {pool.groups} experts would go, and its router needs {pool.least}: ask for a "
                f"sparsity of 0 to {_down(reach)}."
            )
        left[pool.name] = pool.groups - gone
    return left


def apportioned(
    pools: Sequence[Pool], importance: Mapping[str, float], wanted: float, counts: Counts
) -> dict[str, int]:
    """Mixture -> how many of its experts stay: more where the mixture is more important (MoE-I², §3.1).

    Experts go in proportion to 1 / importance, or to the place in the order of importances, the most important last;
    a mixture keeps what its router needs, and the others take over. Whole experts are dealt by the largest remainder,
    from a router that chooses among groups one of each group at a time. Off by half a unit at most.

    Args:
        pools: all mixtures.
        importance: mixture -> at least 0.
        wanted: weights that shall go.
        counts: `inverse` or `rank`.
    """
    shares = _SHARES[counts]([importance[pool.name] for pool in pools])
    raw = _filled(pools, dict(zip((pool.name for pool in pools), shares, strict=True)), wanted)
    units = {pool.name: int(raw[pool.name] + 1e-9) for pool in pools}
    rest = wanted - sum(units[pool.name] * _price(pool) for pool in pools)
    order = sorted(pools, key=lambda pool: units[pool.name] - raw[pool.name])  # stable: ties go to the first
    dealt = True
    while dealt:
        dealt = False
        for pool in order:
            if units[pool.name] < _units(pool) and rest >= _price(pool) / 2:
                units[pool.name] += 1
                rest -= _price(pool)
                dealt = True
    return {pool.name: pool.groups - units[pool.name] * pool.spans for pool in pools}


def pools_of(survey: Blocks) -> list[Pool]:
    """All mixtures in model order."""
    return [pool for block in survey.blocks for pool in block.pools]


def _filled(pools: Sequence[Pool], shares: Mapping[str, float], wanted: float) -> dict[str, float]:
    """Units in proportion to shares, none above what its mixture can spare: those that would be are full."""
    free, raw, rest = list(pools), {}, wanted
    while free:
        scale = rest / sum(shares[pool.name] * _price(pool) / pool.spans for pool in free)
        raw |= {pool.name: scale * shares[pool.name] / pool.spans for pool in free}
        full = [pool for pool in free if raw[pool.name] > _units(pool)]
        if not full:
            break
        raw |= {pool.name: float(_units(pool)) for pool in full}
        rest -= sum(_units(pool) * _price(pool) for pool in full)
        free = [pool for pool in free if pool not in full]
    return raw


def _inverse(values: Sequence[float]) -> list[float]:
    most = max(values)
    return [1 / max(value / most, FLOOR) if most else 1.0 for value in values]


def _rank(values: Sequence[float]) -> list[float]:
    # 1 for the most important; equals share their places.
    return [sum(other > value for other in values) + (values.count(value) + 1) / 2 for value in values]


_SHARES: dict[str, Callable[[Sequence[float]], list[float]]] = {"inverse": _inverse, "rank": _rank}
assert set(_SHARES) | {"uniform"} == set(get_args(Counts))


def _units(pool: Pool) -> int:
    """How often one expert of each group can go."""
    return (pool.groups - pool.least) // pool.spans


def _price(pool: Pool) -> int:
    """Weights of one expert of each group."""
    return pool.spans * int(pool.weights[0])


def _size(survey: Blocks) -> int:
    return sum(info.size for block in survey.blocks for info in block.infos)


def _down(share: float) -> str:
    return f"{int(1000 * share) / 1000:g}"
