"""The process of a data-parallel training run that executes this code."""
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Process:
    """Rank, world size and device of one process; a run without torchrun is rank 0 of 1."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0
