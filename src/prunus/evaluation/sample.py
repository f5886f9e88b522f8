"""One generated sentence: the reader's own check that a model still speaks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from prunus.data.tokens import load_tokenizer
from prunus.errors import CalibrationError
from prunus.evaluation.loading import load_model

MARK = re.compile(r"<[^<>\s]+>")
SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s|$)")


@torch.inference_mode()
def sample(model: Any, tokenizer: Any = None, *, prompt: str, max_new_tokens: int = 24) -> str:
    """`prompt` and its greedy continuation up to the end of the first sentence, on one line.

    Greedy, so that the same weights say the same; the prompt gets the special tokens that the tokenizer puts by
    itself (a BOS for Gemma). Control tokens are not allowed: Gemma 3 270M would fill the line with <start_of_image>.

    Args:
        model: a folder, or a loaded model.
        tokenizer: of the model; None: the folder's.
        prompt: the beginning.
        max_new_tokens: where to stop if the sentence does not end.

    Raises:
        ModelError: if the folder cannot be loaded.
        CalibrationError: if it has no tokenizer, or the prompt is empty.
    """
    if isinstance(model, (str, Path)):
        tokenizer = tokenizer or load_tokenizer(Path(model))
        model = load_model(Path(model))
    ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not prompt.strip() or ids["input_ids"].numel() == 0:
        raise CalibrationError("The prompt is empty; give a few words to continue.")
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    greedy["suppress_tokens"] = control_tokens(tokenizer) or None
    made = model.generate(**ids, max_new_tokens=max_new_tokens, pad_token_id=padding, **greedy)
    # Decoded together: some tokenizers drop the blank before the first piece.
    read, whole = (tokenizer.decode(row, skip_special_tokens=True) for row in (ids["input_ids"][0], made[0]))
    return first_sentence(prompt, whole[len(read) :])


def control_tokens(tokenizer: Any) -> list[int]:
    """Ids of the added tokens that are marks, not text: special, or written <like_this>; the EOS is not among them."""
    marks = (
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special or MARK.fullmatch(str(token))
    )
    return [index for index in marks if index != tokenizer.eos_token_id]


def first_sentence(prompt: str, new: str) -> str:
    """`prompt` and `new` joined, cut after the first sentence end in `new`, white space folded to single blanks."""
    end = SENTENCE_END.search(new)
    kept = new[: end.end()] if end else new
    return " ".join((prompt + kept).split())
