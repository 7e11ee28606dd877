"""The one geometry: five landmarks -> similarity transform -> any window of the template at any resolution.

Coordinates of pictures put pixel (0, 0) at the centre of the top-left pixel, as the template does. A window
(x0, y0, x1, y1) is given by its edges in template pixels, the whole crop being (0, 0, 112, 112); the centre of
column j of a view of side S therefore lies at template x = x0 + (j + 0.5) * (x1 - x0) / S - 0.5.
"""
import functools
import itertools
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATE_SIZE = 112
# Left eye, right eye, nose, left and right mouth corner: the 112 x 112 crop in which recognition sets are handed
# around (Deng et al., "ArcFace", 2019, and the data sets prepared for it).
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
WHOLE_TEMPLATE = (0.0, 0.0, 112.0, 112.0)
# Mean landmarks of a 200 x 200 UTKFace chip (494 chips), as models/mtcnn.py finds them: a fall-back where not one face
# of a set is found. A detector that clips its boxes puts them at (65.5, 66.9), (138.3, 67.0), (101.1, 109.5),
# (69.7, 141.2), (133.6, 141.3).
CHIP_LANDMARKS = ((59.6, 57.6), (138.1, 57.7), (98.2, 103.8), (63.9, 138.5), (133.2, 138.4))
LARGEST_STEP = 1.25             # pixels of a picture between two samples of it


def fit_similarity(src: Tensor, dst: Tensor) -> Tensor:
    """Least-squares similarity transforms taking each face's points to the template.

    src (n, 5, 2) and dst (5, 2) are xy pixels. Returns M (n, 2, 3) float32, dst ~ M @ [x, y, 1]:
    rotation, one scale, two shifts, never a reflection. n may be 0.
    Raises ValueError when five points coincide, for then no scale exists; MTCNN.detect drops such faces.
    Umeyama, "Least-squares estimation of transformation parameters", 1991, in its closed 2-D form.
    """
    src_mean, dst_mean = src.mean(1, keepdim=True), dst.mean(0)
    p, q = src - src_mean, dst - dst_mean                                   # (n, 5, 2), (5, 2)
    spread = p.square().sum((1, 2))                                         # (n,)
    if (spread < 1e-6).any():                   # waits for the device, as detection did a moment ago
        raise ValueError("fit_similarity: the five landmarks of a face coincide")
    a = (p * q).sum((1, 2)) / spread                                        # scale * cos
    b = (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(1) / spread     # scale * sin
    linear = torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], 1)
    shift = dst_mean - (linear @ src_mean.mT).squeeze(-1)
    return torch.cat([linear, shift[..., None]], -1)


def invert_similarity(M: Tensor) -> Tensor:
    """Inverses of similarity transforms, (n, 2, 3) -> (n, 2, 3)."""
    inverse = M[:, :, :2].mT / M[:, :, :1].square().sum(1, keepdim=True)
    return torch.cat([inverse, -inverse @ M[:, :, 2:]], -1)


def view_axes(to_image: Tensor, extent: Tensor, window: tuple, side: int, samples: int) -> tuple[Tensor, Tensor]:
    """Where the samples of views lie, as grid_sample counts: -1 and 1 are a picture's edges, xy a complex number.

    to_image (n, 2, 3), template -> pixels of pictures of extent (width, height), (2,) or (n, 2). Returns columns and
    rows, (n, samples, side) complex64 each: sample (r, c) of view pixel (i, j) is at rows[:, r, i] + columns[:, c, j].
    The half-pixel shift of grid_sample is made here alone.
    """
    x0, y0, x1, y1 = window
    steps = (torch.arange(side * samples, device=to_image.device) + 0.5) / (side * samples)
    steps = steps.view(side, samples).T                                                     # (samples, side), 0 ... 1
    scaled = to_image * (2 / extent[..., None])
    scaled[:, :, 2] += 1 / extent - 1
    along, down, shift = torch.complex(scaled[:, 0], scaled[:, 1])[:, :, None, None].unbind(1)      # (n, 1, 1)
    return along * (x0 - 0.5 + (x1 - x0) * steps), down * (y0 - 0.5 + (y1 - y0) * steps) + shift


def sample_mean(images: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Pictures (n, 3, H, W) float32 at the samples of view_axes, bilinear, the mean of each view pixel's.

    Pictures or axes may be one for all n. Returns (n, 3, side, side) float32; a picture's edges repeat beyond it.
    """
    n = len(images) if len(columns) == 1 else len(columns)
    views = None
    for row, column in itertools.product(rows.unbind(1), columns.unbind(1)):
        at = torch.view_as_real(row[:, :, None] + column[:, None])          # four times as fast as adding pairs
        sampled = F.grid_sample(images.expand(n, -1, -1, -1), at.expand(n, -1, -1, -1), mode="bilinear",
                                padding_mode="border", align_corners=False)
        views = sampled if views is None else views.add_(sampled)
    n_samples = rows.shape[1] * columns.shape[1]
    return views.div_(n_samples) if n_samples > 1 else views


def sample_views(images: Tensor, to_image: Tensor, window: tuple, side: int, samples: int = 1) -> Tensor:
    """Views of a window, each pixel the mean of samples x samples bilinear ones; a picture's edges repeat beyond it.

    images (n, 3, H, W) float32 and to_image (n, 2, 3), on the CPU, template -> pixels of the image; either may be one
    for all. Returns (n, 3, side, side) float32 on the device of the images.
    """
    extent = torch.tensor([images.shape[3], images.shape[2]])
    columns, rows = view_axes(to_image, extent, window, side, samples)
    return sample_mean(images, *(axis.to(images.device, non_blocking=True) for axis in (columns, rows)))


def count_samples(to_image: Tensor, window: tuple, side: int) -> list[int]:
    """Samples along a side of each view's pixel, so many that no two lie more than LARGEST_STEP apart.

    to_image (n, 2, 3), template -> pixels of the picture. A bilinear sample takes in the pixels around it, so nothing
    between two of them is skipped: shrinking does not alias.
    """
    pixels = torch.linalg.vector_norm(to_image[:, :, 0], dim=1) * ((window[2] - window[0]) / side)
    return (pixels / LARGEST_STEP).ceil().clamp(1, 64).long().tolist()


def align_faces(images: Tensor, sizes: Tensor, image_index: Tensor, landmarks: Tensor, window: tuple,
                side: int, template: tuple = TEMPLATE) -> Tensor:
    """Window of the template of every face, rendered straight from its photograph in one resampling.

    images (B, 3, H, W) uint8, zero-padded right and below; sizes (B, 2) int64 true (height, width);
    image_index (n,) int64 and landmarks (n, 5, 2) float32 xy pixels as MTCNN.detect gives them; template: where the
    landmarks belong, a checkpoint's own.
    Returns views (n, 3, side, side) uint8 on the device of the images, whichever has the rest; n may be 0. What lies
    outside a photograph repeats its edge.
    """
    to_photo = invert_similarity(fit_similarity(landmarks.cpu(), torch.tensor(template)))
    image_index = image_index.cpu()
    extent = sizes.cpu()[image_index].flip(1)
    first, last = source_rectangles(to_photo, window, extent)
    to_photo[:, :, 2] -= first
    views = torch.empty(len(landmarks), 3, side, side, dtype=torch.uint8, device=images.device)
    where = list(zip(image_index.tolist(), first.tolist(), last.tolist(), strict=True))
    alike = defaultdict(list)
    for row, samples in enumerate(count_samples(to_photo, window, side)):
        alike[samples].append(row)
    for samples, rows in alike.items():
        axes = view_axes(to_photo[rows], (last - first)[rows], window, side, samples)
        axes = [axis.to(images.device, non_blocking=True).split(1) for axis in axes]
        for row, columns, its_rows in zip(rows, *axes, strict=True):
            i, (left, top), (right, bottom) = where[row]
            part = images[i, None, :, top:bottom, left:right].float()
            views[row] = round_to_int16(sample_mean(part, columns, its_rows))[0]
    return views


def source_rectangles(to_photo: Tensor, window: tuple, extent: Tensor) -> tuple[Tensor, Tensor]:
    """The rectangles of photographs that the windows of n faces lie in: first pixel, and the one after the last, xy.

    What is not looked at need not become floats. A rectangle ends where the photograph, of extent (n, 2) (width,
    height), does or a pixel beyond what is sampled, so its edges repeat only where the photograph's do. (n, 2) each.
    """
    x0, y0, x1, y1 = window
    corners = torch.tensor([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]) - 0.5
    points = corners @ to_photo[:, :, :2].mT + to_photo[:, None, :, 2]                      # (n, 4, 2)
    first = (points.amin(1).floor().long() - 1).clamp(min=0).minimum(extent - 1)
    return first, (points.amax(1).ceil().long() + 2).clamp(min=1).minimum(extent)


def crop_views(crops: Tensor, window: tuple, side: int, template: tuple = TEMPLATE,
               shown: tuple = TEMPLATE) -> Tensor:
    """Window of finished crops at the network's input side: (B, 3, R, R) uint8 -> (B, 3, side, side) uint8.

    The crops show all of the template `shown` at any resolution R (112 as handed around, finer from the builder); the
    window is one of `template`, a checkpoint's own, to which the similarity between the two templates leads.
    """
    to_crop = template_pixels(template_similarity(template, shown), crops.shape[-1] / TEMPLATE_SIZE)
    views = sample_views(crops.float(), to_crop, window, side, *count_samples(to_crop, window, side))
    return round_to_int16(views).to(torch.uint8)


@functools.lru_cache
def template_similarity(source: tuple, target: tuple) -> Tensor:
    """The similarity (1, 2, 3) from the coordinates of one template to those of another."""
    return invert_similarity(fit_similarity(torch.tensor([target]), torch.tensor(source)))


def template_pixels(to_template: Tensor, scale: float) -> Tensor:
    """Transforms (n, 2, 3) to template coordinates -> to pixels of crops that are `scale` times as fine."""
    moved = to_template * scale
    moved[:, :, 2] += (scale - 1) / 2
    return moved


def round_to_int16(views: Tensor) -> Tensor:
    """Float pictures rounded to 0..255, int16: a CPU makes bytes of these nine times as fast as of floats."""
    return views.round_().clamp_(0, 255).to(torch.int16)
