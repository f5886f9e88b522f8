"""The orders of columns that pruning left beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from prunus.errors import FormatError
from prunus.models.checkpoint import Checkpoint
from prunus.output import ORDERS


def read_orders(folder: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Name on disk -> int32 `[columns]`, for the matrices that were pruned in another order of their columns.

    Raises:
        FormatError: the file is damaged, or an order is not one of its matrix.
    """
    if not (folder / ORDERS).is_file():
        return {}
    stored = Checkpoint.of_shard(folder / ORDERS)
    orders = dict(stored.read(stored.tensors))
    for name, order in orders.items():
        columns = checkpoint.tensors[name].shape[-1] if name in checkpoint.tensors else -1
        if order.dtype != torch.int32 or order.ndim != 1 or len(order) != columns:
            raise FormatError(f"{folder / ORDERS}: {name!r} is no order of the columns of a matrix. Remove the file.")
        if not torch.equal(order.sort().values, torch.arange(columns, dtype=torch.int32)):
            raise FormatError(f"{folder / ORDERS}: {name!r} does not name every column once. Remove the file.")
    return orders
