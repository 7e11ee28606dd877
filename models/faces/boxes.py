"""faces/boxes"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

COMPARED_BOXES = {"cpu": 256, "cuda": 4096}                  # boxes that are compared with one another in one call


def shift(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Boxes (n, 4) moved by a network's offsets (n, 4), which are fractions of their sides."""
    side = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + offsets * torch.cat([side, side], 1)


def square_boxes(boxes: Tensor) -> Tensor:
    """The squares about boxes (n, 4), same centres, on whole pixels."""
    side = boxes[:, 2:] - boxes[:, :2] + 1
    longest = side.amax(1, keepdim=True)
    corner = boxes[:, :2] + side / 2 - longest / 2
    return torch.cat([corner, corner + longest - 1], 1).round()


def clip_boxes_to_image(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (n, 4) without what lies outside their images, whose (height, width) are sizes (n, 2)."""
    return torch.cat([boxes[:, :2].clamp(min=0), boxes[:, 2:].minimum(sizes.flip(1) - 1)], 1)


def suppress(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression by IoU within each group: indices of the boxes that stay, ascending.

    group (n,) int64 is ascending. Groups are moved apart and compared together, which on whole pixels is exact. But
    time grows with the square of what is compared: no more than COMPARED_BOXES boxes or one group at once.
    """
    ends = boxes.double() + boxes.new_tensor([0, 0, 1, 1]) + (group * 100_000)[:, None]
    return suppress_in_groups(lambda *some: nms(*some, threshold), group, ends, scores.double()).sort().values


def suppress_in_groups(keep: Callable, group: Tensor, *rows: Tensor) -> Tensor:
    """Indices of what keep(*rows) keeps, asked bunch by bunch of whole groups; group (n,) int64 is ascending."""
    kept, start, counts = [group.new_zeros(0)], 0, group_run_lengths(group)
    for some in zip(*(part.split(counts) for part in rows), strict=True):
        kept.append(keep(*some) + start)
        start += len(some[0])
    return torch.cat(kept)


def group_run_lengths(group: Tensor) -> list[int]:
    """Sizes of the runs of rows that are compared at once: whole groups."""
    sizes = []
    for count in group.unique_consecutive(return_counts=True)[1].tolist():
        if sizes and sizes[-1] + count <= COMPARED_BOXES[group.device.type]:
            sizes[-1] += count
        else:
            sizes.append(count)
    return sizes


def suppress_nested(boxes: Tensor, image_index: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes (n, 4), each image's best first, that no better box of their image covers.

    Covered is intersection over the smaller of the two boxes. A few images at a time, for memory grows with the square.
    """
    return suppress_in_groups(lambda *some: uncovered_boxes(*some, threshold), image_index, boxes, image_index)


def uncovered_boxes(boxes: Tensor, image_index: Tensor, threshold: float) -> Tensor:
    """suppress_nested of all boxes at once.

    The loop ends when nothing changes any more; it runs as often as the longest chain of boxes that unseat one another,
    two or three times.
    """
    top_left = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    intersection = (bottom_right - top_left + 1).clamp(min=0).prod(2)                       # (n, n)
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    covered = intersection / torch.minimum(area[:, None], area) > threshold
    covered = (covered & (image_index[:, None] == image_index)).triu(1)                      # row unseats column
    stays = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        after = ~(covered & stays[:, None]).any(0)
        if torch.equal(after, stays):
            return stays.nonzero()[:, 0]
        stays = after


def cut_boxes(images: Tensor, boxes: Tensor, image_index: Tensor, side: int) -> Tensor:
    """Boxes (n, 4) cut out of their images (B, 3, H, W) uint8 and resized: (n, 3, side, side) float32, 0 to 255.

    Bilinear between the pixels of the box, which are black outside the image, as is an image's padding.
    image_index (n,) int64 is ascending.
    """
    x = sample_axis(boxes[:, 0], boxes[:, 2], side, images.shape[3])
    y = sample_axis(boxes[:, 1], boxes[:, 3], side, images.shape[2])
    grid = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], 3)
    crops = torch.empty((len(boxes), 3, side, side), device=images.device, memory_format=torch.channels_last)
    counts = image_index.bincount(minlength=len(images)).tolist()
    for image, points, target in zip(images, grid.split(counts), crops.split(counts), strict=True):
        if len(points):
            pixels = F.grid_sample(image[None].float(), points.reshape(1, -1, side, 2), padding_mode="zeros",
                                   align_corners=False)
            target.copy_(pixels.view(3, len(points), side, side).transpose(0, 1))
    return crops


def sample_axis(first: Tensor, last: Tensor, side: int, length: int) -> Tensor:
    """Where along an axis of `length` pixels the samples of boxes first..last (n,) lie: (n, side), for grid_sample."""
    extent = (last - first + 1)[:, None]
    at = (torch.arange(side, device=first.device) + 0.5) * extent / side - 0.5
    at = at.clamp(min=0).minimum(extent - 1) + first[:, None]
    return (at * 2 + 1) / length - 1
