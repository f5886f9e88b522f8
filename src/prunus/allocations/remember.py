"""Numbers that take long to compute and depend on weights alone, kept in the user's cache under their weights' hash."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_LOG = logging.getLogger("prunus")


def fingerprint(weight: Tensor, *settings: object) -> str:
    """Sha256 of the weights' bits, dtype and shape, and of the settings: another matrix never has the same."""
    sha = hashlib.sha256(repr((str(weight.dtype), tuple(weight.shape), *settings)).encode())
    sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return sha.hexdigest()


def remembered(folder: Path, key: str, compute: Callable[[], float]) -> float:
    """`compute()`, or what it gave earlier under this key. A cache that cannot be used only costs time.

    Args:
        folder: of the cache, made if it is missing; one small JSON file for each number.
        key: of what the number depends on.
        compute: gives the number; NaN is one.
    """
    path = folder / f"{key}.json"
    try:
        return float(json.loads(path.read_text("utf-8"))["value"])
    except (OSError, ValueError, KeyError, TypeError):
        value = compute()  # none there, or not whole
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.partial")
        beside.write_text(json.dumps({"value": repr(value)}), "utf-8")  # text, for JSON has no NaN
        beside.replace(path)
    except OSError as problem:
        _LOG.debug("%s cannot be written (%s); it will be computed again.", path, problem)
    return value
