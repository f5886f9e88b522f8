"""Calibration samples: text or ids from anywhere become `[samples, length]`, seeded and hashed."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.data.reading import HEAD, Reading, hash_arrays, read
from prunus.data.tokens import check_bos, check_vocabulary, head_token, load_tokenizer, stream
from prunus.errors import CalibrationError, RecipeError

if TYPE_CHECKING:
    import numpy as np

LOGGER = logging.getLogger("prunus")
# Bounded whatever the model's context is: 65,536 tokens, a few minutes for small models and enough for stable norms.
SAMPLES, LENGTH = 128, 512


@dataclass(frozen=True)
class Calibration:
    """What the model is shown before it is cut.

    Attributes:
        inputs: the model's arguments by name, first dimension `samples`; `input_ids` is int64 [samples, length].
        source: as given: a name, a path or a hub id.
        samples: number of sequences.
        length: tokens in each, a BOS included; 0 if there are no `input_ids`.
        seed: of the random windows; without effect on ids from files.
        sha256: over name, type, shape and bytes of the inputs: the same for the same tokens on every machine.
        bos: True if a BOS was put at the head of each sample here.
    """

    inputs: dict[str, Tensor]
    source: str
    samples: int
    length: int
    seed: int
    sha256: str
    bos: bool


def calibrate(
    source: str | Path,
    folder: Path,
    *,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    bos: str = "auto",
    vocabulary: int | None = None,
    limit: int | None = None,
) -> Calibration:
    """`samples` windows of `length` tokens from `source` (see `reading.read`), the same for the same arguments.

    Text is tokenised once into one stream (EOS between documents) and windows begin at random places in it. The
    originals draw documents until one is longer than the window, so that only the few long ones are ever seen (63 of
    2,000 of C4 at 2,048 tokens) and short texts loop for ever; a stream weighs every token alike and always ends.

    With a BOS (`tokens.head_token`) a sample is BOS + `length` - 1 tokens of text. Ids from a file are taken as they
    are, from its head: no windows, no BOS unless `bos="always"`, which puts one in front of rows that lack it (their
    last token goes).

    Args:
        source: text, file of text or ids, or data set.
        folder: the model's, for its tokenizer; not looked at for ids.
        samples: how many; None: 128, or all rows of a file of ids. If that has fewer, all are used, with a warning.
        length: tokens in each; None: 512, or the rows' own length. Never the model's context by itself.
        seed: 0 or more.
        bos: "auto", "always" or "never".
        vocabulary: number of embeddings; ids at or above it are refused.
        limit: most positions that the model allows.

    Raises:
        RecipeError: a number out of range, `length` over `limit`, BOS asked where there is none.
        CalibrationError: nothing there, not text, shorter than one sample, ids beyond the vocabulary, no tokenizer.
    """
    check(samples, length, seed, bos, limit)
    reading = read(source, purpose="calibration", head=HEAD)
    if reading.arrays:
        arrays, used = _from_arrays(reading, folder, samples, length, bos)
    else:
        default = LENGTH if limit is None else min(LENGTH, limit)
        arrays, used = _from_text(reading, folder, samples or SAMPLES, length or default, seed, bos)
    ids = arrays.get("input_ids")
    if ids is not None:
        check_vocabulary(ids, vocabulary, str(source))
        if limit is not None and ids.shape[1] > limit:
            raise CalibrationError(
                f"{source} has rows of {ids.shape[1]} tokens, the model {limit} positions; use length {limit}."
            )
    return Calibration(
        inputs={name: torch.from_numpy(array) for name, array in arrays.items()},
        source=str(source),
        samples=len(next(iter(arrays.values()))),
        length=0 if ids is None else ids.shape[1],
        seed=seed,
        sha256=hash_arrays(arrays),
        bos=used,
    )


def check(samples: int | None, length: int | None, seed: int, bos: str, limit: int | None = None) -> None:
    """What `calibrate` refuses before it reads anything; the arguments are its own.

    Raises:
        RecipeError: a number out of range, or `length` over `limit`.
    """
    for name, value, least in (("samples", samples, 1), ("length", length, 2), ("seed", seed, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise RecipeError(f"Calibration {name} is a whole number of at least {least}, not {value!r}.")
    check_bos(bos)
    if length is not None and limit is not None and length > limit:
        raise RecipeError(f"Samples of {length} tokens exceed the model's {limit} positions; use length {limit}.")


def _from_text(
    reading: Reading, folder: Path, samples: int, length: int, seed: int, bos: str
) -> tuple[dict[str, np.ndarray], bool]:
    tokenizer = load_tokenizer(folder)
    head = head_token(tokenizer, bos)
    tokens = stream(reading, tokenizer)
    return {"input_ids": windows(tokens, samples, length, seed, head, reading.source)}, head is not None


def windows(tokens: np.ndarray, samples: int, length: int, seed: int, head: int | None, source: str) -> np.ndarray:
    """Random windows of a stream, int64 [samples, length]; with `head` (a BOS) in front and one token of text fewer.

    Every start is equally likely, the first and the last token of the stream included; windows may overlap.

    Raises:
        CalibrationError: if the stream is shorter than one window.
    """
    import numpy as np

    width = length if head is None else length - 1
    if len(tokens) < width:
        raise CalibrationError(
            f"{source} has {len(tokens)} tokens, fewer than one sample of {length}; give more text or a smaller length."
        )
    # random() alone is promised to give the same numbers for a seed in every version of Python.
    generator = random.Random(seed)
    starts = [int(generator.random() * (len(tokens) - width + 1)) for _ in range(samples)]
    rows = np.stack([tokens[start : start + width] for start in starts])
    return rows if head is None else _with_head(rows, head)


def _with_head(rows: np.ndarray, head: int) -> np.ndarray:
    import numpy as np

    return np.concatenate([np.full_like(rows[:, :1], head), rows], axis=1)


def _from_arrays(
    reading: Reading, folder: Path, samples: int | None, length: int | None, bos: str
) -> tuple[dict[str, np.ndarray], bool]:
    import numpy as np

    rows = len(next(iter(reading.arrays.values())))
    if samples is not None and samples > rows:
        LOGGER.warning("%s holds %d samples, fewer than the %d asked; all are used.", reading.source, rows, samples)
    arrays = {name: np.ascontiguousarray(array[:samples]) for name, array in reading.arrays.items()}
    ids = arrays.get("input_ids")
    if ids is None:
        return arrays, False
    # Beside other inputs (an attention mask, image patches) the positions of the ids must stay as they are.
    if len(arrays) > 1:
        return arrays, False
    if length is not None and length != ids.shape[1]:
        LOGGER.warning("%s holds rows of %d tokens; %d were asked.", reading.source, ids.shape[1], length)
        ids = np.ascontiguousarray(ids[:, :length])
    head = head_token(load_tokenizer(folder), bos) if bos == "always" else None
    if head is not None and not (ids[:, 0] == head).all():
        return {"input_ids": _with_head(ids[:, : ids.shape[1] - 1], head)}, True
    return {"input_ids": ids}, False
