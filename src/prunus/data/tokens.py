"""From text to token ids: the tokenizer, one long stream of ids, and the question of the BOS."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunus.data.reading import Reading
from prunus.errors import CalibrationError, RecipeError
from prunus.models.modelling import ours

if TYPE_CHECKING:
    import numpy as np

LOGGER = logging.getLogger("prunus")
Bos = Literal["auto", "always", "never"]
BOS_MODES = ("auto", "always", "never")
POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len", "seq_length")


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, by stock transformers.

    Raises:
        CalibrationError: if there is none or it cannot be read; token ids (.npy) need no tokenizer.
    """
    from transformers import AutoTokenizer

    cure = "Copy the tokenizer's files into the folder, or give token ids as .npy."
    parts = ("tokenizer*", "vocab.*", "*.model", "spiece*", "sentencepiece*", "merges.txt")
    if not any(file for part in parts for file in folder.glob(part)):
        raise CalibrationError(f"{folder} has no tokenizer, so text cannot become tokens. {cure}")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=ours(folder) or None)
    except Exception as problem:  # any: a damaged file fails in whatever way it comes to, and config.json is read too
        raise CalibrationError(
            f"The tokenizer in {folder} cannot be loaded ({str(problem)[:200]}). {cure}"
        ) from problem


def stream(reading: Reading, tokenizer: Any) -> np.ndarray:
    """All ids of the text in one row, int64 [tokens], without special tokens but an EOS between documents.

    A plain text is tokenised once, as a whole. Documents are tokenised one by one and packed.
    """
    import numpy as np

    assert reading.documents
    rows = tokenizer(list(reading.documents), add_special_tokens=False, verbose=False)["input_ids"]
    mark = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    packed = list(rows[0])
    for row in rows[1:]:
        packed.extend(mark)
        packed.extend(row)
    return np.asarray(packed, dtype=np.int64)


def puts_bos(tokenizer: Any) -> bool:
    """True if a plain call of the tokenizer begins with its BOS: so the model was trained (Gemma, Llama, OPT)."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    return with_special[:1] == [bos] and without[:1] != [bos]


def head_token(tokenizer: Any, mode: str) -> int | None:
    """The BOS that belongs at the head of every window, or None.

    Args:
        tokenizer: of the model.
        mode: "auto" asks `puts_bos`; "always" and "never" say it.

    Raises:
        RecipeError: an unknown mode, or "always" where the tokenizer has no BOS.
    """
    check_bos(mode)
    if mode == "never" or (mode == "auto" and not puts_bos(tokenizer)):
        return None
    if tokenizer.bos_token_id is None:
        raise RecipeError("BOS 'always' was asked, but this model's tokenizer has no BOS token; use auto or never.")
    return int(tokenizer.bos_token_id)


def check_bos(mode: str) -> None:
    """Refuse a mode that is none.

    Raises:
        RecipeError: naming the three.
    """
    if mode not in BOS_MODES:
        raise RecipeError(f"BOS is one of {', '.join(BOS_MODES)}, not {mode!r}.")


def check_vocabulary(ids: np.ndarray, vocabulary: int | None, source: str) -> None:
    """Refuse ids that the model has no embedding for.

    Args:
        ids: int64, any shape.
        vocabulary: rows of the embedding; None where it is not known.
        source: for the message.

    Raises:
        CalibrationError: with the largest id and its place.
    """
    if vocabulary is not None and ids.size and int(ids.max()) >= vocabulary:
        place = [int(index) for index in divmod(int(ids.argmax()), ids.shape[-1])]
        raise CalibrationError(
            f"{source} has token id {int(ids.max())} (row {place[0]}, position {place[1]}), beyond the vocabulary of "
            f"{vocabulary}; it was made for another tokenizer."
        )


def positions(config: dict[str, Any]) -> int | None:
    """The longest sequence that a model's config.json allows, or None where it names none.

    Args:
        config: config.json as read; the language tower of a multimodal model is looked at first.
    """
    for part in (config.get("text_config"), config):
        for name in POSITIONS:
            if isinstance(part, dict) and isinstance(part.get(name), int) and part[name] > 0:
                return part[name]
    return None


def folder_positions(folder: Path) -> int | None:
    """`positions` of a model folder."""
    return positions(json.loads((folder / "config.json").read_text(encoding="utf-8")))
