"""Draws docs/images/sample.jpg: the sample photograph, the aligned face, the probabilities.

    PYTHONPATH=. python docs/images/draw_sample.py
"""
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from models import label_photos, load_checkpoint
from models.faces.align import align_faces

ROOT = Path(__file__).resolve().parent.parent.parent
WHOLE_CROP = (0.0, 0.0, 112.0, 112.0)


def align_face(photo: Image.Image, landmarks: np.ndarray, resolution: int) -> np.ndarray:
    """The crop (resolution, resolution, 3) uint8 of the face with landmarks (5, 2), xy pixels."""
    image = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None]
    size = torch.tensor([[photo.height, photo.width]])
    points = torch.as_tensor(landmarks, dtype=torch.float32)[None]
    image_index = torch.zeros(1, dtype=torch.int64)
    crops = align_faces(image, size, image_index, points, WHOLE_CROP, resolution)
    return crops[0].permute(1, 2, 0).numpy()


def draw(photo: Image.Image, face, path: Path) -> None:
    """Writes a figure of three panels: detection, alignment, predicted label."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    detection, alignment, label = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    x1, y1, x2, y2 = face.box
    detection.imshow(photo)
    detection.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="#ffd400", linewidth=2)
    detection.plot(*np.asarray(face.landmarks).T, "o", color="#ffd400", markersize=3)
    detection.set_title("detected face, five landmarks")
    alignment.imshow(align_face(photo, face.landmarks, 336))
    alignment.set_title("aligned to the 112 x 112 template")
    for panel in (detection, alignment):
        panel.set_axis_off()
    names, probs = list(face.probs), list(face.probs.values())
    colours = ["tab:blue" if name == face.label else "0.75" for name in names]
    bars = label.barh(names, probs, color=colours, height=0.6)
    label.bar_label(bars, [f"{p:.1%}" for p in probs], padding=4)
    label.invert_yaxis()
    label.set(xlim=(0, 1.2), xticks=[])
    label.spines[["top", "right", "bottom"]].set_visible(False)
    label.set_title(f"predicted label: {face.label}, calibrated probabilities")
    figure.savefig(path, dpi=110, pil_kwargs={"quality": 88})


if __name__ == "__main__":
    sample = ROOT / "facesets" / "samples" / "astronaut.jpg"
    checkpoint = load_checkpoint(ROOT / "checkpoints" / "resnet18_general.pt")
    [sample_face] = label_photos([str(sample)], checkpoint)
    draw(Image.open(sample).convert("RGB"), sample_face, ROOT / "docs" / "images" / "sample.jpg")
