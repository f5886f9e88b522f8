"""Text without data: the dense model writes it itself."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import torch
from transformers import PreTrainedModel

from prunus.data.tokens import folder_positions, load_tokenizer
from prunus.errors import RecipeError
from prunus.evaluation.loading import check_dtype, load_model
from prunus.models.checkpoint import Checkpoint
from prunus.models.source import default_cache
from prunus.recipe import RecoverPart
from prunus.recovery.rows import LENGTH

# Sequences that are written at a time.
TOGETHER = 8
# Sequences, where neither steps nor samples say how many are needed.
MOST = 512


@torch.no_grad()
def written(dense: Path, part: RecoverPart, device: torch.device, dtype: str, trust_remote_code: bool) -> Path:
    """Sequences drawn from the dense model at temperature 1, from its first token on (LLM-QAT, arXiv:2305.17888).

    Args:
        dense: the model that writes.
        part: `samples`, `steps` and `batch` say how many, `length` how long, `seed` which.
        device: where it is computed.
        dtype: of its forward passes, as in a recipe.
        trust_remote_code: as for any model.

    Returns:
        A .npy of token ids in the cache, made once for the same model, numbers, seed, kind of device and dtype: what is
        drawn hangs on the last bits of the logits.

    Raises:
        RecipeError: the tokenizer has no token to begin with.
    """
    import numpy as np

    length = part.length or min(LENGTH, folder_positions(dense) or LENGTH)
    needed = part.samples or min(MOST, part.steps * part.batch if part.steps else MOST)
    rows = needed + part.heldout
    file = place(dense, rows, length, part.seed, device, dtype)
    if file.is_file():
        return file
    tokenizer = load_tokenizer(dense)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise RecipeError("The dense model has neither a BOS nor an EOS token to begin a text with; give a text.")
    model = load_model(dense, device=str(device), dtype=dtype, trust_remote_code=trust_remote_code)
    generator = torch.Generator(device).manual_seed(part.seed)
    counts = [min(TOGETHER, rows - start) for start in range(0, rows, TOGETHER)]
    parts = [_rows(model, count, length, first, generator) for count in counts]
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".partial.npy")
    np.save(beside, torch.cat(parts).cpu().numpy())
    beside.replace(file)
    return file


def place(dense: Path, rows: int, length: int, seed: int, device: torch.device, dtype: str) -> Path:
    """The file in the cache for a text that these decide; arguments as of `written`."""
    key = {
        "model": Checkpoint.open(dense).identity, "rows": rows, "length": length, "seed": seed, "device": device.type,
        "dtype": str(check_dtype(dtype, device)),
    }  # fmt: skip
    name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return default_cache() / "samples" / f"{name}.npy"


def _rows(model: PreTrainedModel, count: int, length: int, first: int, generator: torch.Generator) -> torch.Tensor:
    """`count` sequences, int64 `[count, length]`; an end mark does not end them, as in packed text."""
    ids = torch.full((count, 1), first, device=model.device)
    cache, given = None, ids
    while ids.shape[1] < length:
        output = model(input_ids=given, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        given = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, given], dim=1)
    return ids
