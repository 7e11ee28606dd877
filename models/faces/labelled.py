"""faces/labelled"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from models.data.batches import PhotoBatch, has_shared_memory, join_batches, load_photos
from models.faces.align import CHIP_LANDMARKS, TEMPLATE, TEMPLATE_SIZE, align_faces, crop_views
from models.faces.mtcnn import MTCNN, Faces
from models.running.threads import OrderedThreadPool

MAX_SIDE = 3000             # pixels: larger photographs are reduced to it while decoding, as infer.py does by default


def most_central_face(faces: Faces, sizes: Tensor) -> Tensor:
    """The most central large face of each photograph: rows (B,) int64 of `faces`, -1 where there is none.

    Largest box area less twice the squared distance of its centre from the photograph's.
    """
    rows = torch.full((len(sizes),), -1)
    boxes, image_index = faces.boxes.cpu(), faces.image_index.cpu()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 - sizes.flip(1)[image_index] / 2
    merit = area - 2 * centre.square().sum(1)
    for row in merit.argsort().tolist():
        rows[image_index[row]] = row
    return rows


@dataclass
class AlignedBatch:
    """Aligned pictures of a list: views (n, 3, side, side) uint8 of the pictures at `positions`."""
    positions: list[int]
    views: Tensor
    aligned_by: str                             # 'mtcnn', 'template' (no face was found) or 'crop' (came aligned)
    failures: list[tuple[int, str, str]]        # position, status, reason


@dataclass
class SearchedBatch:
    """What a batch of pictures gave, and what those without a face need."""
    aligned: list[AlignedBatch]
    missed: list[int]                           # positions of the pictures without a face
    landmarks: Tensor                           # (k, 5, 2) float64 of those with one, relative to the picture's size


def align_set(paths: list[str], finished: bool, detector: MTCNN, window: tuple, side: int, *,
              template: tuple = TEMPLATE, chips: tuple | None = None, batch_size: int = 32, workers: int = 0,
              progress: str | None = None) -> Iterator[AlignedBatch]:
    """Views of every picture of a list, one face each, as a stream; the order is that of `positions`, not the list's.

    Finished crops are cut to the window, and so is any picture of the very size in which crops are handed around, or
    in which a checkpoint's chips are (chips: their side and template; not asked in a finished set). Of other pictures
    the most central large face is aligned by its landmarks; those without a face come last, aligned
    by the mean landmarks (relative to the picture's size) of those with one. Pictures over MAX_SIDE are reduced to it;
    where shared memory is scarce no worker processes decode, whatever `workers` says.
    """
    workers = workers if has_shared_memory() else 0
    device = next(detector.parameters()).device
    missed, landmarks = [], []
    bar = tqdm(total=len(paths), desc=progress, disable=progress is None, unit=" pictures", smoothing=0.05)
    with bar, OrderedThreadPool(device) as pool:
        batches = join_batches(load_photos(paths, batch_size, workers, MAX_SIDE, pool=pool), len(paths), device)
        for searched in pool.ordered_map(
                lambda batch: align_batch(batch, finished, detector, window, side, template, chips), batches):
            bar.update(len(searched.missed) + sum(len(a.positions) + len(a.failures) for a in searched.aligned))
            missed += searched.missed
            landmarks.append(searched.landmarks)
            yield from searched.aligned
    found = torch.cat([torch.zeros(0, 5, 2, dtype=torch.float64), *landmarks])
    mean = found.mean(0) if len(found) else torch.tensor(CHIP_LANDMARKS, dtype=torch.float64) / 200
    for batch in load_photos(paths, batch_size, workers, MAX_SIDE, missed) if missed else ():
        where = (mean * batch.sizes.flip(1)[:, None]).float()
        views = align_faces(batch.images.to(device), batch.sizes, torch.arange(len(batch.positions)), where, window,
                            side, template)
        yield AlignedBatch(batch.positions, views.cpu(), "template", batch.failures)


def align_batch(batch: PhotoBatch, finished: bool, detector: MTCNN, window: tuple, side: int, template: tuple,
                chips: tuple | None) -> SearchedBatch:
    """The views of a batch, but for pictures without a face; the rest as for align_set."""
    device = next(detector.parameters()).device
    images = batch.images.to(device)
    positions = torch.tensor(batch.positions, dtype=torch.int64)
    ready = is_finished_crop(batch.sizes, chips) | finished
    crops = ready.nonzero().squeeze(1)
    views = render_crops_views(images[crops.to(device)], batch.sizes[crops], window, side, template, None if finished else chips)
    came = AlignedBatch(positions[crops].tolist(), views.cpu(), "crop", batch.failures)
    if ready.all():
        return SearchedBatch([came], [], torch.zeros(0, 5, 2, dtype=torch.float64))
    faces = detector.detect(images, batch.sizes)
    rows = most_central_face(faces, batch.sizes)
    having = ((rows >= 0) & ~ready).nonzero().squeeze(1)
    landmarks = faces.landmarks[rows[having].to(device)]
    views = align_faces(images, batch.sizes, having, landmarks, window, side, template)
    return SearchedBatch([came, AlignedBatch(positions[having].tolist(), views.cpu(), "mtcnn", [])],
                         positions[(rows < 0) & ~ready].tolist(),
                         (landmarks.cpu() / batch.sizes[having].flip(1)[:, None]).double())


def is_finished_crop(sizes: Tensor, chips: tuple | None) -> Tensor:
    """Pictures (B,) bool of the very side of finished crops, or of a checkpoint's chips (side, template)."""
    return (sizes == TEMPLATE_SIZE).all(1) | (sizes == (chips[0] if chips else TEMPLATE_SIZE)).all(1)


def render_crops_views(images: Tensor, sizes: Tensor, window: tuple, side: int, template: tuple = TEMPLATE,
              chips: tuple | None = None) -> Tensor:
    """Window views of finished crops, which are square but need not all have one resolution.

    They show all of the usual template; those of the side of chips (side, template) all of the chips' template.
    """
    def cut(some: Tensor, size: int) -> Tensor:
        shown = chips[1] if chips and chips[0] == size else TEMPLATE
        return crop_views(some[:, :, :size, :size], window, side, template, shown)

    resolutions = sizes[:, 0].unique().tolist()
    if len(resolutions) == 1:
        return cut(images, resolutions[0])
    views = torch.empty(len(images), 3, side, side, dtype=torch.uint8, device=images.device)
    for size in resolutions:
        rows = (sizes[:, 0] == size).nonzero().squeeze(1).to(images.device)
        views[rows] = cut(images[rows], size)
    return views
