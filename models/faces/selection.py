"""Which of the detected faces of a photograph are used: the largest, the most central, or all."""
import torch
from torch import Tensor

from models.faces.mtcnn import Faces


def box_areas(boxes: Tensor) -> Tensor:
    """Areas (n,) float32 in square pixels of boxes (n, 4) xyxy."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def rank_by_size(faces: Faces) -> tuple[Tensor, Tensor]:
    """Order (n,) int64 of the faces by image and descending box area, and each face's number.

    The largest face of an image has number 0. Both tensors lie on the CPU; n may be 0.
    """
    boxes, image_index = faces.boxes.cpu(), faces.image_index.cpu()
    order = box_areas(boxes).argsort(descending=True, stable=True)
    order = order[image_index[order].argsort(stable=True)]
    sorted_index = image_index[order]
    numbers = torch.arange(len(order)) - torch.searchsorted(sorted_index, sorted_index)
    return order, numbers


def most_central_faces(faces: Faces, sizes: Tensor) -> Tensor:
    """Row (B,) int64 in `faces` of each photograph's most central large face; -1 without a face.

    sizes (B, 2) int64 is (height, width). The face with the largest box area less twice the
    squared distance between the centres of box and photograph is chosen.
    """
    rows = torch.full((len(sizes),), -1)
    boxes, image_index = faces.boxes.cpu(), faces.image_index.cpu()
    offsets = (boxes[:, :2] + boxes[:, 2:]) / 2 - sizes.flip(1)[image_index] / 2
    merit = box_areas(boxes) - 2 * offsets.square().sum(1)
    for row in merit.argsort().tolist():
        rows[image_index[row]] = row
    return rows


def select_faces(faces: Faces, sizes: Tensor, policy: str) -> tuple[Tensor, Tensor]:
    """Rows (k,) int64 in `faces` and face numbers (k,) int64 that a policy selects, by image.

    policy is 'largest', 'central' or 'all'. The number of the only face of an image is 0.
    """
    if policy == "central":
        rows = most_central_faces(faces, sizes)
        rows = rows[rows >= 0]
        return rows, torch.zeros_like(rows)
    order, numbers = rank_by_size(faces)
    if policy == "largest":
        order, numbers = order[numbers == 0], numbers[numbers == 0]
    return order, numbers
