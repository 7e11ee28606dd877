"""Grids of labelled face crops, as infer.py --visualize draws them."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


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
    from models.reports.plots import draw_face_grid  # takes a second to import; only grids need it

    titled = [(face.crop, f"{face.label} {face.confidence:.0%}") for face in faces]
    draw_face_grid(titled, (layout.n_rows, layout.n_faces // layout.n_rows),
                   (layout.width, layout.height), path)
