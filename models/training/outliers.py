"""Outlier exposure: faces that belong to no class, with the same target probability for each.

Hendrycks, Mazeika, Dietterich, "Deep Anomaly Detection with Outlier Exposure", 2019.
"""
from pathlib import Path

import torch

from models.data.faceset import FaceSet, FaceSetError
from models.data.listing import list_images
from models.training.crops import CropLoading, Crops, aligned_pixels
from models.training.process import Process
from models.training.sampling import group_weights

OUTLIER = -1        # label


def load_outliers(folder: Path, n_classes: int, n_targets: int, loading: CropLoading,
                  process: Process) -> Crops:
    """Crops of all pictures below a folder, or below its train folder. Raises FaceSetError.

    Their targets (N, n_targets) have 1 / n_classes for each class; age and gender are unknown.
    """
    root = folder / "train" if (folder / "train").is_dir() else folder
    files = list_images(root)
    if not files:
        raise FaceSetError(f"{root}: no pictures")
    faces = FaceSet(root, files, torch.full((len(files),), OUTLIER), ("outlier",), False)
    pixels, aligned_by = aligned_pixels(faces, f"outliers {root}", loading, process)
    targets = torch.zeros(len(files), n_targets)
    targets[:, :n_classes] = 1 / n_classes
    rows = torch.tensor([how != "" for how in aligned_by]).nonzero()[:, 0]
    return Crops(pixels, faces.labels, targets, [""] * len(files)).subset(rows)


def add_outliers(crops: Crops, outliers: Crops, share: float) -> Crops:
    """Crops and outliers together; outliers make up `share` of the sampled pictures."""
    together = Crops.concatenate([crops, outliers])
    weights = crops.weights
    if weights is None:
        weights = group_weights(crops.labels, 0.0)
    outlier_weights = group_weights(outliers.labels, 0.0)
    together.weights = torch.cat([weights * (1 - share), outlier_weights * share])
    return together
