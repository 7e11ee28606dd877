"""What a finished predictions.csv holds: counts by status and label, probabilities, groups."""
import csv
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
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
    found_by: Counter           # faces by the way they were found
    probs: np.ndarray           # (n, C) float64 of the n faces
    groups: np.ndarray          # (n,) int32 position in group_names, -1 for a face without a group
    group_names: list[str]


@dataclass(frozen=True)
class GroupTable:
    """Group of each file, from a CSV. Files are found by their name in predictions.csv.

    A leading ./, backslashes and an absolute path below `root` are understood.
    """
    group_of_file: dict[str, str]
    root: str = ""

    def get(self, file: str) -> str | None:
        """The group of a file, None for a file that is not listed."""
        group = self.group_of_file.get(file)
        return self.group_of_file.get(self.normalise(file)) if group is None else group

    def normalise(self, file: str) -> str:
        """The one spelling by which listed files and pictures are compared."""
        file = file.strip().replace("\\", "/")
        if self.root and os.path.isabs(file):
            file = os.path.relpath(file, self.root)
        return os.path.normpath(file)


def read_groups(text: str, root: str = "") -> GroupTable:
    """The groups in FILE.csv or FILE.csv:COLUMN, which has a column `file`. Raises GroupsError.

    root: the folder of the pictures. A file that is listed in two groups is an error.
    """
    path, _, column = text.partition(".csv:")
    path += ".csv" if column else ""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            column = group_column(text, list(reader.fieldnames or ()), column)
            table = GroupTable({}, os.path.abspath(root) if root else "")
            for row in reader:
                add_group(table, text, row["file"] or "", row[column] or "")
    except (OSError, csv.Error, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GroupsError(f"{text}: expects `folder` or a readable CSV ({reason})") from None
    if not table.group_of_file:
        raise GroupsError(f"{text}: lists no file")
    return table


def add_group(table: GroupTable, text: str, file: str, group: str) -> None:
    """Adds a line of the CSV to the table. Raises GroupsError."""
    for name in dict.fromkeys((file, table.normalise(file))):
        if table.group_of_file.setdefault(name, group) != group:
            raise GroupsError(f"{text}: {file} is listed as {table.group_of_file[name]} and as "
                              f"{group}")


def group_column(text: str, columns: list[str], column: str) -> str:
    """The column of the groups. Raises GroupsError if it or `file` is missing or ambiguous."""
    others = [name for name in columns if name != "file"]
    column = column or (others[0] if len(others) == 1 else "")
    if column not in others or "file" not in columns:
        raise GroupsError(f"{text}: expects the columns file and one more (FILE.csv:COLUMN chooses "
                          f"one), found {', '.join(columns) or 'none'}")
    return column


def count_unlisted(table: GroupTable, files: Iterable[str]) -> int:
    """How many of the files have no group. Raises GroupsError if none has one."""
    n_files = n_unlisted = 0
    first = ""
    for file in files:
        first = first or file
        n_files += 1
        n_unlisted += table.get(file) is None
    if n_files and n_unlisted == n_files:
        listed = next(iter(table.group_of_file))
        raise GroupsError(f"no listed file is among the pictures: the list has {listed!r}, the "
                          f"pictures have {first!r}")
    return n_unlisted


def folder_group(file: str) -> str:
    """Group of a file by folder: the first folder of a relative path, the parent of an absolute."""
    folder = os.path.dirname(file)
    return folder if os.path.isabs(file) else folder.partition("/")[0] or "."


def tally_predictions(path: Path, classes: Sequence[str], by: str | None = None,
                      groups: GroupTable | None = None) -> Tally:
    """The tally of a predictions.csv, in one pass.

    by: None without groups, or 'folder'; a table of groups takes precedence.
    """
    statuses: Counter = Counter()
    labels: Counter = Counter()
    found_by: Counter = Counter()
    probs, group_numbers = array("d"), array("i")
    numbers: dict[str, int] = {}
    keys = prediction_columns(classes)[FIRST_PROB_COLUMN:FIRST_PROB_COLUMN + len(classes)]
    for row in read_predictions(path):
        statuses[row["status"]] += 1
        if row["status"] != "ok":
            continue
        labels[row["ethnicity"]] += 1
        found_by[row.get("found_by") or "unknown"] += 1
        probs.extend(float(row[key]) for key in keys)
        if by or groups is not None:
            group = folder_group(row["file"]) if groups is None else groups.get(row["file"])
            group_numbers.append(-1 if group is None
                                 else numbers.setdefault(group, len(numbers)))
    return Tally(statuses, labels, found_by, np.array(probs).reshape(-1, len(classes)),
                 np.array(group_numbers, np.int32), list(numbers))
