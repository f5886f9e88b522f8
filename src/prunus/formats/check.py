"""What every export is measured against: the source model's own logits on a few fixed tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunus.loading import load

# Tokens of the probe; enough for every head to look back.
TOKENS = 24


def probe_tokens(vocabulary: int) -> Tensor:
    """`[1, TOKENS]` token ids, the same for every call."""
    return torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def probe(source: Path, file: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Write the source model's logits on the probe, in float32, for `prunus.verify`.

    Args:
        source: a model folder of any form that `loading.load` reads.
        file: safetensors to write, with `input.input_ids` and `logits`.
        trust_remote_code: as for `load`.

    Returns:
        `{"parameters": int, "class": str}` of the model that was run.
    """
    model = load(source, dtype="float32", trust_remote_code=trust_remote_code)
    tokens = probe_tokens(model.config.get_text_config().vocab_size)
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    save_file({"input.input_ids": tokens, "logits": logits.contiguous()}, file)
    return {"parameters": sum(value.numel() for value in model.parameters()), "class": type(model).__name__}
