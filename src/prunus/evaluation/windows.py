"""A text cut into windows that do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prunus.data.reading import Reading
from prunus.data.tokens import folder_positions, head_token, load_tokenizer, stream
from prunus.errors import CalibrationError, RecipeError


@dataclass(frozen=True)
class Windows:
    """All windows of a text for one model.

    Attributes:
        ids: int64 [windows, length].
        head: the BOS that the model reads before each window, or None.
        text_tokens: tokens in the whole text, the dropped tail included.
        source: for messages.
    """

    ids: Tensor
    head: int | None
    text_tokens: int
    source: str

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs [1, length] and the targets of window `index`: length - 1 of them, or length where a BOS stands first.

        With a BOS the window's last token is only a target: it is not read, so `length` positions are enough.
        """
        window = self.ids[index]
        if self.head is None:
            return window[None], window[1:]
        return torch.cat([window.new_tensor([self.head]), window[: len(window) - 1]])[None], window


def cut(reading: Reading, folder: Path, length: int, bos: str) -> Windows:
    """The windows of `reading` for the model in `folder`: w-th = tokens [length·w, length·(w+1)); the tail is dropped.

    Ids from a file are cut within each row and taken as they are: a BOS comes before them only if `bos="always"`.

    Raises:
        CalibrationError: fewer tokens than one window, ids beyond the vocabulary, no tokenizer.
        RecipeError: windows longer than the model's positions; a BOS asked where there is none.
    """
    check_positions(folder, length)
    if reading.documents:
        tokenizer = load_tokenizer(folder)
        head = head_token(tokenizer, bos)
        rows = torch.from_numpy(stream(reading, tokenizer))[None]
    elif set(reading.arrays) == {"input_ids"}:
        head = head_token(load_tokenizer(folder), bos) if bos == "always" else None
        rows = torch.from_numpy(reading.arrays["input_ids"])
    else:
        raise CalibrationError(
            f"{reading.source} holds inputs other than input_ids; perplexity needs text or token ids."
        )
    if rows.shape[1] < length:
        kind = "tokens" if len(rows) == 1 else "tokens in each row"
        raise CalibrationError(
            f"{reading.source} has {rows.shape[1]} {kind}, fewer than one window of {length}; give a smaller length."
        )
    ids = rows[:, : rows.shape[1] // length * length].reshape(-1, length)
    return Windows(ids, head, rows.numel(), reading.source)


def check_positions(folder: Path, length: int) -> None:
    """Refuse windows that the model has no positions for.

    Raises:
        RecipeError: naming the limit of config.json.
    """
    limit = folder_positions(folder)
    if limit is not None and length > limit:
        raise RecipeError(
            f"Windows of {length} tokens are longer than the model's {limit} positions; use length {limit}."
        )


def choose(total: int, windows: int | None, indices: Sequence[int] | None, source: str) -> list[int]:
    """Which windows to measure: `indices`, or the first `windows`, or all.

    Raises:
        CalibrationError: if the text has fewer.
    """
    chosen = list(range(total if windows is None else windows)) if indices is None else list(indices)
    if max(chosen) >= total or min(chosen) < 0:
        wanted = f"{windows} were asked" if indices is None else f"number {max(chosen)} was asked"
        raise CalibrationError(
            f"{source} has {total} windows of this length, {wanted}; ask for fewer or a smaller length."
        )
    return chosen


def check_numbers(length: int, windows: int | None, indices: Sequence[int] | None) -> None:
    """Refuse lengths under 2, a window count under 1, and both ways to name windows at once.

    Raises:
        RecipeError: naming the number.
    """
    for name, value, least in (("length", length, 2), ("windows", windows, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise RecipeError(f"The evaluation's {name} is a whole number of at least {least}, not {value!r}.")
    if indices is not None and (windows is not None or len(indices) == 0):
        raise RecipeError(
            "Name the windows either by `windows`, how many from the start, or by `indices`, at least one."
        )
