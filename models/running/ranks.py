"""torchrun: join the group, take a part of a list, put the parts together again. One process is the plain case."""
import os
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=7)     # ranks may finish hours apart; one that dies is noticed by torchrun, not by a timeout


def init_distributed(device: torch.device) -> tuple[int, int, torch.device]:
    """(rank, world_size, device) of this process, which joins torchrun's group where there is one.

    A CUDA device becomes that of the local rank, and is shared where a machine has more ranks than devices. The group
    talks through NCCL where each rank has a device of its own, else through gloo: all machines of a run must be alike
    in that. Without torchrun's environment: (0, 1, device).
    A device with a number becomes PyTorch's current one, for which alone CUDA's graphs can be captured.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        return 0, 1, device
    alone = False                                   # on a CUDA device
    if device.type == "cuda":
        n_devices = torch.cuda.device_count()
        alone = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= n_devices
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % n_devices)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if alone else "gloo", timeout=PATIENCE, device_id=device if alone else None)
    return dist.get_rank(), dist.get_world_size(), device


def shutdown_distributed() -> None:
    """The goodbye of a rank that has done its part."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Returns when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def broadcast_from_rank0(value):
    """Rank 0's `value` (anything that pickles) on every rank; the others' is not looked at."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def rank_slice(n: int, rank: int, world_size: int) -> range:
    """Positions of this rank in a list of n: contiguous, in the order of the ranks, sizes at most one apart."""
    return range(n * rank // world_size, n * (rank + 1) // world_size)


def per_local_rank(n: int) -> int:
    """This process's share of n cores of its machine, at least 1."""
    return max(1, n // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


