"""predictions.csv: its columns, its rows, and how a row gets its label and prediction set."""
import csv
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.faces.calibration import class_thresholds, set_thresholds
from models.faces.checkpoint import Checkpoint
from models.faces.pipeline import FaceRow

STATUSES = ("ok", "no_face", "unreadable", "too_large")
UNCERTAIN = "uncertain"     # the label of a face whose confidence is below the threshold
REQUIRED_COLUMNS = {"file", "face", "status", "ethnicity", "confidence"}


def prediction_columns(classes: Sequence[str]) -> list[str]:
    """The columns of predictions.csv for the classes of a checkpoint."""
    return ["file", "face", "status", "ethnicity", "confidence",
            *(f"p_{name}" for name in classes), "set", "x1", "y1", "x2", "y2", "detector_score",
            "found_by", "error"]


def label_name(name: str) -> str:
    """A class name as results spell it: without spaces, so that the last space splits a line."""
    return "_".join(name.split())


@dataclass(frozen=True)
class Thresholds:
    """When a face gets its predicted label, and when a class is in its prediction set.

    min_confidence (C,): the least confidence at which each predicted class is stated.
    min_set_probs (C,): the least probability at which each class is in the set; inf without
    calibration, so that the sets are empty.
    """
    min_confidence: Tensor
    min_set_probs: Tensor

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint, alpha: float, min_confidence: float = 0.0,
                      target_error: float | None = None) -> "Thresholds":
        """alpha is the error allowed to the sets, target_error that of the stated labels."""
        n_classes, calibration = len(checkpoint.spec.classes), checkpoint.calibration
        least = torch.full((n_classes,), min_confidence)
        if calibration is None:
            return cls(least, torch.full((n_classes,), torch.inf))
        if target_error is not None:
            least = class_thresholds(calibration, target_error)
        return cls(least, set_thresholds(calibration, alpha))


@dataclass(frozen=True)
class Prediction:
    """The stated label of a row and its prediction set; both are empty without a face."""
    label: str = ""
    classes: tuple[str, ...] = ()


def predict_labels(rows: list[FaceRow], names: Sequence[str],
                   thresholds: Thresholds) -> list[Prediction]:
    """The prediction of each row; names are the classes as the results spell them."""
    probs = [row.probs for row in rows if row.probs is not None]
    stacked = torch.stack(probs) if probs else torch.zeros(0, len(names))
    confidence, predicted = stacked.max(1)
    is_stated = (confidence >= thresholds.min_confidence[predicted]).tolist()
    in_set = (stacked >= thresholds.min_set_probs).tolist()
    predictions = iter([
        Prediction(names[label] if stated else UNCERTAIN, tuple(itertools.compress(names, members)))
        for label, stated, members in zip(predicted.tolist(), is_stated, in_set, strict=True)])
    return [next(predictions) if row.probs is not None else Prediction() for row in rows]


def format_row(name: str, row: FaceRow, prediction: Prediction, n_classes: int) -> str:
    """A line of predictions.csv for the row of the picture with this name."""
    probs = row.probs.tolist() if row.probs is not None else []
    # Seven digits: with fewer, equal rows are no evidence of a repeated picture (distinct_faces).
    numbers = [f"{p:.7f}" for p in (max(probs), *probs)] if probs else [""] * (1 + n_classes)
    box = [f"{value:.2f}" for value in row.box] if row.box else [""] * 4
    score = "" if row.score is None else f"{row.score:.6f}"
    cells = [quote_cell(name), str(row.face), row.status, quote_cell(prediction.label), *numbers,
             quote_cell("|".join(prediction.classes)), *box, score, row.found_by,
             quote_cell(row.error)]
    return ",".join(cells) + "\n"


def quote_cell(text: str) -> str:
    """A cell of a CSV file. Python's csv before 3.13 leaves a carriage return unquoted."""
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def read_predictions(path: str | os.PathLike,
                     columns: list[str] | None = None) -> Iterator[dict[str, str]]:
    """The rows of a predictions.csv, one at a time.

    columns: the names of the columns where the file has no header. Raises ValueError for a file of
    another kind.
    """
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file, columns)
        if not set(reader.fieldnames or ()) >= REQUIRED_COLUMNS:
            raise ValueError(f"{path} is not a predictions.csv: its first line is "
                             f"{reader.fieldnames}")
        yield from reader
