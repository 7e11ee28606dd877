"""Labels for a few pictures in Python: the path of infer.py without files."""
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.faces.checkpoint import Checkpoint
from models.faces.pipeline import (
    Classification,
    FacePolicy,
    FaceRow,
    classify_photos,
)
from models.faces.predictions import Prediction, Thresholds, label_name, predict_labels
from models.faces.predictor import Predictor, network_batch_size
from models.faces.second_look import load_detector

Photo = str | Path | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class LabelledFace:
    """A face, or a picture without one: status is then not 'ok', and error has the reason.

    photo: position of the picture in the list. box: (x1, y1, x2, y2) and landmarks: (5, 2) float32
    xy (left eye, right eye, nose, left and right mouth corner), pixels of the upright picture; both
    are None for a finished crop. probs: calibrated probability of each class. prediction_set: the
    classes that cannot be ruled out at the given alpha.
    """
    photo: int
    status: str
    label: str = ""
    confidence: float | None = None
    probs: dict[str, float] | None = None
    prediction_set: tuple[str, ...] = ()
    box: tuple[float, ...] | None = None
    landmarks: Tensor | None = None
    detector_score: float | None = None
    found_by: str = ""
    error: str = ""


def label_photos(photos: Sequence[Photo], checkpoint: Checkpoint, *, faces: str = "all",
                 device: str = "cpu", min_face_size: float = 20, alpha: float = 0.1,
                 align: str = "auto", second_look: bool = True) -> list[LabelledFace]:
    """The labelled faces of pictures, by picture and descending size.

    photos: paths, bytes of image files, PIL images, or arrays (H, W, 3) uint8 RGB. faces: 'all' or
    'largest'. alpha: error allowed to the prediction sets. The other parameters are those of
    infer.py, and so are the numbers. A picture that cannot be read, or has no face, is an entry
    whose status says so.
    """
    torch_device = torch.device(device)
    predictor = Predictor(checkpoint, torch_device)
    detector = load_detector(torch_device, min_face_size, second_look)
    classified = classify_photos(
        [encode_photo(photo) for photo in photos], predictor, detector,
        FacePolicy(faces, align=align),
        classification=Classification(network_batch_size(torch_device)))
    rows = [row for _, chunk_rows in classified for row in chunk_rows]
    names = [label_name(name) for name in checkpoint.spec.classes]
    predictions = predict_labels(rows, names, Thresholds.of_checkpoint(checkpoint, alpha))
    return [labelled_face(row, prediction, names)
            for row, prediction in zip(rows, predictions, strict=True)]


def labelled_face(row: FaceRow, prediction: Prediction, names: list[str]) -> LabelledFace:
    """The public form of a row of the pipeline."""
    if row.probs is None:
        return LabelledFace(row.position, row.status, error=row.error)
    probs = dict(zip(names, row.probs.tolist(), strict=True))
    return LabelledFace(row.position, row.status, prediction.label, max(probs.values()), probs,
                        prediction.classes, row.box, row.landmarks, row.score, row.found_by)


def encode_photo(photo: Photo) -> str | bytes:
    """A path, or the bytes of a file that decodes to exactly the given picture."""
    if isinstance(photo, (str, Path)):
        return os.fspath(photo)
    if isinstance(photo, bytes):
        return photo
    image = Image.fromarray(photo) if isinstance(photo, np.ndarray) else photo
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=0)
    return file.getvalue()
