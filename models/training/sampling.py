"""Order of an epoch's crops, shared out over the ranks, and its batches of augmented views."""
from collections.abc import Iterator

import torch
from torch import Tensor

from models.data.faceset import GENDERS
from models.training.augmentation import random_views
from models.training.crops import Crops
from models.training.domain_shift import shift_views
from models.training.process import Process
from models.training.settings import TrainingSettings

# Pictures, in whole batches, that are augmented in one call: many calls keep a GPU waiting.
AUGMENTED_AT_ONCE = {"cpu": 1, "cuda": 1024}


def group_weights(groups: Tensor, balance: float) -> Tensor:
    """Sampling weights (N,) that add up to 1, from group numbers (N,).

    balance 0: all pictures are equally probable; 1: all groups are.
    """
    _, group, counts = torch.unique(groups, return_inverse=True, return_counts=True)
    weights = counts.float()[group] ** -balance
    return weights / weights.sum()


def class_and_gender(crops: Crops, n_classes: int) -> Tensor:
    """Groups (N,) int64 by class and, with auxiliary heads, gender (or unknown)."""
    has_aux = crops.targets.shape[1] > n_classes
    genders = crops.targets[:, -len(GENDERS):] if has_aux else crops.targets[:, :0]
    gender = (genders * torch.arange(1, genders.shape[1] + 1)).sum(1).long()
    return crops.labels * (len(GENDERS) + 1) + gender


def epoch_rows(n: int, epoch: int, seed: int, process: Process, weights: Tensor | None = None,
               size: int = 0) -> Tensor:
    """Rows (k,) int64 that this rank trains on in an epoch: its share of one permutation of n.

    With a size: of so many rows drawn by weights (n,), without repetition if there are enough.
    All ranks have the same number of rows; up to world_size - 1 pictures are left out.
    """
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    if size and weights is not None:
        n_possible = int((weights > 0).sum())
        order = torch.multinomial(weights, size, size > n_possible, generator=generator)
        n = size
    else:
        order = torch.randperm(n, generator=generator)
    return order[:n // process.world_size * process.world_size][process.rank::process.world_size]


def augmented_batches(
        crops: Crops, rows: Tensor, input_size: int, settings: TrainingSettings,
        device: torch.device, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (views (B, 3, S, S) float32, targets (B, T) float32) of the rows, on the device."""
    batch_size = settings.batch_size
    at_once = max(1, AUGMENTED_AT_ONCE[device.type] // batch_size) * batch_size
    for chunk in rows.to(crops.pixels.device).split(at_once):
        pixels, targets = (values.index_select(0, chunk).to(device, non_blocking=True)
                           for values in (crops.pixels, crops.targets))
        views = random_views(pixels, settings.window, input_size, settings.augment, generator)
        if settings.shift:
            views = shift_views(views, settings.shift, generator)
        for batch in zip(views.split(batch_size), targets.split(batch_size), strict=True):
            if len(batch[0]) > 1:           # batch norm has no statistics of a single picture
                yield batch
