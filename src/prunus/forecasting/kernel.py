"""Transition probabilities read from a language model's digits."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunus.forecasting.serial import Alphabet

CHUNK = 256  # positions whose logits exist at once


@dataclass(frozen=True)
class Reading:
    """What a model says about a series.

    Attributes:
        rows: state -> law of the next state float64 [states], read where the state was last seen: after the longest
            context.
        surprise: -log p(next state) in nats, for all but the first state, float64 [length - 1].
    """

    rows: dict[int, np.ndarray]
    surprise: np.ndarray


class Context:
    """A text that a model has read, and what it would write after any part of it.

    Attributes:
        log_p: log-softmax over the symbols alone after each id, float32 [ids, symbols]: what else the model might write
            (a comma, a word) does not count.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, ids: Sequence[int], alphabet: Alphabet, *, temperature: float = 1.0) -> None:
        """Read `ids`; `temperature` divides the symbols' logits."""
        self.model, self.ids, self.temperature = model, list(ids), temperature
        self.device = getattr(model, "device", torch.device("cpu"))
        self.columns = torch.tensor(alphabet.symbols, device=self.device)
        self.cache: Any = None
        parts = []
        text = torch.tensor([self.ids], device=self.device)
        for piece in text.split(CHUNK, dim=1):
            output = self.model(input_ids=piece, past_key_values=self.cache, use_cache=True)
            if output.past_key_values is None:  # a model without a cache reads all at once
                parts = [self._softmax(self.model(input_ids=text).logits[0])]
                break
            self.cache = output.past_key_values
            parts.append(self._softmax(output.logits[0]))
        self.log_p = torch.cat(parts)
        self._tree: bool | None = None if self.cache is not None else False

    def branches(self, length: int, paths: Sequence[tuple[int, ...]]) -> Tensor:
        """Log p of the next symbol after the first `length` ids and each path of ids, float32 [paths, symbols].

        Lengths must not grow from call to call: what lies behind is forgotten.

        Args:
            length: at least 1.
            paths: closed under taking prefixes, shorter ones first, none empty.
        """
        if self._tree is None:
            self._tree = self._try(length, paths)
        return self._by_tree(length, paths) if self._tree else self._one_by_one(length, paths)

    def _try(self, length: int, paths: Sequence[tuple[int, ...]]) -> bool:
        """True if this model reads a tree of branches right: in one pass, each branch seeing its own past alone."""
        kept = copy.deepcopy(self.cache)
        try:
            found = self._by_tree(length, paths)
        except (ValueError, RuntimeError, TypeError, NotImplementedError, AttributeError, IndexError):
            return False
        self.cache = kept
        return bool(torch.allclose(found.exp(), self._one_by_one(length, paths).exp(), atol=2e-3))

    @torch.inference_mode()
    def _by_tree(self, length: int, paths: Sequence[tuple[int, ...]]) -> Tensor:
        self._forget(length)
        seen = torch.zeros(len(paths), length + len(paths), dtype=torch.bool)
        seen[:, :length] = True
        places = {path: place for place, path in enumerate(paths)}
        for path, place in places.items():
            for depth in range(1, len(path) + 1):
                seen[place, length + places[path[:depth]]] = True
        kind = next(self.model.parameters()).dtype
        mask = torch.zeros(seen.shape, dtype=kind).masked_fill_(~seen, torch.finfo(kind).min)
        output = self.model(
            input_ids=torch.tensor([[path[-1] for path in paths]], device=self.device),
            attention_mask=mask[None, None].to(self.device),
            position_ids=torch.tensor([[length + len(path) - 1 for path in paths]], device=self.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        self._forget(length)
        return self._softmax(output.logits[0])

    def _forget(self, length: int) -> None:
        """Keep the first `length` ids alone."""
        behind = self.cache.get_seq_length() - length
        if behind > 0:
            self.cache.crop(-behind)

    @torch.inference_mode()
    def _one_by_one(self, length: int, paths: Sequence[tuple[int, ...]]) -> Tensor:
        rows = [
            self.model(input_ids=torch.tensor([[*self.ids[:length], *path]], device=self.device)).logits[0, -1:]
            for path in paths
        ]
        return self._softmax(torch.cat(rows))

    def _softmax(self, logits: Tensor) -> Tensor:
        return (logits[:, self.columns].float() / self.temperature).log_softmax(-1)


def read_kernel(
    model: Any,
    states: np.ndarray,
    alphabet: Alphabet,
    digits: int,
    *,
    temperature: float = 1.0,
    done: Callable[[int, int], None] | None = None,
) -> Reading:
    """The rows of the kernel that a model infers from a series.

    By hierarchical softmax (Liu et al. 2024), rows as in Zekri et al. 2024. Every row is at full resolution: a state's
    probability is the product of the probabilities of its symbols, each given those before it.

    Args:
        model: a causal language model.
        states: int [length], in 0 … 10**digits - 1.
        alphabet: of its tokenizer.
        digits: of a state, whole tokens.
        temperature: divides the digits' logits; above 1 it makes the laws flatter.
        done: told after each row how many are done, of how many.

    Raises:
        ModelError: digits that do not fill whole tokens.
    """
    ids = alphabet.write(states, digits)
    context = Context(model, ids, alphabet, temperature=temperature)
    size = digits // alphabet.width
    ends = len(alphabet.head) + (size + 1) * np.arange(1, len(states) + 1)  # just behind the comma of each state
    last = {int(state): int(end) for state, end in zip(states, ends, strict=True)}
    paths = [path for depth in range(1, size) for path in product(alphabet.symbols, repeat=depth)]
    rows: dict[int, np.ndarray] = {}
    for state, end in sorted(last.items(), key=lambda item: -item[1]):
        law = context.log_p[end - 1].double()
        inner = context.branches(end, paths).double() if paths else law.new_zeros(0)
        for depth in range(1, size):
            first = sum(len(alphabet.symbols) ** shorter for shorter in range(1, depth))
            level = inner[first : first + len(alphabet.symbols) ** depth]
            law = (law[:, None] + level).flatten()
        probabilities = law.exp()
        rows[state] = (probabilities / probabilities.sum()).cpu().numpy()
        if done:
            done(len(rows), len(last))
    return Reading(rows, _surprise(context.log_p, ids, alphabet, ends, size))


def _surprise(log_p: Tensor, ids: list[int], alphabet: Alphabet, ends: np.ndarray, size: int) -> np.ndarray:
    places = {index: symbol for symbol, index in enumerate(alphabet.symbols)}
    total = np.zeros(len(ends) - 1)
    for depth in range(size):
        at = ends[:-1] + depth
        symbols = [places[ids[place]] for place in at]
        total -= log_p[torch.as_tensor(at - 1), torch.tensor(symbols)].double().cpu().numpy()
    return total
