"""What a finished predictions.csv holds: counts by status and label, probabilities, groups."""
import csv
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.faces.predictions import prediction_columns, read_predictions

FIRST_PROB_COLUMN = 5       # of predictions.csv


class GroupsError(Exception):
    """A --by that does not name a readable CSV with the expected columns; the message says why."""


@dataclass
class Tally:
    """Counts of rows by status and of faces by label; the probabilities and group of each face."""
    statuses: Counter
    labels: Counter
    probs: np.ndarray           # (n, C) float64 of the n faces
    groups: np.ndarray          # (n,) int32 position in group_names, -1 for a face without a group
    group_names: list[str]


def read_groups(text: str) -> dict[str, str]:
    """File -> group, from FILE.csv or FILE.csv:COLUMN with a column `file`. Raises GroupsError."""
    path, _, column = text.partition(".csv:")
    path += ".csv" if column else ""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            others = [name for name in columns if name != "file"]
            column = column or (others[0] if len(others) == 1 else "")
            if column not in others or "file" not in columns:
                raise GroupsError(f"{text}: expects the columns file and one more (FILE.csv:COLUMN "
                                  f"chooses one), found {', '.join(columns) or 'none'}")
            return {row["file"]: row[column] for row in reader}
    except OSError as error:
        raise GroupsError(f"{text}: expects `folder` or a readable CSV "
                          f"({error.strerror})") from None


def folder_group(file: str) -> str:
    """Group of a file by folder: the first folder of a relative path, the parent of an absolute."""
    folder = os.path.dirname(file)
    return folder if os.path.isabs(file) else folder.partition("/")[0] or "."


def tally_predictions(path: Path, classes: Sequence[str], by: str | None = None,
                      groups: Mapping[str, str] | None = None) -> Tally:
    """The tally of a predictions.csv, in one pass.

    by: None without groups, or 'folder'; groups (file -> group) takes precedence.
    """
    statuses: Counter = Counter()
    labels: Counter = Counter()
    probs, group_numbers, numbers = array("d"), array("i"), {}
    keys = prediction_columns(classes)[FIRST_PROB_COLUMN:FIRST_PROB_COLUMN + len(classes)]
    for row in read_predictions(path):
        statuses[row["status"]] += 1
        if row["status"] != "ok":
            continue
        labels[row["ethnicity"]] += 1
        probs.extend(float(row[key]) for key in keys)
        if by or groups is not None:
            group = folder_group(row["file"]) if groups is None else groups.get(row["file"])
            is_grouped = group is not None
            group_numbers.append(numbers.setdefault(group, len(numbers)) if is_grouped else -1)
    return Tally(statuses, labels, np.array(probs).reshape(-1, len(classes)),
                 np.array(group_numbers, np.int32), list(numbers))
