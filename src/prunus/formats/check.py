"""What every export is measured against: the source model's own logits on a few fixed tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from prunus.loading import load
from prunus.models.modelling import FILE, ours

if TYPE_CHECKING:
    from prunus.shapes.folder import Shapes

# Tokens of the probe; enough for every head to look back.
TOKENS = 24


def runnable(source: Path, shapes: Shapes | None, scratch: Path) -> Path:
    """A folder with the same weights that loads; narrowed ones often lie beside the dense model's config.json.

    Args:
        source: the folder.
        shapes: the sizes of its blocks, None if they are those of its config.json.
        scratch: where a folder of links may be made.
    """
    from prunus.shapes.write import own_class, write_config

    if shapes is None or shapes.plain or ours(source):
        return source
    linked = scratch / "runnable"
    linked.mkdir()
    for path in source.iterdir():
        if path.is_file() and path.name not in ("config.json", FILE):
            (linked / path.name).symlink_to(path.resolve())
    write_config(linked, own_class(shapes))
    return linked


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
