"""Crops in memory: a set's pictures aligned to the whole template, with labels and targets."""
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from models.data.faceset import FaceSet
from models.faces.align import TEMPLATE_SIZE, WHOLE_TEMPLATE, crop_views
from models.faces.pipeline import ViewSpec, align_labelled_set
from models.faces.second_look import load_detector
from models.running.ranks import barrier, per_local_rank
from models.training.auxiliary import aux_targets
from models.training.crop_cache import AlignedCrops, cached_crops
from models.training.process import Process

MIN_FACE_SIZE = 40      # pixels, in pictures that are not finished crops: one large face each
VAL_RESOLUTION = 224    # of validation crops: that of the builder


@dataclass
class Crops:
    """N pictures as crops of the whole template.

    targets: what the network learns to predict. The first C columns are the class: the label as a
    one-hot row, or its mixture with soft targets. Those of the auxiliary heads may follow.
    """
    pixels: Tensor          # (N, 3, R, R) uint8
    labels: Tensor          # (N,) int64
    targets: Tensor         # (N, T) float32
    paths: list[str]        # absolute, '' of outliers
    weights: Tensor | None = None   # (N,) float32: how often each is drawn in sampled epochs

    def to(self, device: torch.device) -> "Crops":
        """The same crops on a device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device),
                       targets=self.targets.to(device))

    def subset(self, rows: Tensor) -> "Crops":
        """The crops of the given rows (k,) int64, without weights."""
        return Crops(self.pixels[rows], self.labels[rows], self.targets[rows],
                     [self.paths[row] for row in rows.tolist()])

    @staticmethod
    def concatenate(parts: list["Crops"]) -> "Crops":
        """The crops of several sets as one."""
        if len(parts) == 1:
            return parts[0]
        return Crops(torch.cat([part.pixels for part in parts]),
                     torch.cat([part.labels for part in parts]),
                     torch.cat([part.targets for part in parts]),
                     [path for part in parts for path in part.paths])


@dataclass(frozen=True)
class CropLoading:
    """How pictures become crops. cache: folder of aligned crops, or None."""
    resolution: int
    num_workers: int
    cache: Path | None = None


def load_crops(sets: list[FaceSet], titles: list[str], loading: CropLoading, process: Process,
               has_aux: bool = False) -> Crops:
    """Every picture of the sets as a crop; unreadable ones are left out.

    titles: of each set, for progress and messages. has_aux: targets include the auxiliary heads'.
    Pictures that are not finished crops are detected and aligned.
    """
    return Crops.concatenate([load_set(faces, title, loading, process, has_aux)
                              for faces, title in zip(sets, titles, strict=True)])


def load_set(faces: FaceSet, title: str, loading: CropLoading, process: Process,
             has_aux: bool) -> Crops:
    """The crops of one set, as for load_crops."""
    pixels, aligned_by = aligned_pixels(faces, title, loading, process)
    n_faceless = aligned_by.count("template")
    if n_faceless and process.is_main:
        print(f"{title}: no face detected in {n_faceless} of {len(faces)} pictures; "
              "they are aligned by the mean landmarks of the others")
    targets = F.one_hot(faces.labels, len(faces.classes)).float()
    if has_aux:
        targets = torch.cat([targets, aux_targets(faces)], 1)
    is_readable = torch.tensor([how != "" for how in aligned_by])
    paths = [os.path.abspath(faces.root / faces.files[row]) for row in is_readable.nonzero()]
    return Crops(pixels if is_readable.all() else pixels[is_readable], faces.labels[is_readable],
                 targets[is_readable], paths)


def aligned_pixels(faces: FaceSet, title: str, loading: CropLoading,
                   process: Process) -> AlignedCrops:
    """Crops (N, 3, R, R) uint8 and how each was aligned; rank 0 fills the cache for all ranks."""
    def align() -> AlignedCrops:
        return align_pixels(faces, title, loading, process)

    if loading.cache is None:
        return align()
    if not process.is_main:
        barrier()
    crops = cached_crops(faces, loading.resolution, loading.cache, align)
    if process.is_main:
        barrier()
    return crops


def align_pixels(faces: FaceSet, title: str, loading: CropLoading,
                 process: Process) -> AlignedCrops:
    """Detects and aligns the pictures of a set; unreadable ones are printed."""
    detector = load_detector(process.device, MIN_FACE_SIZE)
    resolution = loading.resolution
    pixels = torch.empty(len(faces), 3, resolution, resolution, dtype=torch.uint8)
    aligned_by = [""] * len(faces)
    batches = align_labelled_set(faces.paths(), faces.is_aligned, detector,
                                 ViewSpec(WHOLE_TEMPLATE, resolution), loading.num_workers,
                                 title if process.is_main else None)
    for batch in batches:
        pixels[batch.positions()] = batch.views.cpu()
        for row in batch.rows:
            aligned_by[row.position] = row.aligned_by
        for failure in batch.failures:
            tqdm.write(f"left out: {faces.files[failure.position]}: {failure.status}: "
                       f"{failure.error}")
    return pixels, aligned_by


def render_views(crops: Tensor, window: tuple, input_size: int, device: torch.device) -> Tensor:
    """The window of each crop: (N, 3, R, R) uint8 -> (N, 3, S, S) uint8 on the device."""
    views = torch.empty(len(crops), 3, input_size, input_size, dtype=torch.uint8, device=device)
    for chunk, target in zip(crops.split(256), views.split(256), strict=True):
        target.copy_(crop_views(chunk.to(device), window, input_size))
    return views


def reduce_resolution(crops: Tensor, resolution: int) -> Tensor:
    """Crops at a lower resolution, without aliasing; smaller ones as they are."""
    if crops.shape[-1] <= resolution:
        return crops
    return render_views(crops, WHOLE_TEMPLATE, resolution, crops.device)


def crop_resolution(window: tuple, input_size: int) -> int:
    """Resolution of training crops: with 1.25 pixels per view pixel a bilinear warp stays sharp."""
    return math.ceil(1.25 * input_size * TEMPLATE_SIZE / (window[2] - window[0]))


def fits_on_device(crops: Tensor, device: torch.device) -> bool:
    """Whether a CUDA device can hold the crops and a smaller copy of them.

    They may use two thirds of this rank's share of its free memory.
    """
    if device.type != "cuda":
        return False
    free = torch.cuda.mem_get_info(device)[0]
    return crops.numel() < min(free, per_local_rank(free * torch.cuda.device_count())) / 3
