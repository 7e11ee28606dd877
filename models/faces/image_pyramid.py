"""P-Net on an image pyramid: resizing of images to levels, P-Net's output maps, candidate boxes."""
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.faces.mtcnn_networks import normalise_pixels

CELL, STRIDE = 12, 2            # P-Net is a 12 x 12 window with a stride of 2
PYRAMID_FACTOR = 0.707          # scale between two levels: each has half the area of the one before
CONV_BORDER = 2                 # rows and columns that a 3 x 3 convolution without padding removes
# Work per call; on a CPU, what fits in its caches.
CHUNK_PIXELS = {"cpu": 1 << 16, "cuda": 1 << 23}    # of a level, for P-Net
BATCH_PIXELS = {"cpu": 1 << 20, "cuda": 1 << 26}    # of pictures that are searched together

# Of one axis: nearer and farther pixel (b, n) int64 and their weights in 1/2048 (b, n) int32.
Axis = tuple[Tensor, Tensor, Tensor, Tensor]
# For some images at a time: their positions (b,) on the images' device; the scale of each level;
# P-Net's output map for each level, (5, b, h', w').
LevelMaps = Iterator[tuple[Tensor, list[float], list[Tensor]]]


def group_by_size(sizes: Tensor) -> list[tuple[tuple[int, int], Tensor]]:
    """Images grouped by size: ((height, width), index (k,) int64) for each distinct size."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (height, width) in enumerate(sizes.tolist()):
        groups.setdefault((height, width), []).append(i)
    return [(size, torch.tensor(index)) for size, index in groups.items()]


def pyramid_levels(height: int, width: int, min_face_size: float) -> list[tuple[float, int, int]]:
    """(scale, height, width) of the levels of a pyramid, finest first; [] for a small image."""
    scale = CELL / min_face_size
    levels = []
    while min(height, width) * scale > CELL:
        levels.append((scale, math.ceil(height * scale), math.ceil(width * scale)))
        scale *= PYRAMID_FACTOR
    return levels


def search_by_size(net: nn.Sequential, images: Tensor, sizes: Tensor, index: Tensor,
                   min_face_size: float, levels: slice) -> LevelMaps:
    """P-Net on the given levels of the images at index (k,), those of one size together.

    Small calls suit the caches of a CPU. sizes (B, 2) and index (k,) int64 are on the CPU.
    """
    for (height, width), members in group_by_size(sizes[index]):
        searched = pyramid_levels(height, width, min_face_size)[levels]
        if not searched:
            continue
        scales = [scale for scale, _, _ in searched]
        for chunk in members.split(max(1, BATCH_PIXELS[images.device.type] // (height * width))):
            chunk = index[chunk].to(images.device)
            pictures = images[chunk, :, :height, :width]
            yield chunk, scales, [run_pnet(net, pictures, *level[1:]) for level in searched]


def search_padded(net: nn.Sequential, images: Tensor, sizes: Tensor, index: Tensor,
                  min_face_size: float, levels: slice) -> LevelMaps:
    """search_by_size for all sizes in one call, as suits a GPU; cells past an image are -inf.

    The numbers differ from those of search_by_size only by the rounding of convolutions.
    """
    batch_size = BATCH_PIXELS[images.device.type] // max(1, images.shape[2] * images.shape[3])
    for chunk in index.split(max(1, batch_size)):
        tallest = int(sizes[chunk].amin(1).amax()) if len(chunk) else 0
        scales = [scale for scale, _, _ in pyramid_levels(tallest, tallest, min_face_size)[levels]]
        if scales:
            chunk_sizes, chunk = sizes[chunk], chunk.to(images.device, non_blocking=True)
            pictures = images[chunk]
            yield chunk, scales, [run_pnet_padded(net, pictures, chunk_sizes, scale)
                                  for scale in scales]


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Images (b, 3, h, w) uint8 -> (b, 3, height, width) int32 of 0 to 255, equal to OpenCV.

    Bit for bit INTER_LINEAR: bilinear without anti-aliasing, in 11-bit fixed point. Among similar
    candidates one grey level decides which is detected: with float weights, rounded or not, 1.7 %
    of the reference's faces of 40 px were elsewhere (IoU < 0.8), with these 0 of 341.
    """
    return resample_bilinear(images, axis_of_samples(images.shape[2], height, images.device),
                             axis_of_samples(images.shape[3], width, images.device))


def resample_bilinear(images: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """resize() at the samples of two axes, each for all images or one per image."""
    top, bottom, top_weight, bottom_weight = rows
    left, right, left_weight, right_weight = columns

    def gather_columns(lines: Tensor, index: Tensor) -> Tensor:
        # On a CPU, gather is four times as fast as index_select here.
        return lines.gather(3, index[:, None, None].expand(*lines.shape[:3], -1)).int()

    def blend(index: Tensor, weight: Tensor) -> Tensor:     # in place: memory takes half the time
        if len(index) == 1:
            lines = images.index_select(2, index[0])
        else:
            lines = images.gather(2, index[:, None, :, None].expand(-1, 3, -1, images.shape[3]))
        blended = gather_columns(lines, left).mul_(left_weight[:, None, None]).add_(
            gather_columns(lines, right).mul_(right_weight[:, None, None]))
        blended.bitwise_right_shift_(4).mul_(weight[:, None, :, None])
        return blended.bitwise_right_shift_(16)

    total = blend(top, top_weight).add_(blend(bottom, bottom_weight))
    return total.add_(2).bitwise_right_shift_(2)


def axes_of_samples(lengths: Tensor, targets: Tensor, n: int) -> Axis:
    """Positions of n samples per axis, of which the first targets (b,) cover lengths (b,) pixels.

    lengths and targets are int64.
    """
    last = (lengths - 1)[:, None]
    steps = torch.arange(n, dtype=torch.float64, device=lengths.device) + 0.5
    position = (steps * (lengths.double() / targets)[:, None] - 0.5).float()
    position = position.clamp(min=0).minimum(last)
    near = position.floor()
    far_fraction = position - near
    near_weight, far_weight = ((weight * 2048).round().int()
                               for weight in (1 - far_fraction, far_fraction))
    near = near.long()
    return near, (near + 1).minimum(last), near_weight, far_weight


@functools.lru_cache(maxsize=1024)
def axis_of_samples(length: int, target: int, device: torch.device) -> Axis:
    """axes_of_samples for a single axis, cached."""
    near, far, near_weight, far_weight = axes_of_samples(torch.tensor([length]),
                                                         torch.tensor([target]), target)
    return near.to(device), far.to(device), near_weight.to(device), far_weight.to(device)


def run_pnet(net: nn.Sequential, images: Tensor, height: int, width: int) -> Tensor:
    """P-Net's maps (5, b, h', w') for a level of images (b, 3, h, w) uint8 of one size.

    CHUNK_PIXELS are processed per call. A larger image is divided into overlapping bands, such that
    every cell has the same rows as in the whole image.
    """
    chunk_pixels = CHUNK_PIXELS[images.device.type]
    n_rows = math.ceil((height - 2) / STRIDE) - 4
    band_rows = max(1, chunk_pixels // (width * STRIDE))
    maps = []
    for chunk in images.split(max(1, chunk_pixels // (height * width))):
        level = resize(chunk, height, width).float().contiguous(memory_format=torch.channels_last)
        level = normalise_pixels(level)
        bands = []
        for first in range(0, n_rows, band_rows):
            end = min(first + band_rows, n_rows) * STRIDE + CELL - STRIDE
            bands.append(net(level[:, :, first * STRIDE:end]))
        maps.append(torch.cat(bands, 2))
    return torch.cat(maps, 1)


def run_pnet_padded(net: nn.Sequential, images: Tensor, sizes: Tensor, scale: float) -> Tensor:
    """P-Net's maps (5, b, h', w') for a level of padded images (b, 3, H, W) uint8 of sizes (b, 2).

    Cells that an image of its own would not have are -inf: all cells if it is too small for the
    level. A single image is never divided; 30 million pixels at the finest level take 6 GB.
    """
    scaled = sizes.double() * scale
    targets = scaled.ceil().long()                              # (b, 2), as in pyramid_levels
    height, width = (targets.amax(0) + 1).tolist()
    n_cells = (targets - 1).div(STRIDE, rounding_mode="floor") - 4
    n_cells[scaled.amin(1) <= CELL] = 0
    sizes, targets, n_cells = (tensor.to(images.device, non_blocking=True)
                               for tensor in (sizes, targets, n_cells))
    chunk_size = max(1, CHUNK_PIXELS[images.device.type] // (height * width))
    chunks = zip(*(tensor.split(chunk_size) for tensor in (images, sizes, targets, n_cells)),
                 strict=True)
    maps = []
    for chunk, size, target, cells in chunks:
        rows, columns = (axes_of_samples(size[:, axis], target[:, axis], n)
                         for axis, n in enumerate((height, width)))
        level = resample_bilinear(chunk, rows, columns).float()
        level = normalise_pixels(level.contiguous(memory_format=torch.channels_last))
        output = net[2:](repeat_edges(net[:2](level), target - CONV_BORDER))
        maps.append(mask_cells(output, cells))
    return torch.cat(maps, 1)


def mask_cells(maps: Tensor, n_cells: Tensor) -> Tensor:
    """Maps (5, b, h', w') whose logits past n_cells (b, 2), (rows, columns), are -inf; in place."""
    rows, columns = (torch.arange(n, device=maps.device) for n in maps.shape[2:])
    is_outside = (rows >= n_cells[:, :1])[:, :, None] | (columns >= n_cells[:, 1:])[:, None]
    maps[0].masked_fill_(is_outside, -math.inf)
    return maps


def repeat_edges(maps: Tensor, sizes: Tensor) -> Tensor:
    """Maps (b, C, h, w) in which the row and column after sizes (b, 2) repeat the last; in place.

    Max-pooling, whose last window may reach over the edge, then has the result of an unpadded map.
    """
    for axis in (2, 3):
        last = (sizes[:, axis - 2] - 1).clamp(min=0).view(-1, 1, 1, 1)
        line = last.expand(*(1 if d == axis else n for d, n in enumerate(maps.shape)))
        maps.scatter_(axis, line + 1, maps.gather(axis, line))
    return maps


def cells_to_boxes(maps: list[Tensor], scales: list[float],
                   threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """P-Net's cells above a threshold of the logit, from its map (5, b, h', w') of each level.

    Returns boxes (n, 4) float32, the cells in pixels of the image; scores (n,); offsets (n, 4);
    level (n,); image (n,).
    """
    cells = torch.cat([level_map.flatten(2) for level_map in maps], 2)          # (5, b, cells)
    device = cells.device
    n_cells = [level_map.shape[2] * level_map.shape[3] for level_map in maps]
    starts = torch.tensor([0, *n_cells], device=device).cumsum(0)
    widths = torch.tensor([level_map.shape[3] for level_map in maps], device=device)
    level_scales = torch.tensor(scales, device=device, dtype=torch.float64)
    image, cell = (cells[0] > threshold).nonzero(as_tuple=True)
    level = torch.bucketize(cell, starts, right=True) - 1
    local = cell - starts[level]
    corner = torch.stack([local % widths[level], local // widths[level]], 1) * STRIDE + 1   # (n, 2)
    boxes = torch.cat([corner, corner + CELL], 1) / level_scales[level, None]
    values = cells[:, image, cell]                                              # (5, n)
    return boxes.round().float(), values[0], values[1:].T, level, image
