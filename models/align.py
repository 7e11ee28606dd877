"""The one geometry: five landmarks -> similarity transform -> any window of the template at any resolution.

Coordinates of pictures put pixel (0, 0) at the centre of the top-left pixel, as the template does. A window
(x0, y0, x1, y1) is given by its edges in template pixels, the whole crop being (0, 0, 112, 112); the centre of
column j of a view of side S therefore lies at template x = x0 + (j + 0.5) * (x1 - x0) / S - 0.5.
"""
import functools
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPLATE_SIZE = 112
# Left eye, right eye, nose, left and right mouth corner: the 112 x 112 crop in which recognition sets are handed
# around (Deng et al., "ArcFace", 2019, and the data sets prepared for it).
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
WHOLE = (0.0, 0.0, 112.0, 112.0)
# Mean landmarks of a 200 x 200 UTKFace chip (494 chips), as models/mtcnn.py finds them: a fall-back where not one face
# of a set is found. A detector that clips its boxes puts them at (65.5, 66.9), (138.3, 67.0), (101.1, 109.5),
# (69.7, 141.2), (133.6, 141.3).
CHIP_LANDMARKS = ((59.6, 57.6), (138.1, 57.7), (98.2, 103.8), (63.9, 138.5), (133.2, 138.4))
LARGEST_STEP = 1.25             # pixels of a picture between two samples of it
MAX_PIXELS = 4_000_000          # of the views made at once: bounds memory at about 200 MB


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
    inverse = torch.linalg.inv(M[:, :, :2])
    return torch.cat([inverse, -inverse @ M[:, :, 2:]], -1)


def sample_views(images: Tensor, to_image: Tensor, window: tuple, side: int, samples: int = 1) -> Tensor:
    """Views of a window, each pixel the mean of samples x samples bilinear ones; a picture's edges repeat beyond it.

    images (n, 3, H, W) float32 and to_image (n, 2, 3), template -> pixels of the image; either may be one for all.
    Returns (n, 3, side, side) float32. The half-pixel shift of grid_sample is made here alone.
    """
    x0, y0, x1, y1 = window
    n, device = len(images) if len(to_image) == 1 else len(to_image), to_image.device
    half = torch.tensor([(x1 - x0) / 2, (y1 - y0) / 2], device=device)
    centre = torch.tensor([(x0 + x1) / 2 - 0.5, (y0 + y1) / 2 - 0.5], device=device)
    extent = torch.tensor([images.shape[3], images.shape[2]], device=device)
    linear = to_image[:, :, :2] * half * (2 / extent[:, None])                  # from -1 ... 1 to -1 ... 1
    shift = (to_image[:, :, :2] @ centre + to_image[:, :, 2] + 0.5) * (2 / extent) - 1
    theta = torch.cat([linear, shift[:, :, None]], 2).to(images.device)
    grid = F.affine_grid(theta, [len(theta), 3, side, side], align_corners=False)
    steps = ((torch.arange(samples, device=device) + 0.5) / samples - 0.5) * (2 / side)
    offsets = (torch.cartesian_prod(steps, steps) @ linear.mT).to(images.device)                # (n, samples^2, 2)
    views = None
    for offset in offsets.unbind(1):
        at = (grid + offset[:, None, None] if samples > 1 else grid).expand(n, -1, -1, -1)
        sampled = F.grid_sample(images.expand(n, -1, -1, -1), at, mode="bilinear", padding_mode="border",
                                align_corners=False)
        views = sampled if views is None else views.add_(sampled)
    return views.div_(samples ** 2) if samples > 1 else views


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
    Returns views (n, 3, side, side) uint8; n may be 0. What lies outside a photograph repeats its edge.
    """
    to_photo = invert_similarity(fit_similarity(landmarks.cpu(), torch.tensor(template)))
    views = torch.empty(len(landmarks), 3, side, side, dtype=torch.uint8, device=images.device)
    of_image = defaultdict(list)
    for row, key in enumerate(zip(image_index.tolist(), count_samples(to_photo, window, side), strict=True)):
        of_image[key].append(row)
    for (i, samples), its_rows in of_image.items():
        height, width = sizes[i].tolist()
        for rows in torch.tensor(its_rows).split(max(1, MAX_PIXELS // side ** 2)):
            part, to_part = cut_out(images[i, :, :height, :width], to_photo[rows], window)
            views[rows.to(views.device)] = to_bytes(sample_views(part[None].float(), to_part, window, side, samples))
    return views


def cut_out(photo: Tensor, to_photo: Tensor, window: tuple) -> tuple[Tensor, Tensor]:
    """The rectangle of a photograph (3, H, W) that the windows of some faces lie in, and template -> its pixels.

    What is not looked at need not become floats. The rectangle ends where the photograph does or a pixel beyond what
    is sampled, so its edges repeat only where the photograph's do.
    """
    x0, y0, x1, y1 = window
    corners = torch.tensor([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]) - 0.5
    points = (corners @ to_photo[:, :, :2].mT + to_photo[:, None, :, 2]).flatten(0, 1)
    extent = torch.tensor([photo.shape[2], photo.shape[1]])
    left, top = (points.amin(0).floor().long() - 1).clamp(min=0).minimum(extent - 1).tolist()
    right, bottom = (points.amax(0).ceil().long() + 2).clamp(min=1).tolist()
    moved = to_photo.clone()
    moved[:, :, 2] -= torch.tensor([left, top])
    return photo[:, top:bottom, left:right], moved


def crop_views(crops: Tensor, window: tuple, side: int, template: tuple = TEMPLATE,
               shown: tuple = TEMPLATE) -> Tensor:
    """Window of finished crops at the network's input side: (B, 3, R, R) uint8 -> (B, 3, side, side) uint8.

    The crops show all of the template `shown` at any resolution R (112 as handed around, finer from the builder); the
    window is one of `template`, a checkpoint's own, to which the similarity between the two templates leads.
    """
    to_crop = template_pixels(between_templates(template, shown), crops.shape[-1] / TEMPLATE_SIZE)
    return to_bytes(sample_views(crops.float(), to_crop, window, side, *count_samples(to_crop, window, side)))


@functools.lru_cache
def between_templates(source: tuple, target: tuple) -> Tensor:
    """The similarity (1, 2, 3) from the coordinates of one template to those of another."""
    return invert_similarity(fit_similarity(torch.tensor([target]), torch.tensor(source)))


def template_pixels(to_template: Tensor, scale: float) -> Tensor:
    """Transforms (n, 2, 3) to template coordinates -> to pixels of crops that are `scale` times as fine."""
    moved = to_template * scale
    moved[:, :, 2] += (scale - 1) / 2
    return moved


def to_bytes(views: Tensor) -> Tensor:
    """Float pictures in 0..255 -> uint8, rounded."""
    return views.round_().clamp_(0, 255).to(torch.uint8)
