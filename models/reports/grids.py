"""Grids of labelled face crops, as infer.py --visualize draws them."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.running.files import atomic_write


@dataclass(frozen=True)
class GridLayout:
    """Faces and rows of one grid, and its size in inches."""
    n_faces: int = 40
    n_rows: int = 5
    width: float = 20.0
    height: float = 20.0


@dataclass(frozen=True)
class GridFace:
    """A crop (112, 112, 3) uint8 with the label and the confidence that are written above it."""
    crop: np.ndarray
    label: str
    confidence: float


def draw_grid(faces: Sequence[GridFace], layout: GridLayout, path: Path) -> None:
    """Writes one grid of at most layout.n_faces faces as a JPEG file."""
    from matplotlib.figure import Figure  # takes a second to import, and only grids need it
    figure = Figure(figsize=(layout.width, layout.height), layout="tight")
    panels = figure.subplots(layout.n_rows, layout.n_faces // layout.n_rows, squeeze=False)
    for panel in panels.flatten():
        panel.axis("off")
    for panel, face in zip(panels.flatten(), faces, strict=False):
        panel.imshow(face.crop)
        panel.set_title(f"{face.label} {face.confidence:.0%}", parse_math=False)
    with atomic_write(path) as temporary_path:
        figure.savefig(temporary_path, format="jpg")
