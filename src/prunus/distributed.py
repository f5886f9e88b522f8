"""Several processes that share the calibration text: statistics are sums, so each takes some batches and adds up."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among its peers.

    Attributes:
        rank: number of this process, 0 to `world - 1`; process 0 writes the checkpoint and talks.
        world: number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Processes:
        """Join the group that `torchrun` describes in the environment; alone without one.

        Uses NCCL for CUDA devices and Gloo for CPUs.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            # Process 0 verifies alone while the others wait; for a large model that takes longer than the usual limit.
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=7))
        return cls(dist.get_rank(), dist.get_world_size())

    def mine(self, items: list) -> list:
        """Every `world`-th item, beginning with number `rank`."""
        return items[self.rank :: self.world]

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes; every process must pass them in the same order."""
        if self.world > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def agree(self, value: Any) -> Any:
        """The value of process 0, on every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def leave(self) -> None:
        """Wait for all processes and leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
