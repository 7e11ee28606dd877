"""faces/image_pyramid"""
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.faces.mtcnn_networks import normalise_pixels

CELL, STRIDE = 12, 2            # P-Net is a 12 x 12 window moved by 2
PYRAMID_FACTOR = 0.707          # each level half the area of the one before


CONV = 2                        # rows and columns that a convolution of 3 x 3 takes off


# How much one call takes: on a CPU what its caches hold.
CHUNK_PIXELS = {"cpu": 1 << 16, "cuda": 1 << 23}    # P-Net: pixels of a level


BATCH_PIXELS = {"cpu": 1 << 20, "cuda": 1 << 26}    # pictures searched together: their pixels


def group_by_size(sizes: Tensor) -> list[tuple[tuple[int, int], Tensor]]:
    """Images of one size together: ((height, width), index (k,) int64) for each size there is."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, size in enumerate(sizes.tolist()):
        groups.setdefault(tuple(size), []).append(i)
    return [(size, torch.tensor(index)) for size, index in groups.items()]


def pyramid(height: int, width: int, min_face_size: float) -> list[tuple[float, int, int]]:
    """The levels of an image's pyramid, finest first: scale, height, width. Small images have none."""
    scale = CELL / min_face_size
    levels = []
    while min(height, width) * scale > CELL:
        levels.append((scale, math.ceil(height * scale), math.ceil(width * scale)))
        scale *= PYRAMID_FACTOR
    return levels


def search_by_size(net: nn.Sequential, images: Tensor, sizes: Tensor, among: Tensor, min_face_size: float,
                   which: slice) -> Iterator[tuple[Tensor, list[float], list[Tensor]]]:
    """P-Net on the levels `which` of the images `among` (k,), those of one size together, as a CPU's caches like it.

    sizes (B, 2) and among (k,) int64 lie on the CPU. Yields, for some images at a time: their positions (b,) on the
    images' device; the scale of each level; P-Net's map of each level, (5, b, h', w').
    """
    for (height, width), index in group_by_size(sizes[among]):
        levels = pyramid(height, width, min_face_size)[which]
        for part in index.split(max(1, BATCH_PIXELS[images.device.type] // (height * width))) if levels else ():
            part = among[part].to(images.device)
            pictures = images[part, :, :height, :width]
            yield part, [level[0] for level in levels], [run_pnet(net, pictures, *level[1:]) for level in levels]


def search_together(net: nn.Sequential, images: Tensor, sizes: Tensor, among: Tensor, min_face_size: float,
                    which: slice) -> Iterator[tuple[Tensor, list[float], list[Tensor]]]:
    """The same with images of all sizes in one call, which a GPU needs to be busy; cells past an image are -inf.

    The numbers are those of search_by_size, but for what convolutions of other sizes round otherwise.
    """
    for part in among.split(max(1, BATCH_PIXELS[images.device.type] // max(1, images.shape[2] * images.shape[3]))):
        tallest = int(sizes[part].amin(1).amax()) if len(part) else 0
        scales = [level[0] for level in pyramid(tallest, tallest, min_face_size)[which]]
        if scales:
            part_sizes, part = sizes[part], part.to(images.device, non_blocking=True)
            pictures = images[part]
            yield part, scales, [run_pnet_padded(net, pictures, part_sizes, scale) for scale in scales]


Axis = tuple[Tensor, Tensor, Tensor, Tensor]    # near and far pixel (b, n) int64, their weights in 1/2048 (b, n) int32


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images (b, 3, h, w) uint8 -> (b, 3, height, width) int32 of 0 to 255, bit for bit as OpenCV's INTER_LINEAR.

    Bilinear without anti-aliasing, in 11-bit fixed point. Where several candidates look alike, one grey level decides
    which of them is found: with float weights, rounded or not, 1.7 % of the reference's faces of 40 px lay elsewhere
    (IoU < 0.8), with these none of 341 tried.
    """
    return resample_bilinear(images, axis_of_samples(images.shape[2], height, images.device),
                    axis_of_samples(images.shape[3], width, images.device))


def resample_bilinear(images: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """What resize does, at the samples of two axes, each one for all images or one for each."""
    top, bottom, top_weight, bottom_weight = rows
    left, right, left_weight, right_weight = columns

    def pick(lines: Tensor, which: Tensor) -> Tensor:               # four times as fast as index_select on a CPU
        return lines.gather(3, which[:, None, None].expand(*lines.shape[:3], -1)).int()

    def blend(which: Tensor, weight: Tensor) -> Tensor:             # in place: half the time is memory's
        lines = (images.index_select(2, which[0]) if len(which) == 1 else
                 images.gather(2, which[:, None, :, None].expand(-1, 3, -1, images.shape[3])))
        across = pick(lines, left).mul_(left_weight[:, None, None]).add_(
            pick(lines, right).mul_(right_weight[:, None, None]))
        return across.bitwise_right_shift_(4).mul_(weight[:, None, :, None]).bitwise_right_shift_(16)

    return blend(top, top_weight).add_(blend(bottom, bottom_weight)).add_(2).bitwise_right_shift_(2)


def axes_of_samples(lengths: Tensor, targets: Tensor, n: int) -> Axis:
    """Where each of n samples lies along an axis, of which the first targets (b,) cover lengths (b,) pixels, int64."""
    last = (lengths - 1)[:, None]
    steps = torch.arange(n, dtype=torch.float64, device=lengths.device) + 0.5
    at = (steps * (lengths.double() / targets)[:, None] - 0.5).float().clamp(min=0).minimum(last)
    near = at.floor()
    near_weight, far_weight = ((weight * 2048).round().int() for weight in (1 - (at - near), at - near))
    near = near.long()
    return near, (near + 1).minimum(last), near_weight, far_weight


@functools.lru_cache(maxsize=1024)
def axis_of_samples(length: int, target: int, device: torch.device) -> Axis:
    """axes_of_samples of one axis, remembered."""
    return tuple(part.to(device) for part in axes_of_samples(torch.tensor([length]), torch.tensor([target]), target))


def run_pnet(net: nn.Sequential, images: Tensor, height: int, width: int) -> Tensor:
    """P-Net on a level of same-sized images (b, 3, h, w) uint8, CHUNK_PIXELS at a time: (5, b, h', w').

    One image that is larger is taken in bands, of which a cell sees the rows that it would anyway.
    """
    chunk = CHUNK_PIXELS[images.device.type]
    rows = math.ceil((height - 2) / STRIDE) - 4
    band = max(1, chunk // (width * STRIDE))
    found = []
    for some in images.split(max(1, chunk // (height * width))):
        level = normalise_pixels(resize(some, height, width).float().contiguous(memory_format=torch.channels_last))
        parts = [net(level[:, :, first * STRIDE:min(first + band, rows) * STRIDE + CELL - STRIDE])
                 for first in range(0, rows, band)]
        found.append(torch.cat(parts, 2))
    return torch.cat(found, 1)


def run_pnet_padded(net: nn.Sequential, images: Tensor, sizes: Tensor, scale: float) -> Tensor:
    """P-Net on a level of images (b, 3, H, W) uint8 that are padded from sizes (b, 2) int64: (5, b, h', w').

    Cells that an image alone would not have are -inf, all of them where it is too small for the level. One image is
    never divided: of 30 million pixels at the finest level, 6 GB.
    """
    scaled = sizes.double() * scale
    targets = scaled.ceil().long()                                                          # (b, 2), as pyramid's
    height, width = (targets.amax(0) + 1).tolist()
    seen = (targets - 1).div(STRIDE, rounding_mode="floor") - 4                             # cells of each image
    seen[scaled.amin(1) <= CELL] = 0
    sizes, targets, seen = (part.to(images.device, non_blocking=True) for part in (sizes, targets, seen))
    found = []
    few = max(1, CHUNK_PIXELS[images.device.type] // (height * width))
    for some, size, target, cells in zip(*(part.split(few) for part in (images, sizes, targets, seen)), strict=True):
        axes = [axes_of_samples(size[:, axis], target[:, axis], n) for axis, n in enumerate((height, width))]
        level = normalise_pixels(resample_bilinear(some, *axes).float().contiguous(memory_format=torch.channels_last))
        maps = net[2:](repeat_edges(net[:2](level), target - CONV))
        rows, columns = (torch.arange(n, device=maps.device) for n in maps.shape[2:])
        past = (rows >= cells[:, :1])[:, :, None] | (columns >= cells[:, 1:])[:, None]
        maps[0].masked_fill_(past, -math.inf)
        found.append(maps)
    return torch.cat(found, 1)


def repeat_edges(maps: Tensor, sizes: Tensor) -> Tensor:
    """Maps (b, C, h, w) whose rows and columns past each one's sizes (b, 2) begin with a copy of the last; in place.

    Pooling, whose last window may reach over the edge, then gives what it would give there.
    """
    for axis in (2, 3):
        last = (sizes[:, axis - 2] - 1).clamp(min=0).view(-1, 1, 1, 1)
        line = last.expand(*(1 if d == axis else n for d, n in enumerate(maps.shape)))
        maps.scatter_(axis, line + 1, maps.gather(axis, line))
    return maps


def cells_to_boxes(maps: list[Tensor], scales: list[float], threshold: float):
    """P-Net's cells above a threshold of the logit, from its output (5, b, h', w') for each level.

    Returns boxes (n, 4) float32, the cells in pixels of the image; scores (n,); offsets (n, 4); level (n,); image (n,).
    """
    cells = torch.cat([m.flatten(2) for m in maps], 2)                                      # (5, b, cells)
    device = cells.device
    starts = torch.tensor([0] + [m.shape[2] * m.shape[3] for m in maps], device=device).cumsum(0)
    widths = torch.tensor([m.shape[3] for m in maps], device=device)
    scales = torch.tensor(scales, device=device, dtype=torch.float64)
    image, cell = (cells[0] > threshold).nonzero(as_tuple=True)
    level = torch.bucketize(cell, starts, right=True) - 1
    local = cell - starts[level]
    corner = torch.stack([local % widths[level], local // widths[level]], 1) * STRIDE + 1    # (n, 2) xy
    boxes = torch.cat([corner, corner + CELL], 1) / scales[level, None]
    values = cells[:, image, cell]                                                          # (5, n)
    return boxes.round().float(), values[0], values[1:].T, level, image
