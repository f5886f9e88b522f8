"""Mixtures in a row tried together: of all combinations of their candidates the best (MoE-I²'s KT-reception field)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor

from prunus.methods.experts.seen import first
from prunus.methods.shape import Blocks
from prunus.models.pool import closed
from prunus.sites import Block
from prunus.statistics import SiteStats
from prunus.stream import Step

# Numbers of the candidates that were chosen so far, and what enters the next block then, one tensor per batch.
Way = tuple[tuple[int, ...], list[Tensor]]


def receive(survey: Blocks, candidates: Mapping[str, Tensor], span: int, tokens: int) -> dict[str, int]:
    """Block -> number of the candidate that stays: argmin over combinations of ‖X_out − X_out of the dense blocks‖_F.

    Whole blocks are run, attention and residual too, each field on the dense model's inputs. One block is in memory at
    a time: every combination so far goes through it before the next is loaded.

    Args:
        survey: the dense model.
        candidates: block with mixtures -> bool `[candidates, its experts]`, True = kept.
        span: blocks with mixtures in a field.
        tokens: calibration tokens to run, at least.
    """
    names = [block.name for block in survey.blocks if block.name in candidates]
    fields = [names[start : start + span] for start in range(0, len(names), span)]
    found = {number: survey.recall(f"field-{number}") for number in range(len(fields))}
    if None in found.values():
        walk = _Walk(survey, fields, candidates, tokens)
        survey.visit(walk.visit, frozenset())
        found = {number: survey.recall(f"field-{number}") for number in range(len(fields))}
    return {name: place for number, own in enumerate(fields) for name, place in zip(own, found[number], strict=True)}


class _Walk:
    """What is carried from block to block inside a field."""

    def __init__(self, survey: Blocks, fields: list[list[str]], candidates: Mapping[str, Tensor], tokens: int):
        self.survey, self.candidates, self.tokens = survey, candidates, tokens
        self.starts = {own[0]: number for number, own in enumerate(fields)}
        self.ends = {own[-1]: number for number, own in enumerate(fields)}
        self.ways: list[Way] = []

    def visit(self, step: Step, stats: Mapping[str, SiteStats]) -> None:
        """Send every way through the block; nothing is kept for a block, only for a whole field."""
        name = step.block.name
        if name in self.starts and self.survey.recall(f"field-{self.starts[name]}") is None:
            self.ways = [((), first(step, self.tokens))]
        if not self.ways:
            return
        if name in self.ends:
            self._decide(step)
        else:
            self.ways = list(self._through(step))

    def _decide(self, step: Step) -> None:
        least, best = math.inf, self.ways[0][0]
        for chosen, outputs in self._through(step):
            pairs = zip(outputs, step.dense, strict=False)  # the first batches
            # float64: combinations may differ by little.
            distance = sum(float((one.double() - own.double()).norm()) for one, own in pairs)
            if distance < least:
                least, best = distance, chosen
        self.ways = []
        self.survey.remember(f"field-{self.ends[step.block.name]}", list(best))

    def _through(self, step: Step) -> Iterator[Way]:
        """Each way with each candidate of this block, or as it is through a block without mixtures."""
        options = self.candidates.get(step.block.name)
        for chosen, inputs in self.ways:
            if options is None:
                yield chosen, step.through(inputs)
                continue
            for place, keep in enumerate(options):
                with _closed(step.block, keep):
                    yield (*chosen, place), step.through(inputs)


@contextmanager
def _closed(block: Block, keep: Tensor) -> Iterator[None]:
    """All mixtures of a block with only these of its experts."""
    with ExitStack() as stack:
        for pool, own in zip(block.pools, keep.split([pool.groups for pool in block.pools]), strict=True):
            stack.enter_context(closed(block, pool, own))
        yield
