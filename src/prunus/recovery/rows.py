"""What a recovery learns from and is judged by: rows of token ids with the labels that count."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunus.data.reading import Reading, read
from prunus.data.tokens import check_vocabulary, head_token, load_tokenizer, stream
from prunus.errors import CalibrationError, RecipeError

if TYPE_CHECKING:
    import numpy as np

    from prunus.recipe import RecoverPart

# Characters of text that are read for each token that will be used, at most; English has four to five.
CHARACTERS = 8
# Without a number of steps: 16 M characters are about 3.5 M tokens, some 900 steps of 8 x 512.
HEAD = 16_000_000
# A label that is not learnt: PyTorch's own.
NOTHING = -100
LENGTH = 512


@dataclass(frozen=True)
class Rows:
    """Sequences of equal length.

    Attributes:
        ids: int64 `[rows, length]`.
        labels: int64 `[rows, length]`: the id itself where it is to be predicted from those before it, else -100.
            Shorter rows are filled up on the right, where nothing before can see it, with labels -100.
    """

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.ids)

    def take(self, index: Tensor | list[int] | slice) -> Rows:
        """Some of the rows."""
        return Rows(self.ids[index], self.labels[index])

    @property
    def sha256(self) -> str:
        """Over ids and labels."""
        return sha256(self.ids.numpy().tobytes() + self.labels.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Lessons:
    """The rows of one run.

    Attributes:
        train: to learn from, in random order of the seed.
        heldout: to judge by; from the end of the text, never learnt from.
        source: as it was given.
        bos: True if a BOS was put at the head of each row.
    """

    train: Rows
    heldout: Rows
    source: str
    bos: bool

    @property
    def summary(self) -> dict[str, Any]:
        """For the report."""
        return {
            "source": self.source, "rows": len(self.train), "heldout_rows": len(self.heldout),
            "length": self.train.ids.shape[1], "bos": self.bos, "sha256": self.train.sha256,
            "heldout_sha256": self.heldout.sha256,
        }  # fmt: skip

    def order(self, steps: int, batch: int, seed: int) -> Tensor:
        """Row numbers `[steps, batch]`: every row once in random order, then again in another."""
        generator = torch.Generator().manual_seed(seed)
        wanted, drawn = steps * batch, []
        while sum(map(len, drawn)) < wanted:
            drawn.append(torch.randperm(len(self.train), generator=generator))
        return torch.cat(drawn)[:wanted].view(steps, batch)


def lessons(part: RecoverPart, folder: Path, *, vocabulary: int | None, limit: int | None) -> Lessons:
    """The rows of a text or of instructions.

    Args:
        part: what was asked; `data` "samples" is written by the dense model and read by `samples.write`.
        folder: the model's, for its tokenizer.
        vocabulary: number of embeddings.
        limit: most positions that the model allows.

    Raises:
        RecipeError: rows longer than the model's positions.
        CalibrationError: nothing there, not text, or too little for `heldout` rows and one batch.
    """
    length = part.length or min(LENGTH, limit or LENGTH)
    if limit is not None and length > limit:
        raise RecipeError(f"Sequences of {length} tokens exceed the model's {limit} positions; use length {limit}.")
    if part.data == "instructions":
        found, bos = _instructions(part.text, folder, length), False
    else:
        found, bos = _packed(part, folder, length)
    check_vocabulary(found.ids.numpy(), vocabulary, part.text)
    return split(found, part, bos)


def split(found: Rows, part: RecoverPart, bos: bool) -> Lessons:
    """The last rows are held out, the others are learnt from.

    Raises:
        CalibrationError: there are fewer than the held-out ones and one batch.
    """
    if len(found) < part.heldout + part.batch:
        raise CalibrationError(
            f"{part.text} gives {len(found)} sequences of {found.ids.shape[1]} tokens; {part.heldout} held-out "
            f"ones and one batch of {part.batch} need {part.heldout + part.batch}. Give more text, shorter sequences "
            "(length), or fewer held out."
        )
    cut = len(found) - part.heldout
    most = cut if part.samples is None else min(cut, part.samples)
    if most < part.batch:
        raise RecipeError(f"{most} sequences are fewer than one batch of {part.batch}; use more, or a smaller batch.")
    return Lessons(found.take(slice(most)), found.take(slice(cut, None)), part.text, bos)


def _packed(part: RecoverPart, folder: Path, length: int) -> tuple[Rows, bool]:
    """A text cut into rows without overlap, EOS kept between documents and learnt like any token."""
    import numpy as np

    rows = part.samples or (part.steps * part.batch if part.steps else None)
    head = HEAD if rows is None else min(HEAD, max(1_000_000, (rows + 2 * part.heldout) * length * CHARACTERS))
    reading = read(part.text, purpose="calibration", head=head)
    if reading.arrays:
        ids, bos = _from_arrays(reading, length), False
    else:
        tokenizer = load_tokenizer(folder)
        first = head_token(tokenizer, part.bos)
        bos = first is not None
        width = length - bos
        tokens = stream(reading, tokenizer)
        ids = tokens[: len(tokens) // width * width].reshape(-1, width)
        ids = ids if first is None else np.concatenate([np.full_like(ids[:, :1], first), ids], axis=1)
    found = torch.from_numpy(np.ascontiguousarray(ids))
    return Rows(found, _labels(found)), bos


def _labels(ids: Tensor) -> Tensor:
    """Every token is learnt but the first of a row, which nothing stands before."""
    labels = ids.clone()
    labels[:, 0] = NOTHING
    return labels


def _from_arrays(reading: Reading, length: int) -> np.ndarray:
    ids = reading.arrays.get("input_ids")
    if ids is None or len(reading.arrays) > 1:
        raise CalibrationError(f"{reading.source} holds other inputs than input_ids; recovery learns from token ids.")
    if ids.shape[1] < length:
        raise CalibrationError(f"{reading.source} holds rows of {ids.shape[1]} tokens; use a length of at most that.")
    return ids[:, : ids.shape[1] // length * length].reshape(-1, length)


def _instructions(source: str, folder: Path, length: int) -> Rows:
    """Prompt and response of each row, by the model's chat template if it has one; only the response is learnt.

    Rows that are longer than `length` lose their end; rows of which nothing is left to learn are left out.
    """
    tokenizer = load_tokenizer(folder)
    ids, labels = [], []
    for prompt, response in _pairs(Path(source)):
        before, whole = _encode(tokenizer, prompt, response)
        row, learnt = whole[:length], [NOTHING] * min(len(before), length) + whole[len(before) : length]
        if all(label == NOTHING for label in learnt[1:]):
            continue
        learnt[0] = NOTHING
        fill = length - len(row)
        ids.append(row + [tokenizer.eos_token_id or 0] * fill)
        labels.append(learnt + [NOTHING] * fill)
    if not ids:
        raise CalibrationError(
            f"{source}: no response fits into {length} tokens behind its prompt; use a larger length."
        )
    return Rows(torch.tensor(ids), torch.tensor(labels))


def _pairs(path: Path) -> list[tuple[str, str]]:
    """Prompts and responses of a .jsonl file, gzipped or not.

    Raises:
        CalibrationError: the file is missing or damaged, or a line lacks one of the two.
    """
    if not path.is_file():
        raise CalibrationError(f"There is no file {path}; instructions come from a .jsonl file of prompt and response.")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = raw.decode("utf-8-sig").split("\n")  # not splitlines: JSON may hold other ends of lines
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
        raise CalibrationError(f"{path} is not a text in UTF-8 that can be read whole ({problem}).") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, response = row["prompt"], row["response"]
        except (ValueError, KeyError, TypeError):
            prompt = response = None
        if not isinstance(prompt, str) or not isinstance(response, str):
            raise CalibrationError(f'{path}, line {number} must be an object with the texts "prompt" and "response".')
        found.append((prompt, response))
    return found


def _encode(tokenizer: Any, prompt: str, response: str) -> tuple[list[int], list[int]]:
    """Ids of what stands before the response, and of everything, the end mark included."""
    if getattr(tokenizer, "chat_template", None):
        asked = [{"role": "user", "content": prompt}]
        answered = [*asked, {"role": "assistant", "content": response}]
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        text = tokenizer.apply_chat_template(answered, tokenize=False)
        if text.startswith(before):
            start = tokenizer(before, add_special_tokens=False)["input_ids"]
            return start, start + tokenizer(text[len(before) :], add_special_tokens=False)["input_ids"]
    start = tokenizer(prompt if prompt[-1:].isspace() else f"{prompt}\n")["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return start, start + tokenizer(response, add_special_tokens=False)["input_ids"] + end
