"""What is known about a folder that is to be recovered: its record, its masks, and whether it was pruned at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prunus.errors import RecipeError
from prunus.models.gguf import SOURCE
from prunus.recipe import RecoverPart
from prunus.recovery import masks as registry
from prunus.recovery.masks import Masks
from prunus.sites import Block
from prunus.stream import Stream

# A matrix counts as pruned from this share of zeros on. Dense weights have some, too: 16 bits round small ones to zero,
# and decoding a quantised file makes some (0.07 % of one matrix at most in SmolLM2 from Q4_1).
PRUNED = 0.01
# In a model that prunus decoded from GGUF: where a level of few stands for zero, a tenth of the weights is zero (Q4_0),
# or a sixth (Q3_K), without any pruning.
PRUNED_DECODED = 0.3


def masks_of(folder: Path, stream: Stream) -> Masks:
    """The masks of a folder: its registry, checked against the weights, or its zeros. Block by block."""
    loaded: list[Block] = []

    def load(block: Block | None) -> None:
        if block is None:
            stream.weights.drop(loaded.pop().module)
        else:
            stream.weights.load(stream.weights.sources(block.name))
            loaded.append(block)

    file = folder / registry.FILE
    return registry.take(stream.blocks, Masks.read(file) if file.is_file() else None, load)


def read_record(folder: Path) -> dict[str, Any]:
    """The folder's `prunus.json`, or nothing where it has none that can be read."""
    try:
        found = json.loads((folder / "prunus.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def masks_or_refusal(
    folder: Path, stream: Stream, record: dict[str, Any], part: RecoverPart, warnings: list[str]
) -> Masks:
    """The masks of a pruned model; a matrix without removed weights has one that keeps everything.

    Without a registry, weights were removed if prunus says so, or from matrices that have enough zeros to look pruned
    (`PRUNED`), each judged by itself. The zeros of all others are there by accident and are weights like any other; if
    there are only such, the model is dense, unless prunus cut widths or blocks.

    Raises:
        RecipeError: it is dense, and that was not allowed.
    """
    masks = masks_of(folder, stream)
    least = PRUNED_DECODED if (folder / SOURCE).is_file() else PRUNED
    smaller, zeroed = told(record)
    if not masks.derived or zeroed:
        return masks
    shares = masks.shares
    few = [name for name, share in shares.items() if share < least]
    if len(few) < len(shares):
        if some := [name for name in few if shares[name]]:
            warnings.append(
                f"{len(some)} of {len(shares)} matrices ({some[0]} first) have some zeros, but less than {least:.0%}: "
                "these pass for accidents, and are trained like other weights."
            )
        masks.keep_all(few)
        return masks
    if not smaller and not part.allow_dense:
        sparsest = max(shares.values(), default=0.0)
        found = f"at most {sparsest:.2%} of any of its matrices is zero, less than {least:.0%}"
        raise RecipeError(
            f"This model is dense: {found if masks.removed else 'no weight of its matrices is zero'}, and there "
            "is nothing to preserve. Prune it first, or go on with --allow-dense."
        )
    masks.keep_all(few)
    if not smaller:
        warnings.append("The model is dense: there are no zeros to keep.")
    return masks


def told(record: dict[str, Any]) -> tuple[bool, bool]:
    """What a folder's `prunus.json` says: whether the model was made smaller, and whether by zeros in its matrices."""
    while isinstance(record.get("pruned"), dict) and record["pruned"]:
        record = record["pruned"]  # behind any number of recoveries
    result = record.get("result")
    if not isinstance(result, dict):
        return bool(record), False
    sparsity = result.get("sparsity")
    reached = sparsity.get("reached") if isinstance(sparsity, dict) else sparsity
    return "shapes" in result or reached != 0, "shapes" not in result and reached != 0
