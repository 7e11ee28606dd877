"""The one geometry: five landmarks -> similarity transform -> any window of the template at any resolution.

Coordinates of pictures put pixel (0, 0) at the centre of the top-left pixel, as the template does. A window
(x0, y0, x1, y1) is given by its edges in template pixels, the whole crop being (0, 0, 112, 112); the centre of
column j of a view of side S therefore lies at template x = x0 + (j + 0.5) * (x1 - x0) / S - 0.5.
"""
import math

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
MAX_SAMPLES = 4_000_000          # points of one grid_sample call: bounds memory at about 100 MB


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


def window_points(window: tuple, side: int, device: torch.device) -> Tensor:
    """Template xy of the pixel centres of a view: (side, side, 2) float32."""
    x0, y0, x1, y1 = window
    steps = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) / side
    y, x = torch.meshgrid(y0 + steps * (y1 - y0) - 0.5, x0 + steps * (x1 - x0) - 0.5, indexing="ij")
    return torch.stack([x, y], -1)


def sample_bilinear(images: Tensor, points: Tensor, sizes: Tensor) -> Tensor:
    """Bilinear samples of each image at its points, edges replicated beyond the picture.

    images (B, 3, H, W) float32; points (B, h, w, 2) xy pixels; sizes (B, 2) the true (height, width) of each
    image in the batch. Returns (B, 3, h, w) float32. The half-pixel shift of grid_sample is made here alone.
    """
    extent = torch.tensor(images.shape[:1:-1], device=images.device, dtype=torch.float32)          # (W, H)
    last = (sizes.flip(1) - 1).to(points.dtype).view(-1, 1, 1, 2)                                   # (B, 1, 1, 2)
    inside = torch.minimum(points.clamp(min=0), last)
    return F.grid_sample(images, (2 * inside + 1) / extent - 1, mode="bilinear", padding_mode="border",
                         align_corners=False)


def render(image: Tensor, to_photo: Tensor, window: tuple, side: int, size: Tensor) -> Tensor:
    """Views of several faces of one photograph, one supersampled resampling each.

    image (3, H, W) float32, to_photo (n, 2, 3) template -> photo, size (2,) true height and width.
    Returns (n, 3, side, side) float32. Each output pixel is the mean of k x k bilinear samples, k being the number
    of photo pixels it covers, rounded up: nothing between two samples is skipped, so shrinking does not alias.
    """
    pixels = torch.linalg.vector_norm(to_photo[:, :, 0], dim=1) * (window[2] - window[0]) / side
    factors = pixels.ceil().clamp(1, 64).long().tolist()
    views = torch.empty(len(to_photo), 3, side, side, device=image.device)
    for k in sorted(set(factors)):
        rows = [row for row, factor in enumerate(factors) if factor == k]
        points = window_points(window, side * k, image.device)                       # (S k, S k, 2)
        for some in torch.tensor(rows, device=image.device).split(max(1, MAX_SAMPLES // (side * k) ** 2)):
            M = to_photo[some]
            where = torch.einsum("nij,hwj->nhwi", M[:, :, :2], points) + M[:, None, None, :, 2]
            faces = sample_bilinear(image[None], where.reshape(1, -1, side * k, 2), size[None])
            faces = faces.view(3, len(some), side * k, side * k).transpose(0, 1)
            views[some] = F.avg_pool2d(faces, k) if k > 1 else faces
    return views


def align_faces(images: Tensor, sizes: Tensor, image_index: Tensor, landmarks: Tensor, window: tuple,
                side: int, template: tuple = TEMPLATE) -> Tensor:
    """Window of the template of every face, rendered straight from its photograph in one resampling.

    images (B, 3, H, W) uint8, zero-padded right and below; sizes (B, 2) int64 true (height, width);
    image_index (n,) int64 and landmarks (n, 5, 2) float32 xy pixels as MTCNN.detect gives them; template: where the
    landmarks belong, a checkpoint's own.
    Returns views (n, 3, side, side) uint8; n may be 0. What lies outside a photograph repeats its edge.
    """
    to_photo = invert_similarity(fit_similarity(landmarks, torch.tensor(template, device=images.device)))
    views = torch.empty(len(landmarks), 3, side, side, dtype=torch.uint8, device=images.device)
    for i in image_index.unique().tolist():
        rows = (image_index == i).nonzero().squeeze(1)
        views[rows] = to_bytes(render(images[i].float(), to_photo[rows], window, side, sizes[i]))
    return views


def crop_views(crops: Tensor, window: tuple, side: int, template: tuple = TEMPLATE,
               shown: tuple = TEMPLATE) -> Tensor:
    """Window of finished crops at the network's input side: (B, 3, R, R) uint8 -> (B, 3, side, side) uint8.

    The crops show all of the template `shown` at any resolution R (112 as handed around, finer from the builder); the
    window is one of `template`, a checkpoint's own, to which the similarity between the two templates leads.
    """
    M = invert_similarity(fit_similarity(torch.tensor([shown]), torch.tensor(template)))[0].to(crops.device)
    scale = crops.shape[-1] / TEMPLATE_SIZE
    k = max(1, math.ceil(scale * (window[2] - window[0]) / side))
    points = (window_points(window, side * k, crops.device) @ M[:, :2].T + M[:, 2] + 0.5) * scale - 0.5
    sizes = torch.tensor(crops.shape[2:], device=crops.device).expand(len(crops), 2)
    views = sample_bilinear(crops.float(), points.expand(len(crops), -1, -1, -1), sizes)
    return to_bytes(F.avg_pool2d(views, k) if k > 1 else views)


def to_bytes(views: Tensor) -> Tensor:
    """Float pictures in 0..255 -> uint8, rounded."""
    return views.round_().clamp_(0, 255).to(torch.uint8)
