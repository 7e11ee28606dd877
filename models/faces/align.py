"""Alignment: five landmarks -> similarity transform -> a window of the template at any resolution.

Pixel (0, 0) of a picture and of the template is the centre of its top-left pixel. A window
(x0, y0, x1, y1) is given by its edges in template pixels; the whole crop is (0, 0, 112, 112). The
centre of column j of a view of S pixels is at template x = x0 + (j + 0.5) * (x1 - x0) / S - 0.5.
"""
import functools
import itertools
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

Template = tuple[tuple[float, float], ...]
Window = tuple[float, float, float, float]

TEMPLATE_SIZE = 112
# ArcFace template: left eye, right eye, nose, left and right mouth corner of the 112 x 112 crops in
# which face recognition data sets are distributed (Deng et al., "ArcFace", 2019).
TEMPLATE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655),
            (70.7299, 92.2041))
WHOLE_TEMPLATE = (0.0, 0.0, 112.0, 112.0)
# Mean landmarks of a 200 x 200 UTKFace chip: 494 chips, detected by models/faces/mtcnn.py. The
# fallback for a set without a single detected face. A detector that clips boxes to the picture
# gives (65.5, 66.9), (138.3, 67.0), (101.1, 109.5), (69.7, 141.2), (133.6, 141.3).
CHIP_LANDMARKS = ((59.6, 57.6), (138.1, 57.7), (98.2, 103.8), (63.9, 138.5), (133.2, 138.4))
MAX_STEP = 1.25             # pixels of the picture between two samples


def fit_similarity(src: Tensor, dst: Tensor) -> Tensor:
    """Least-squares similarity transforms that map each face's landmarks to the template.

    src (n, 5, 2) and dst (5, 2) are xy pixels. Returns M (n, 2, 3) float32 with dst ~ M @ [x, y,
    1]: rotation, one scale, translation, no reflection. n may be 0.
    Raises ValueError if five points coincide; MTCNN.detect drops such faces.
    Umeyama, "Least-squares estimation of transformation parameters", 1991, in closed 2-D form.
    """
    src_mean, dst_mean = src.mean(1, keepdim=True), dst.mean(0)
    p, q = src - src_mean, dst - dst_mean                                   # (n, 5, 2), (5, 2)
    spread = p.square().sum((1, 2))                                         # (n,)
    if (spread < 1e-6).any():                   # waits for the device, as detection did just before
        raise ValueError("fit_similarity: the five landmarks of a face coincide")
    a = (p * q).sum((1, 2)) / spread                                        # scale * cos
    b = (p[..., 0] * q[..., 1] - p[..., 1] * q[..., 0]).sum(1) / spread     # scale * sin
    linear = torch.stack([torch.stack([a, -b], -1), torch.stack([b, a], -1)], 1)
    translation = dst_mean - (linear @ src_mean.mT).squeeze(-1)
    return torch.cat([linear, translation[..., None]], -1)


def invert_similarity(M: Tensor) -> Tensor:
    """Inverses of similarity transforms, (n, 2, 3) -> (n, 2, 3)."""
    inverse = M[:, :, :2].mT / M[:, :, :1].square().sum(1, keepdim=True)
    return torch.cat([inverse, -inverse @ M[:, :, 2:]], -1)


def view_axes(to_image: Tensor, extent: Tensor, window: Window, size: int,
              samples: int) -> tuple[Tensor, Tensor]:
    """Sample positions of views in grid_sample coordinates, as columns and rows.

    to_image (n, 2, 3): template -> pixels of pictures of extent (width, height), (2,) or (n, 2).
    Returns columns and rows, (n, samples, size) complex64 each, with x real and y imaginary, -1 and
    1 at the edges of the picture. Sample (r, c) of view pixel (i, j) is at rows[:, r, i] +
    columns[:, c, j]. Only this function applies the half-pixel shift of grid_sample.
    """
    x0, y0, x1, y1 = window
    steps = (torch.arange(size * samples, device=to_image.device) + 0.5) / (size * samples)
    steps = steps.view(size, samples).T                                 # (samples, size), 0 ... 1
    scaled = to_image * (2 / extent[..., None])
    scaled[:, :, 2] += 1 / extent - 1
    x_step, y_step, origin = torch.complex(scaled[:, 0], scaled[:, 1])[:, :, None, None].unbind(1)
    columns = x_step * (x0 - 0.5 + (x1 - x0) * steps)
    return columns, y_step * (y0 - 0.5 + (y1 - y0) * steps) + origin


def sample_mean(images: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """Views whose pixels are the mean of bilinear samples at the positions of view_axes.

    images (n, 3, H, W) float32; images or axes may be a single one for all n. Positions outside a
    picture repeat its edge. Returns (n, 3, size, size) float32.
    """
    n = len(images) if len(columns) == 1 else len(columns)
    views: Tensor | None = None
    for row, column in itertools.product(rows.unbind(1), columns.unbind(1)):
        # Adding complex numbers is four times as fast as adding pairs.
        grid = torch.view_as_real(row[:, :, None] + column[:, None])
        sampled = F.grid_sample(images.expand(n, -1, -1, -1), grid.expand(n, -1, -1, -1),
                                mode="bilinear", padding_mode="border", align_corners=False)
        views = sampled if views is None else views.add_(sampled)
    assert views is not None
    n_samples = rows.shape[1] * columns.shape[1]
    return views.div_(n_samples) if n_samples > 1 else views


def sample_views(images: Tensor, to_image: Tensor, window: Window, size: int,
                 samples: int = 1) -> Tensor:
    """Views of a window; each pixel is the mean of samples x samples bilinear samples.

    images (n, 3, H, W) float32; to_image (n, 2, 3), on the CPU, template -> pixels of the image.
    Either may be a single one for all n. Positions outside a picture repeat its edge. Returns
    (n, 3, size, size) float32 on the device of the images.
    """
    extent = torch.tensor([images.shape[3], images.shape[2]])
    columns, rows = view_axes(to_image, extent, window, size, samples)
    return sample_mean(images, columns.to(images.device, non_blocking=True),
                       rows.to(images.device, non_blocking=True))


def count_samples(to_image: Tensor, window: Window, size: int) -> list[int]:
    """Samples per view pixel and axis, so many that no two are more than MAX_STEP apart.

    to_image (n, 2, 3): template -> pixels of the picture. A bilinear sample covers the pixels
    around it, so no pixel between two samples is skipped and reducing does not alias.
    """
    scale = torch.linalg.vector_norm(to_image[:, :, 0], dim=1)
    pixels = scale * ((window[2] - window[0]) / size)
    return (pixels / MAX_STEP).ceil().clamp(1, 64).long().tolist()


def align_faces(images: Tensor, sizes: Tensor, image_index: Tensor, landmarks: Tensor,
                window: Window, size: int, template: Template = TEMPLATE) -> Tensor:
    """A window of the template for every face, rendered from its photograph in one resampling.

    images (B, 3, H, W) uint8, zero-padded right and below; sizes (B, 2) int64 true (height, width);
    image_index (n,) int64 and landmarks (n, 5, 2) float32 xy pixels, as from MTCNN.detect;
    template: target positions of the landmarks.
    Returns views (n, 3, size, size) uint8 on the device of the images; the other tensors may be on
    any device. n may be 0. Positions outside a photograph repeat its edge.
    """
    to_photo = invert_similarity(fit_similarity(landmarks.cpu(), torch.tensor(template)))
    image_index = image_index.cpu()
    first, last = source_rectangles(to_photo, window, sizes.cpu()[image_index].flip(1))
    to_photo[:, :, 2] -= first
    rectangles = list(zip(image_index.tolist(), first.tolist(), last.tolist(), strict=True))
    rows_by_samples: dict[int, list[int]] = defaultdict(list)
    for row, samples in enumerate(count_samples(to_photo, window, size)):
        rows_by_samples[samples].append(row)
    views = torch.empty(len(landmarks), 3, size, size, dtype=torch.uint8, device=images.device)
    for samples, rows in rows_by_samples.items():
        axes = view_axes(to_photo[rows], (last - first)[rows], window, size, samples)
        x_axes, y_axes = (axis.to(images.device, non_blocking=True).split(1) for axis in axes)
        for row, x_axis, y_axis in zip(rows, x_axes, y_axes, strict=True):
            i, (left, top), (right, bottom) = rectangles[row]
            rectangle = images[i, None, :, top:bottom, left:right].float()
            views[row] = round_to_int16(sample_mean(rectangle, x_axis, y_axis))[0]
    return views


def source_rectangles(to_photo: Tensor, window: Window, extent: Tensor) -> tuple[Tensor, Tensor]:
    """Rectangles of photographs that contain the windows of n faces: only these become floats.

    extent (n, 2): (width, height) of the photographs. Returns the first pixel and the one after the
    last, (n, 2) xy each. A rectangle has a margin of a pixel, unless the photograph ends there, so
    its edges are repeated only where those of the photograph are.
    """
    x0, y0, x1, y1 = window
    corners = torch.tensor([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]) - 0.5
    points = corners @ to_photo[:, :, :2].mT + to_photo[:, None, :, 2]          # (n, 4, 2)
    first = (points.amin(1).floor().long() - 1).clamp(min=0).minimum(extent - 1)
    return first, (points.amax(1).ceil().long() + 2).clamp(min=1).minimum(extent)


def crop_views(crops: Tensor, window: Window, size: int, template: Template = TEMPLATE,
               crop_template: Template = TEMPLATE) -> Tensor:
    """A window of aligned crops: (B, 3, R, R) uint8 -> (B, 3, size, size) uint8.

    The crops show the whole of crop_template at any resolution R: usually 112, more from the
    builder. The window is one of `template`; the similarity between the two templates maps it to
    the crops.
    """
    similarity = template_similarity(template, crop_template)
    to_crop = template_pixels(similarity, crops.shape[-1] / TEMPLATE_SIZE)
    samples, = count_samples(to_crop, window, size)
    views = sample_views(crops.float(), to_crop, window, size, samples)
    return round_to_int16(views).to(torch.uint8)


@functools.lru_cache
def template_similarity(source: Template, target: Template) -> Tensor:
    """The similarity transform (1, 2, 3) from coordinates of one template to those of another."""
    return invert_similarity(fit_similarity(torch.tensor([target]), torch.tensor(source)))


def template_pixels(to_template: Tensor, scale: float) -> Tensor:
    """Transforms (n, 2, 3) to the template -> to pixels of crops of 112 * scale pixels."""
    to_pixels = to_template * scale
    to_pixels[:, :, 2] += (scale - 1) / 2
    return to_pixels


def round_to_int16(views: Tensor) -> Tensor:
    """Views rounded to 0..255; a CPU converts int16 to uint8 nine times as fast as floats."""
    return views.round_().clamp_(0, 255).to(torch.int16)
