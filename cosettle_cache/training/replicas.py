"""Replicas: the processes of one training run, started by torchrun, one per GPU (or core group).

Each works on its share of every batch; sums of gradients and figures go out to all. A process on its own is
one replica, and then nothing is exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cosettle_cache.training.feeding import Ids


@dataclass(frozen=True, slots=True)
class Replicas:
    """This process's number and how many there are; the first one writes files and reports."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, ids: Ids) -> Ids:
        """Return this process's part of a step's ids; parts differ by at most one in length."""
        return np.array_split(ids, self.count)[self.rank]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes, in one exchange."""
        if self.count == 1:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, piece in zip(tensors, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether the flag is set in any process."""
        if self.count == 1:
            return flag
        total = torch.tensor([float(flag)], device=device)
        dist.all_reduce(total)
        return bool(total.item())

    def wait(self) -> None:
        """Return once all processes are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Replicas()


@contextmanager
def join_replicas(device: str) -> Iterator[tuple[Replicas, str]]:
    """Join the processes that torchrun started; yield this one's place and its device.

    Without torchrun's environment this process is alone. `cuda` becomes the GPU of the local rank.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Replicas(dist.get_rank(), dist.get_world_size()), device
    finally:
        dist.destroy_process_group()
