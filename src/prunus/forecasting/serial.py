"""A series of numbers as a text of equal-length integers, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunus.errors import ModelError

# The observed range becomes 0.15 … 0.85 of the states, so that forecasts may leave it a little.
LOW, SPAN = 0.15, 0.70


@dataclass(frozen=True)
class Scale:
    """Between values and states 0 … 10**digits - 1.

    Attributes:
        low: the value at 0.15 of the states.
        span: the range of values that becomes 0.70 of them, at least 0; 0 for a constant.
        digits: of a state.
    """

    low: float
    span: float
    digits: int

    @classmethod
    def of(cls, values: np.ndarray, digits: int) -> Scale:
        """From the least to the largest of `values`, which must be finite."""
        return cls(float(values.min()), float(values.max() - values.min()), digits)

    @property
    def states(self) -> int:
        """How many there are."""
        return 10**self.digits

    def bins(self, values: np.ndarray) -> np.ndarray:
        """The state of each value, int64; one integer a value, so that values on the grid stay in their own bin."""
        share = np.zeros_like(values, dtype=float) if self.span == 0 else (values - self.low) / self.span
        return np.clip(np.floor(self.states * (LOW + SPAN * share) + 1e-9), 0, self.states - 1).astype(np.int64)

    def values(self, bins: np.ndarray) -> np.ndarray:
        """The value at the centre of each state (of a constant series, the constant)."""
        share = ((np.asarray(bins, dtype=float) + 0.5) / self.states - LOW) / SPAN
        return self.low + self.span * share


@dataclass(frozen=True)
class Alphabet:
    """How a tokenizer writes numbers, as ids.

    Attributes:
        kind: "digit": each digit is a token; "triple": three digits are one (Llama 3); "forced": a text would get other
            tokens, but single digits exist and are given to the model as such.
        symbols: the ids of 0 … 9, or of 000 … 999.
        comma: the id of ",".
        head: ids that stand before any text.
    """

    kind: str
    symbols: tuple[int, ...]
    comma: int
    head: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Digits in one token."""
        return len(str(len(self.symbols) - 1))

    def number(self, state: int, digits: int) -> list[int]:
        """The ids of a state, padded with zeros, without a comma.

        Raises:
            ModelError: digits that do not fill whole tokens.
        """
        if digits % self.width:
            raise ModelError(f"This tokenizer writes {self.width} digits as one token; use {self.width} digits.")
        text = f"{state:0{digits}d}"
        return [self.symbols[int(text[place : place + self.width])] for place in range(0, digits, self.width)]

    def write(self, states: Sequence[int] | np.ndarray, digits: int) -> list[int]:
        """The ids of `12,05,33,` with what stands before any text."""
        ids = list(self.head)
        for state in states:
            ids += [*self.number(int(state), digits), self.comma]
        return ids

    def read(self, ids: Sequence[int], digits: int) -> list[int]:
        """The states that `write` wrote."""
        places = {index: symbol for symbol, index in enumerate(self.symbols)}
        states, current = [], ""
        for index in ids[len(self.head) :]:
            if index == self.comma:
                assert len(current) == digits
                states.append(int(current))
                current = ""
            else:
                current += f"{places[index]:0{self.width}d}"
        return states


def probe_number_tokenizer(tokenizer: Any, head: Sequence[int] = ()) -> Alphabet:
    """How `tokenizer` writes numbers, found by trying.

    Args:
        tokenizer: of the model.
        head: ids that stand before any text, such as a BOS.

    Raises:
        ModelError: no single token for some digit or for the comma.
    """

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def after(text: str, new: str) -> int | None:
        """The one token that `new` adds behind `text`, if it is one."""
        before, both = ids(text), ids(text + new)
        return both[-1] if len(both) == len(before) + 1 and both[:-1] == before else None

    triples = [after("000,", f"{number:03d}") for number in range(1000)] if after("000,", "123") is not None else [None]
    comma = after("000", ",") if None not in triples else after("0", ",")
    if None not in triples and len(set(triples)) == 1000 and comma is not None:
        return Alphabet("triple", tuple(triples), comma, tuple(head))  # pyright: ignore[reportArgumentType]
    digits = [after("0,", str(digit)) for digit in range(10)]
    comma = comma if comma is not None else after("0", ",")
    if None in digits or len(set(digits)) < 10 or comma is None:
        raise ModelError("This model's tokenizer has no single tokens for digits and comma, so numbers cannot be read.")
    made = Alphabet("digit", tuple(digits), comma, tuple(head))  # pyright: ignore[reportArgumentType]
    trial = ids("0,12,345,678,901,")
    lead = len(ids("0")) - 1  # some tokenizers put a blank before the first piece
    wanted = [made.symbols[int(sign)] if sign != "," else comma for sign in "0,12,345,678,901,"]
    return made if trial[lead:] == wanted else Alphabet("forced", made.symbols, comma, tuple(head))
