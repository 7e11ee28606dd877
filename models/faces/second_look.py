"""The second look: faces that MTCNN misses, or that lie on their side or upside down.

CenterFace finds the boxes, MTCNN's O-Net places their landmarks and decides which way up a face is.
A picture with a certain upright face costs nothing more; a picture whose best face leaves a doubt
costs one to three crops of its best faces through O-Net.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from models.faces.boxes import crop_boxes
from models.faces.centerface import DIVISOR, CenterFace
from models.faces.image_pyramid import group_by_size
from models.faces.mtcnn import CROP_PIXELS, MTCNN, Faces, logit, merge_faces, no_faces
from models.faces.mtcnn_networks import normalise_pixels

# How a face was found. turned_90: in the picture turned by 90 degrees counterclockwise.
FOUND_BY = ("upright", "centerface", "turned_90", "turned_180", "turned_270")
CENTERFACE = 1
FIRST_TURN = 2                  # position of turned_90

# A picture whose best face has such a logit of O-Net is upright. Among 166 photographs turned by
# 180 degrees, MTCNN's best face has a score over 0.9997 in none; turned by 90 or 270 degrees, over
# 0.998 in 3 %, and then with usable landmarks.
UPRIGHT_LOGIT, NOT_SIDEWAYS_LOGIT = logit(0.9997), logit(0.99)
# MTCNN has found nothing certain if no face has this score and all are narrower than this share of
# the picture's shorter edge: in turned photographs, all such faces were false.
WEAK_SCORE, NARROW_SHARE = 0.99, 0.3
# A box is a face if CenterFace alone is this sure, or if O-Net is; a turned face needs both.
FACE_SCORE, ONET_LOGIT = 0.5, logit(0.8)
ONET_WEIGHT = 0.5               # of O-Net's logit beside CenterFace's, as evidence for a direction
SAME_FACE_IOU = 0.3             # of two boxes of one face
UPRIGHT_MARGIN = 1.0            # by which the evidence for a turn must exceed that for none
# Pixels of the pictures that CenterFace sees: to find faces, and to decide their direction. In
# larger pictures it finds turned faces too: the direction of 166 photographs is right in 99 % at
# 28,000 pixels, in 96 % at 60,000.
MIN_PIXELS, MAX_PIXELS, TURN_PIXELS = 17_000, 144_000, 28_000
MAX_SCALE = 0.5                 # between these sizes: a face of 20 px is found at 10
N_BEST = 3                      # boxes of a picture that decide its direction
CALL_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 25}     # pixels in one call of CenterFace

Search = Callable[[Tensor, Tensor], Faces]


@dataclass
class FoundFaces(Faces):
    """Faces, and how each was found."""

    found_by: Tensor            # (n,) int64, positions in FOUND_BY

    def select(self, rows: Tensor) -> "FoundFaces":
        """Some of the faces: rows (k,) int64, or (n,) bool."""
        return FoundFaces(*(column[rows] for column in vars(self).values()))


class SecondLook(nn.Module):
    """MTCNN with a second look at the pictures in which it finds no certain upright face.

    Boxes and landmarks are pixels of the images as given, whichever way up a face is. Scores are
    those of the network that found the face.
    """

    def __init__(self, detector: MTCNN, finder: CenterFace) -> None:
        super().__init__()
        self.detector, self.finder = detector, finder

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.detector.device

    def detect(self, images: Tensor, sizes: Tensor) -> FoundFaces:
        """As MTCNN.detect, with the second look."""
        return self.find(images, sizes, self.detector.detect)

    def detect_largest(self, images: Tensor, sizes: Tensor) -> FoundFaces:
        """As MTCNN.detect_largest, with the second look."""
        return self.find(images, sizes, self.detector.detect_largest)

    @torch.inference_mode()
    @torch.backends.cudnn.flags(True, allow_tf32=False)
    def find(self, images: Tensor, sizes: Tensor, search: Search) -> FoundFaces:
        """Faces of images (B, 3, H, W) uint8 RGB, zero-padded from sizes (B, 2) int64; B may be 0.

        search: the method of MTCNN that looks first.
        """
        images, sizes = images.to(self.device), sizes.cpu()
        first = mark(search(images, sizes), 0)
        is_certain = has_certain_face(first, sizes)
        missed, is_upright = self.find_missed(images, sizes, (~is_certain).nonzero()[:, 0])
        is_doubtful = torch.where(is_certain, self.may_be_turned(images, first), ~is_upright)
        doubtful = is_doubtful.nonzero()[:, 0]
        turns = torch.zeros(len(images), dtype=torch.int64)
        turns[doubtful] = self.choose_turns(images, sizes, doubtful)
        is_kept = (turns == 0).to(images.device)
        parts = [faces.select(is_kept[faces.image_index])
                 for faces in (first, without_same(missed, first))]
        for turn in turns.unique().tolist():
            if turn:
                rows = (turns == turn).nonzero()[:, 0]
                parts.append(self.find_turned(images, sizes, rows, turn, search))
        return merge_faces(parts)

    def find_missed(self, images: Tensor, sizes: Tensor,
                    rows: Tensor) -> tuple[FoundFaces, Tensor]:
        """CenterFace's faces in images `rows` (k,), and which (B,) bool have an upright face."""
        boxes = self.propose(images, sizes, rows, 0, MAX_PIXELS)
        logits, landmarks = self.read_faces(images, boxes, range(4))        # (n, 4), (n, 4, 5, 2)
        is_face = (boxes.scores >= FACE_SCORE) | (logits[:, 0] >= ONET_LOGIT)
        is_upright = torch.zeros(len(images), dtype=torch.bool)
        surest = (number_in_image(boxes.image_index) == 0).nonzero()[:, 0]
        surest = surest[is_face[surest] & (logits[surest].argmax(1) == 0)]
        is_upright[boxes.image_index[surest].cpu()] = True
        faces = Faces(boxes.boxes, boxes.scores, landmarks[:, 0], boxes.image_index)
        return mark(faces.select(is_face), CENTERFACE), is_upright

    def may_be_turned(self, images: Tensor, faces: Faces) -> Tensor:
        """Images (B,) bool with a face to which O-Net gives a higher score when it is turned.

        Only the N_BEST faces count, of images whose best score leaves a doubt.
        """
        number = number_in_image(faces.image_index)
        best = torch.full((len(images),), math.inf, device=images.device)
        best[faces.image_index[number == 0]] = faces.scores[number == 0].logit()
        is_candidate = (best[faces.image_index] < UPRIGHT_LOGIT) & (number < N_BEST)
        candidates = faces.select(is_candidate)
        sideways = candidates.select(best[candidates.image_index] < NOT_SIDEWAYS_LOGIT)
        is_doubtful = torch.zeros(len(images), dtype=torch.bool)
        for group, turns in ((candidates, (2,)), (sideways, (1, 3))):
            logits = self.read_faces(images, group, turns)[0].amax(1)
            is_turned = logits > group.scores.logit()
            is_doubtful[group.image_index[is_turned].cpu()] = True
        return is_doubtful

    def choose_turns(self, images: Tensor, sizes: Tensor, rows: Tensor) -> Tensor:
        """Quarter turns (k,) int64, counterclockwise, that bring the images `rows` upright.

        The evidence for a turn is that of the image's surest face: CenterFace's logit plus
        ONET_WEIGHT times O-Net's.
        """
        evidence = torch.full((len(images), 4), -math.inf)
        evidence[:, 0] = 0
        for turn in range(4) if len(rows) else ():
            boxes = self.propose(images, sizes, rows, turn, TURN_PIXELS)
            boxes = boxes.select(number_in_image(boxes.image_index) < N_BEST)
            logits = self.read_faces(images, boxes, (turn,))[0][:, 0]
            value = boxes.scores.logit() + ONET_WEIGHT * logits
            if turn == 0:
                value += UPRIGHT_MARGIN
            else:
                value[(boxes.scores < FACE_SCORE) | (logits < ONET_LOGIT)] = -math.inf
            evidence[:, turn].scatter_reduce_(0, boxes.image_index.cpu(), value.cpu(), "amax")
        return evidence[rows].argmax(1)

    def find_turned(self, images: Tensor, sizes: Tensor, rows: Tensor, turn: int,
                    search: Search) -> FoundFaces:
        """Faces of the images `rows` (k,), found after `turn` quarter turns."""
        turned, turned_sizes = turn_pictures(images, sizes, rows, turn)
        found_by = FIRST_TURN + turn - 1
        first = mark(search(turned, turned_sizes), found_by)
        is_certain = has_certain_face(first, turned_sizes)
        missed, _ = self.find_missed(turned, turned_sizes, (~is_certain).nonzero()[:, 0])
        faces = merge_faces([first, mark(without_same(missed, first), found_by)])
        image_sizes = sizes[rows].to(images.device)[faces.image_index]
        corners = turn_back(faces.boxes.unflatten(1, (2, 2)), image_sizes, turn)
        return FoundFaces(torch.cat([corners.amin(1), corners.amax(1)], 1), faces.scores,
                          turn_back(faces.landmarks, image_sizes, turn),
                          rows.to(images.device)[faces.image_index], faces.found_by)

    def propose(self, images: Tensor, sizes: Tensor, rows: Tensor, turn: int,
                max_pixels: int) -> Faces:
        """CenterFace's boxes of the images `rows` (k,), seen after `turn` quarter turns.

        The boxes are pixels of the images as given.
        """
        parts = [no_faces(images.device)]
        for (height, width), group in group_by_size(sizes[rows]):
            shape = reduced_size(height, width, max_pixels)
            n_per_call = max(1, CALL_PIXELS[images.device.type] // math.prod(shape))
            for part in rows[group].split(n_per_call):
                index = part.to(images.device)
                pictures = resize_pictures(images[index, :, :height, :width], *shape)
                faces = self.finder.detect(pictures.rot90(turn, (2, 3)))
                scale = pictures.new_tensor([width / shape[1], height / shape[0]])
                corners = faces.boxes.unflatten(1, (2, 2))
                corners = turn_back(corners, pictures.new_tensor([shape]), turn)
                corners = (corners + 0.5) * scale - 0.5
                boxes = torch.cat([corners.amin(1), corners.amax(1)], 1)
                parts.append(Faces(boxes, faces.scores, faces.landmarks,
                                   index[faces.image_index]))
        return merge_faces(parts)

    def read_faces(self, images: Tensor, faces: Faces,
                   turns: Sequence[int]) -> tuple[Tensor, Tensor]:
        """O-Net on the squares about boxes of images, each crop turned by some quarter turns.

        Returns logits (n, len(turns)) and landmarks (n, len(turns), 5, 2) in pixels of the images.
        """
        if not len(faces.boxes):
            no_logits = faces.boxes.new_zeros(0, len(turns))
            return no_logits, faces.boxes.new_zeros(0, len(turns), 5, 2)
        boxes = squares_about(faces.boxes)
        extent = (boxes[:, 2:] - boxes[:, :2] + 1)[:, None]                 # (n, 1, 2)
        crops = crop_boxes(images, boxes, faces.image_index, 48)
        logits, landmarks = [], []
        for turn in turns:
            outputs = self.run_onet(turned_copy(crops, turn))
            points = outputs[:, 5:].unflatten(1, (2, 5)).mT * extent
            points = turn_back(points, extent[:, 0], turn)
            logits.append(outputs[:, 0])
            landmarks.append(boxes[:, None, :2] + points)
        return torch.stack(logits, 1), torch.stack(landmarks, 1)

    def run_onet(self, crops: Tensor) -> Tensor:
        """O-Net on crops (n, 3, 48, 48) float32 of 0 to 255, which it overwrites: (n, 15)."""
        chunks = crops.split(max(1, CROP_PIXELS[crops.device.type] // (48 * 48)))
        return torch.cat([self.detector.onet(normalise_pixels(chunk)) for chunk in chunks])


def reduced_size(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Size, multiples of DIVISOR, at which CenterFace sees a picture: at most about max_pixels."""
    area = height * width
    scale = min(1.0, max(math.sqrt(MIN_PIXELS / area),
                         min(MAX_SCALE, math.sqrt(max_pixels / area))))
    new_height, new_width = (max(1, round(length * scale / DIVISOR)) * DIVISOR
                             for length in (height, width))
    return new_height, new_width


def resize_pictures(images: Tensor, height: int, width: int) -> Tensor:
    """Images (b, 3, h, w) uint8 -> (b, 3, height, width) float32 of 0 to 255, without aliasing."""
    pixels = images.float()
    if images.shape[2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True,
                         align_corners=False)


def turned_copy(pictures: Tensor, turn: int) -> Tensor:
    """A copy of pictures (n, 3, h, w) after quarter turns counterclockwise, channels last."""
    copy = pictures.rot90(turn, (2, 3)).contiguous(memory_format=torch.channels_last)
    return copy if turn else copy.clone()


def squares_about(boxes: Tensor) -> Tensor:
    """The squares about CenterFace's boxes (n, 4) in which O-Net places landmarks best.

    Among squares of 0.85 to 1.25 times the longer edge and shifts of 5 %, these give the landmarks
    nearest to MTCNN's on 443 faces that both find: 2.7 % of the interocular distance (median),
    against 8.2 % of CenterFace's own landmarks.
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True) / 2
    return torch.cat([centre - half, centre + half - 1], 1).round()


def turn_back(points: Tensor, sizes: Tensor, turn: int) -> Tensor:
    """Points (n, p, 2) xy of turned pictures in pixels of the pictures before `turn` quarter turns.

    sizes (n or 1, 2) is their (height, width) before the turn.
    """
    if turn == 0:
        return points
    x, y = points.unbind(2)
    bottom, right = (sizes - 1)[:, :, None].unbind(1)
    return torch.stack([(right - y, x), (right - x, bottom - y), (y, bottom - x)][turn - 1], 2)


def turn_pictures(images: Tensor, sizes: Tensor, rows: Tensor,
                  turn: int) -> tuple[Tensor, Tensor]:
    """The images `rows` (k,) after quarter turns: (k, 3, H', W') uint8, zero-padded, and sizes."""
    turned_sizes = sizes[rows].flip(1) if turn % 2 else sizes[rows]
    turned = images.new_zeros(len(rows), 3, *turned_sizes.amax(0).tolist())
    for picture, i, (height, width) in zip(turned, rows.tolist(), turned_sizes.tolist(),
                                           strict=True):
        image = images[i, :, :sizes[i, 0], :sizes[i, 1]]
        picture[:, :height, :width] = image.rot90(turn, (1, 2))
    return turned, turned_sizes


def mark(faces: Faces, found_by: int) -> FoundFaces:
    """The faces, all found in one way."""
    return FoundFaces(faces.boxes, faces.scores, faces.landmarks, faces.image_index,
                      torch.full_like(faces.image_index, found_by))


def has_certain_face(faces: Faces, sizes: Tensor) -> Tensor:
    """Images (B,) bool with a face that is certain, or too large for a false one; on the CPU."""
    boxes, image_index = faces.boxes.cpu(), faces.image_index.cpu()
    is_certain = faces.scores.cpu() >= WEAK_SCORE
    is_certain |= boxes[:, 2] - boxes[:, 0] >= NARROW_SHARE * sizes.amin(1)[image_index]
    has_face = torch.zeros(len(sizes), dtype=torch.bool)
    has_face[image_index[is_certain]] = True
    return has_face


def without_same(faces: FoundFaces, others: Faces) -> FoundFaces:
    """The faces whose boxes overlap none of the others of their image by SAME_FACE_IOU."""
    is_same = box_iou(faces.boxes, others.boxes) > SAME_FACE_IOU
    is_same &= faces.image_index[:, None] == others.image_index
    return faces.select(~is_same.any(1))


def number_in_image(image_index: Tensor) -> Tensor:
    """Position (n,) of each face among those of its image; image_index (n,) is ascending."""
    rows = torch.arange(len(image_index), device=image_index.device)
    return rows - torch.searchsorted(image_index, image_index)


def load_detector(device: torch.device, min_face_size: float = 20,
                  second_look: bool = True) -> MTCNN | SecondLook:
    """The face detector of every command, on a device; without the second look, MTCNN alone."""
    detector = MTCNN(min_face_size=min_face_size)
    if not second_look:
        return detector.to(device)
    return SecondLook(detector, CenterFace()).to(device)
