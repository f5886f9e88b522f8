"""Which experts of a mixture stay, once it is known how many: by a score, or by trying subsets."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from prunus.errors import RecipeError
from prunus.methods.experts.replay import Replay
from prunus.methods.experts.scores import ExpertScore, RouterWeighted
from prunus.methods.experts.seen import Seen
from prunus.sites import Pool

# Subsets that the exhaustive search tries in a mixture, at most: C(16, 8).
SUBSETS = math.comb(16, 8)

# Numbers of the experts that go, in order.
Gone = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One mixture of a loaded block.

    Attributes:
        pool: the mixture.
        seen: what it did on all of the text.
        replay: runs it again on some of the text with experts closed.
        left: how many experts stay, in (0, experts).
    """

    pool: Pool
    seen: Seen
    replay: Replay
    left: int


class Choice(Protocol):
    """A frozen dataclass that says which experts stay.

    Attributes:
        compares: it runs mixtures again, which only one process can.
        candidates: how many subsets it gives at most.
        span: mixtures in a row among whose candidates the best combination is tried; 1: the best of each stays.
    """

    @property
    def compares(self) -> bool:
        """See the class."""
        ...

    @property
    def candidates(self) -> int:
        """See the class."""
        ...

    @property
    def span(self) -> int:
        """See the class."""
        ...

    def check(self, pool: Pool, left: int) -> None:
        """See before the work that a mixture of this size can be done.

        Raises:
            RecipeError: it cannot; says what can.
        """
        ...

    def __call__(self, case: Case) -> Tensor:
        """Bool `[at least 1, experts]`, True = kept, the best first; equally many of each group of the router."""
        ...


@dataclass(frozen=True)
class Ranked:
    """The experts of lowest score go.

    Attributes:
        score: what an expert is worth.
    """

    score: ExpertScore = field(default_factory=RouterWeighted)

    compares = False
    candidates = 1
    span = 1

    def check(self, pool: Pool, left: int) -> None:
        """Any mixture will do."""

    def __call__(self, case: Case) -> Tensor:
        """See the protocol."""
        return best(self.score(case.seen), case.left, case.pool.spans)[None]


@dataclass(frozen=True)
class Exhaustive:
    """Of all subsets, that whose mixture differs least from the dense one: argmin Σ ‖Z − Z_D‖_F (NAEE, §3.2)."""

    compares = True
    candidates = 1
    span = 1

    def check(self, pool: Pool, left: int) -> None:
        """See the protocol."""
        tries = number(pool, left)
        if tries > SUBSETS:
            raise RecipeError(
                f"{pool.name} has {tries:,} subsets of {left} of {pool.groups} experts, too many to try all. Use "
                "--method moe-i2 or reap, or remove fewer."
            )

    def __call__(self, case: Case) -> Tensor:
        """See the protocol."""
        costs = Costs(case)
        return costs.best(every(case.pool, case.left), self.candidates)


@dataclass(frozen=True)
class Genetic:
    """Subsets bred towards the smallest Σ ‖Z − Z_D‖_F, and the best combination of mixtures in a row (MoE-I², §3.1).

    A child has experts of its two parents' that go, at random, and one of them exchanged. Where there are fewer subsets
    than trials, all are tried.

    Attributes:
        population: subsets in a generation, at least 4.
        generations: at least 1.
        parents: share of a generation that breeds and lives on, in (0, 1).
        candidates: subsets of a mixture that are tried together with its neighbours', at least 1.
        span: mixtures in a row that are tried together, at least 1; candidates ** span combinations.
        seed: of the search.
    """

    population: int = 100
    generations: int = 50
    parents: float = 0.2
    candidates: int = 3
    span: int = 3
    seed: int = 0

    compares = True

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            RecipeError: a number is out of its range.
        """
        for name, least in (("population", 4), ("generations", 1), ("candidates", 1), ("span", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"choice.{name} is {getattr(self, name)}; it must be at least {least}.")
        if not 0 < self.parents < 1:
            raise RecipeError(f"choice.parents is {self.parents:g}; it must be in (0, 1).")
        if self.candidates**self.span > 1000:
            raise RecipeError(
                f"choice.candidates = {self.candidates} and choice.span = {self.span} make "
                f"{self.candidates**self.span:,} combinations; at most 1,000 are tried."
            )

    def check(self, pool: Pool, left: int) -> None:
        """Any mixture will do."""

    def __call__(self, case: Case) -> Tensor:
        """See the protocol."""
        costs, pool = Costs(case), case.pool
        breeding = max(2, round(self.parents * self.population))
        if number(pool, case.left) <= self.population + self.generations * (self.population - breeding):
            return costs.best(every(pool, case.left), self.candidates)
        # A stream of its own for every mixture: a resumed run does not draw what was drawn before.
        dice = random.Random(f"{self.seed} {pool.name}")
        people = founders(pool, case.left, self.population, dice)
        for _ in range(self.generations):
            people = sorted(people, key=lambda one: (costs(one), one))[:breeding]
            couples = (dice.sample(people, 2) for _ in range(self.population - breeding))
            people = [*people, *[child(pool, one, other, dice) for one, other in couples]]
        return costs.best(people, self.candidates)


class Costs:
    """Distances of subsets, each measured once."""

    def __init__(self, case: Case):
        """Nothing is measured yet."""
        self.case = case
        self.known: dict[Gone, float] = {}

    def __call__(self, gone: Gone) -> float:
        """How far the mixture without these experts is from the dense one."""
        if gone not in self.known:
            self.known[gone] = self.case.replay.distance(mask(self.case.pool, gone))
        return self.known[gone]

    def best(self, subsets: Iterator[Gone] | list[Gone], count: int) -> Tensor:
        """Of these and of all that were measured before, so many of the least distance; ties go to the first."""
        for gone in subsets:
            self(gone)
        order = sorted(self.known, key=lambda gone: (self.known[gone], gone))[:count]
        return torch.stack([mask(self.case.pool, gone) for gone in order])


def best(scores: Tensor, left: int, spans: int) -> Tensor:
    """Bool `[experts]`, True for the `left` highest scores, equally many of each group; ties go to the first."""
    keep = torch.zeros(len(scores), dtype=torch.bool)
    size = len(scores) // spans
    for span in range(spans):
        own = scores[span * size : (span + 1) * size]
        order = own.argsort(descending=True, stable=True)[: left // spans]
        keep[span * size + order] = True
    return keep


def mask(pool: Pool, gone: Gone) -> Tensor:
    """Bool `[experts]`, True = kept."""
    keep = torch.ones(pool.groups, dtype=torch.bool)
    keep[list(gone)] = False
    return keep


def number(pool: Pool, left: int) -> int:
    """How many subsets there are."""
    return math.comb(pool.groups // pool.spans, left // pool.spans) ** pool.spans


def every(pool: Pool, left: int) -> Iterator[Gone]:
    """All subsets of experts that could go, equally many of each group of the router."""
    for chosen in itertools.product(*(itertools.combinations(one, _each(pool, left)) for one in _groups(pool))):
        yield tuple(itertools.chain(*chosen))


def founders(pool: Pool, left: int, count: int, dice: random.Random) -> list[Gone]:
    """So many different subsets at random; there are more."""
    found: dict[Gone, None] = {}
    while len(found) < count:
        found[_sorted(dice.sample(one, _each(pool, left)) for one in _groups(pool))] = None
    return list(found)


def child(pool: Pool, one: Gone, other: Gone, dice: random.Random) -> Gone:
    """Of every group so many of the parents' experts as one of them has, then one expert exchanged for an unused."""
    parts = []
    for group in _groups(pool):
        union = sorted({*one, *other}.intersection(group))
        parts.append(dice.sample(union, len(set(one).intersection(group))))
    place = dice.randrange(pool.spans)
    unused = sorted(set(_groups(pool)[place]).difference(parts[place]))
    parts[place][dice.randrange(len(parts[place]))] = dice.choice(unused)
    return _sorted(parts)


def _groups(pool: Pool) -> list[range]:
    """Numbers of the experts of each group of the router."""
    size = pool.groups // pool.spans
    return [range(start, start + size) for start in range(0, pool.groups, size)]


def _each(pool: Pool, left: int) -> int:
    return (pool.groups - left) // pool.spans


def _sorted(parts: Iterator[list[int]] | list[list[int]]) -> Gone:
    return tuple(sorted(itertools.chain(*parts)))
