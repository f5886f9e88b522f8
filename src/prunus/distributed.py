"""Several processes that share the calibration text: statistics are sums, so each takes some batches and adds up."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from prunus.errors import PrunusError

Value = TypeVar("Value")


def local_device(device: str) -> torch.device:
    """The device of this process: under torchrun, `cuda` means the GPU of the process's number on its machine."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


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
    def join(cls, device: str) -> Processes:
        """Join the group that `torchrun` describes in the environment; alone without one.

        Args:
            device: as asked for; Gloo connects CPUs, NCCL connects GPUs, one for each process (`local_device`).
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        if not dist.is_initialized():
            if device.startswith("cuda"):
                torch.cuda.set_device(local_device(device))
            # Process 0 verifies alone while the others wait; for a large model that takes longer than the usual limit.
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(days=7))
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

    def everywhere(self, flag: bool) -> bool:
        """Whether the flag is set on all processes; the answer is the same on each."""
        if self.world == 1:
            return flag
        flags: list[Any] = [None] * self.world
        dist.all_gather_object(flags, flag)
        return all(flags)

    def on_first(self, work: Callable[[], Value]) -> Value:
        """Do something on process 0 alone and give its result, or its refusal, to every process.

        Raises:
            PrunusError: what `work` raised, on every process, so that none waits for the others.
        """
        if self.world == 1:
            return work()
        value: Any = None
        error: PrunusError | None = None
        if self.rank == 0:
            try:
                value = work()
            except PrunusError as refused:
                error = refused
        value, error = self.agree((value, error))
        if error is not None:
            raise error
        return value

    def leave(self) -> None:
        """Wait for all processes and leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
