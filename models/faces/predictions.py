"""faces/predictions"""
import csv
import os
from collections.abc import Iterator

from models.faces.pipeline import Row

STATUSES = ("ok", "no_face", "unreadable", "too_large")


UNCERTAIN = "uncertain"     # the answer where the label is too doubtful


def columns(classes: tuple[str, ...]) -> list[str]:
    """The columns of predictions.csv for a checkpoint's classes."""
    return ["file", "face", "status", "ethnicity", "confidence", *(f"p_{name}" for name in classes), "set",
            "x1", "y1", "x2", "y2", "detector_score", "error"]


def label_name(name: str) -> str:
    """A class name as it stands in the results: never with a space, so that the last space of a line divides it."""
    return "_".join(name.split())


def format_row(name: str, row: Row, label: str, chosen: str, n_classes: int) -> str:
    """A line of predictions.csv. label: the answer, chosen: the prediction set, both '' without a face."""
    probs = row.probs.tolist() if row.status == "ok" else []
    # Seven digits: with fewer, equal rows are no sign of a repeated picture (shares.distinct_faces).
    numbers = [f"{p:.7f}" for p in (max(probs), *probs)] if probs else [""] * (1 + n_classes)
    box = [f"{value:.2f}" for value in row.box] if row.box else [""] * 4
    score = "" if row.score is None else f"{row.score:.6f}"
    cells = [quote_cell(name), str(row.face), row.status, quote_cell(label), *numbers, quote_cell(chosen), *box, score,
             quote_cell(row.error)]
    return ",".join(cells) + "\n"


def quote_cell(text: str) -> str:
    """A cell of a CSV; Python's csv, before 3.13, leaves a bare carriage return that it cannot read back."""
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def read_predictions(path: str | os.PathLike, names: list[str] | None = None) -> Iterator[dict[str, str]]:
    """The rows of a predictions.csv as they stand, one at a time. names: the columns, where no first line has them.

    Raises ValueError for a file of another kind.
    """
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file, names)
        if not {"file", "face", "status", "ethnicity", "confidence"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path} is no predictions.csv: its first line is {reader.fieldnames}")
        yield from reader
