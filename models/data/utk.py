"""UTKFace: chips whose file names are age_gender_race_date, and lists that assign their splits."""
import csv
import os
from dataclasses import dataclass, field
from pathlib import Path

from models.data.faceset import SPLITS
from models.data.listing import walk_images

CLASSES = ("White", "Black", "Asian", "Indian")
OTHERS = 4                      # UTKFace's fifth race, "others", is not a group: left out
MAX_AGE, MAX_GENDER = 130, 1


class UtkError(Exception):
    """A source that cannot be used; the message says why."""


class SplitListError(Exception):
    """A list of splits that cannot be used; the message says why."""


@dataclass
class Chip:
    """A usable picture of the source: its file, what its name states, and what is found later."""
    file: str                   # below the source folder, '/'-separated
    name: str                   # of the file to write, unique
    age: int
    gender: int                 # 0 male, 1 female
    label: int                  # position in CLASSES
    split: str = ""             # '' while undecided, and at the end for a chip that is set aside
    group: int = 0              # number of its group of near-duplicates, 0 for a single picture
    aligned_by: str = "none"    # 'mtcnn', 'template' (mean landmarks) or 'none'


@dataclass
class ChipCollection:
    """The chips of a source, and what was left out."""
    chips: list[Chip] = field(default_factory=list)                     # sorted by name
    skipped: list[tuple[str, str]] = field(default_factory=list)        # file, reason
    n_others: int = 0
    n_unlisted: int = 0                                                 # not in the split list
    n_absent: int = 0                                                   # only in the split list


SplitList = dict[str, tuple[str, int]]      # file name -> split, label


def parse_utk_name(name: str) -> tuple[int, int, int] | str:
    """Age, gender and race of a file name age_gender_race_date..., or why it is malformed."""
    fields = name.split("_")
    if len(fields) != 4:
        return (f"malformed name: expects age_gender_race_date, found {len(fields)} of the 4 "
                "fields")
    titles = ("age", "gender", "race"), (MAX_AGE, MAX_GENDER, OTHERS)
    for title, most, text in zip(*titles, fields, strict=False):
        if not (text.isascii() and text.isdecimal() and int(text) <= most):
            return f"malformed name: {title} must be 0 to {most}, found {text!r}"
    age, gender, race = map(int, fields[:3])
    return age, gender, race


def collect_chips(source: Path, split_list: SplitList | None) -> ChipCollection:
    """The chips of a folder, or those of them that the list assigns to a split.

    Raises UtkError and SplitListError.
    """
    collection = ChipCollection()
    file_of_name: dict[str, str] = {}
    for file in walk_images(source):
        base = file.rsplit("/", 1)[-1]
        parsed = parse_utk_name(base)
        name = base[:base.rindex(".")] + ".jpg"
        if isinstance(parsed, str):
            collection.skipped.append((file, parsed))
        elif parsed[2] == OTHERS:
            collection.n_others += 1
        elif name.lower() in file_of_name:
            collection.skipped.append((file, f"same name as {file_of_name[name.lower()]}"))
        elif split_list is not None and base not in split_list:
            collection.n_unlisted += 1
        else:
            file_of_name[name.lower()] = file
            collection.chips.append(Chip(file, name, *parsed))
    if split_list is not None:
        assign_listed_splits(collection, split_list)
    if not collection.chips:
        raise UtkError("no chip named age_gender_race_date.jpg of races 0 to 3 was found"
                       + (" that --split_csv lists" if collection.n_unlisted else ""))
    collection.chips.sort(key=lambda chip: chip.name)
    return collection


def read_split_list(path: Path) -> SplitList:
    """The list in a CSV with the columns file, split and label. Raises SplitListError."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:      # spreadsheets write a mark
            reader = csv.DictReader(file)
            if not {"file", "split", "label"} <= set(reader.fieldnames or ()):
                raise SplitListError(f"{path}: expects the columns file, split, label, found "
                               f"{reader.fieldnames}")
            split_list = {row["file"]: (row["split"], int(row["label"])) for row in reader}
    except (OSError, ValueError, TypeError) as error:
        raise SplitListError(f"{path}: {error}") from None
    for name, (split, _) in split_list.items():
        if split not in SPLITS:
            raise SplitListError(f"{path}: the split of {name} is {split!r}, expects one of "
                           f"{', '.join(SPLITS)}")
    return split_list


def assign_listed_splits(collection: ChipCollection, split_list: SplitList) -> None:
    """Gives each chip its listed split.

    Raises SplitListError if a label contradicts the name of the file.
    """
    for chip in collection.chips:
        chip.split, label = split_list[os.path.basename(chip.file)]
        if label != chip.label:
            raise SplitListError(f"label {label} of {chip.file} contradicts the name of the file")
    collection.n_absent = len(split_list) - len(collection.chips)
