"""Data-parallel runs under torchrun: process group, barrier, broadcast, a slice of a list per rank.

Every function also works in a single process without a process group.
"""
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Ranks may finish hours apart. A rank that dies is noticed by torchrun, not by this timeout.
GROUP_TIMEOUT = timedelta(days=7)


def init_distributed(device: torch.device) -> tuple[int, int, torch.device]:
    """(rank, world_size, device) of this process, after joining the process group of torchrun.

    With CUDA, the device is that of the local rank; ranks share devices if a machine has more ranks
    than devices. The backend is NCCL if every rank has a device of its own, else gloo; this must be
    the same on all machines. Without torchrun's environment variables: (0, 1, device).
    A device with an index becomes PyTorch's current device, as the capture of CUDA graphs requires.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        return 0, 1, device
    has_own_device = False
    if device.type == "cuda":
        n_devices = torch.cuda.device_count()
        has_own_device = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= n_devices
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % n_devices)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if has_own_device else "gloo", timeout=GROUP_TIMEOUT,
                                device_id=device if has_own_device else None)
    return dist.get_rank(), dist.get_world_size(), device


def shutdown_distributed() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Waits until every rank has called it."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_from_rank0(value: Any) -> Any:
    """The `value` of rank 0, which can be any object that pickles, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def rank_slice(n: int, rank: int, world_size: int) -> range:
    """Positions of this rank in a list of n: contiguous, in rank order, sizes at most one apart."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def per_local_rank(n: int) -> int:
    """The share of this process in n cores of its machine, at least 1."""
    return max(1, n // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
