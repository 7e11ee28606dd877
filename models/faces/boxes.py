"""Operations on boxes of MTCNN: regression, non-maximum suppression and crops.

A box (x1, y1, x2, y2) includes both of its ends: its width is x2 - x1 + 1.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

MAX_COMPARED_BOXES = {"cpu": 256, "cuda": 4096}     # boxes per call of NMS


def apply_offsets(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Bounding-box regression: boxes (n, 4) moved by offsets (n, 4), fractions of their extent."""
    extent = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + offsets * torch.cat([extent, extent], 1)


def square_boxes(boxes: Tensor) -> Tensor:
    """Squares with the centres and the longer edges of boxes (n, 4), rounded to pixels."""
    extent = boxes[:, 2:] - boxes[:, :2] + 1
    longest = extent.amax(1, keepdim=True)
    corner = boxes[:, :2] + extent / 2 - longest / 2
    return torch.cat([corner, corner + longest - 1], 1).round()


def clip_boxes_to_image(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (n, 4) clipped to their images, whose (height, width) are sizes (n, 2)."""
    return torch.cat([boxes[:, :2].clamp(min=0), boxes[:, 2:].minimum(sizes.flip(1) - 1)], 1)


def nms_in_groups(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression by IoU within each group: indices of the remaining boxes, ascending.

    group (n,) int64 is ascending. Groups are translated apart and compared in one call, which is
    exact for integer coordinates. Time grows with the square of the boxes per call, so a call has
    at most MAX_COMPARED_BOXES boxes or one group.
    """
    corners = boxes.double() + boxes.new_tensor([0, 0, 1, 1]) + (group * 100_000)[:, None]
    kept = select_in_groups(lambda boxes, scores: nms(boxes, scores, threshold),
                            group, corners, scores.double())
    return kept.sort().values


def select_in_groups(select: Callable[..., Tensor], group: Tensor, *columns: Tensor) -> Tensor:
    """Row indices that select(*columns) returns, called for a few whole groups at a time.

    group (n,) int64 is ascending.
    """
    selected, start, counts = [group.new_zeros(0)], 0, rows_per_call(group)
    for chunk in zip(*(column.split(counts) for column in columns), strict=True):
        selected.append(select(*chunk) + start)
        start += len(chunk[0])
    return torch.cat(selected)


def rows_per_call(group: Tensor) -> list[int]:
    """Numbers of rows of whole groups that are compared in one call."""
    counts: list[int] = []
    for count in group.unique_consecutive(return_counts=True)[1].tolist():
        if counts and counts[-1] + count <= MAX_COMPARED_BOXES[group.device.type]:
            counts[-1] += count
        else:
            counts.append(count)
    return counts


def suppress_nested(boxes: Tensor, image_index: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes (n, 4) that are not covered by a better box of the same image.

    The boxes of an image are in descending order. Covered: intersection over the smaller of the two
    boxes exceeds the threshold. A few images at a time, because memory grows with the square.
    """
    return select_in_groups(lambda boxes, index: uncovered_boxes(boxes, index, threshold),
                            image_index, boxes, image_index)


def uncovered_boxes(boxes: Tensor, image_index: Tensor, threshold: float) -> Tensor:
    """suppress_nested of all boxes in one call.

    The loop ends when nothing changes. The number of iterations is the length of the longest chain
    of boxes that suppress one another: two or three.
    """
    top_left = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    intersection = (bottom_right - top_left + 1).clamp(min=0).prod(2)                   # (n, n)
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    covers = intersection / torch.minimum(area[:, None], area) > threshold
    covers = (covers & (image_index[:, None] == image_index)).triu(1)       # row suppresses column
    is_kept = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    while True:
        is_kept_next = ~(covers & is_kept[:, None]).any(0)
        if torch.equal(is_kept_next, is_kept):
            return is_kept.nonzero()[:, 0]
        is_kept = is_kept_next


def crop_boxes(images: Tensor, boxes: Tensor, image_index: Tensor, size: int) -> Tensor:
    """Crops of boxes (n, 4), resized: (n, 3, size, size) float32 of 0 to 255.

    images (B, 3, H, W) uint8; image_index (n,) int64, ascending. Bilinear between the pixels of a
    box. Pixels outside the image are black, as the padding of an image is.
    """
    x = sample_positions(boxes[:, 0], boxes[:, 2], size, images.shape[3])
    y = sample_positions(boxes[:, 1], boxes[:, 3], size, images.shape[2])
    grid = torch.stack([x[:, None].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
    crops = torch.empty((len(boxes), 3, size, size), device=images.device,
                        memory_format=torch.channels_last)
    counts = image_index.bincount(minlength=len(images)).tolist()
    for image, points, target in zip(images, grid.split(counts), crops.split(counts), strict=True):
        if len(points):
            pixels = F.grid_sample(image[None].float(), points.reshape(1, -1, size, 2),
                                   padding_mode="zeros", align_corners=False)
            target.copy_(pixels.view(3, len(points), size, size).transpose(0, 1))
    return crops


def sample_positions(first: Tensor, last: Tensor, size: int, length: int) -> Tensor:
    """Positions of `size` samples within boxes first..last (n,) on an axis of `length` pixels.

    Returns (n, size) in grid_sample coordinates.
    """
    extent = (last - first + 1)[:, None]
    position = (torch.arange(size, device=first.device) + 0.5) * extent / size - 0.5
    position = position.clamp(min=0).minimum(extent - 1) + first[:, None]
    return (position * 2 + 1) / length - 1
