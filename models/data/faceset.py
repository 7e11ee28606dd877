"""Labelled sets of faces: class folders, or a CSV list, with the labels of their pictures."""
import csv
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from models.data.listing import walk_images

SPLITS = ("train", "val", "test")
GENDERS = {"0": "male", "1": "female"}      # as in UTKFace's file names and the builder's manifest
MANIFEST_COLUMNS = {"file", "split", "age", "gender", "aligned_by", "duplicate_group"}


class FaceSetError(Exception):
    """A folder or list that is not a labelled set of faces; the message says what was expected."""


@dataclass
class FaceSet:
    """Labelled pictures: crops of the whole template if is_aligned, otherwise photographs."""
    root: Path
    files: list[str]                    # relative to root with '/', or absolute
    labels: Tensor                      # (N,) int64 positions in classes
    classes: tuple[str, ...]
    is_aligned: bool
    unmatched: tuple[str, ...] = ()     # class folders that were left out: not among the classes

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> list[str]:
        """Paths of the pictures, root included."""
        return [str(self.root / file) for file in self.files]

    def subset(self, rows: list[int]) -> "FaceSet":
        """A set with only the given rows, in this order."""
        return replace(self, files=[self.files[row] for row in rows], labels=self.labels[rows])


def read_faceset(root: str | Path, split: str | None = None,
                 class_map: dict[str, str] | None = None,
                 classes: tuple[str, ...] | None = None) -> FaceSet:
    """The labelled pictures of class folders, or of a CSV list with the columns image and class.

    Folders are root/<split>/<class>/... if that split exists, otherwise root/<class>/...; a class
    folder may have subfolders, for example one per person. The class names of faceset.json replace
    numbered folders.
    class_map: new names of classes. classes: their order; by default that of faceset.json,
    otherwise alphabetical. Pictures of other classes are left out, and their classes listed in
    `unmatched`.
    Raises FaceSetError if no picture is left.
    """
    root = Path(root)
    description = read_faceset_json(root)
    json_classes = description.get("classes", ())
    pairs = rename_classes(list_csv(root) if root.is_file() else list_folders(root, split),
                           json_classes, class_map or {})
    present = {name for _, name in pairs}
    if classes is None:
        classes = choose_classes(present, json_classes, class_map or {})
    label_of = {name: label for label, name in enumerate(classes)}
    if not present & set(classes):                  # numbered folders without a faceset.json
        label_of |= {str(label): label for label in range(len(classes))}
    labelled = [(file, label_of[name]) for file, name in pairs if name in label_of]
    if not labelled:
        found = ", ".join(sorted(present)) or "no class folders with pictures"
        raise FaceSetError(f"{root}: no class folder matches {', '.join(classes) or 'any class'}; "
                           f"found {found}")
    return FaceSet(root=root.parent if root.is_file() else root,
                   files=[file for file, _ in labelled],
                   labels=torch.tensor([label for _, label in labelled]),
                   classes=classes,
                   is_aligned=bool(description.get("aligned")),
                   unmatched=tuple(sorted(present - set(label_of))))


def rename_classes(pairs: list[tuple[str, str]], json_classes: Sequence[str],
                   class_map: dict[str, str]) -> list[tuple[str, str]]:
    """Pairs (file, class) with the names of faceset.json for numbers, and class_map applied."""
    names = {str(label): name for label, name in enumerate(json_classes)}
    renamed = ((file, names.get(name, name)) for file, name in pairs)
    return [(file, class_map.get(name, name)) for file, name in renamed]


def choose_classes(present: set[str], json_classes: Sequence[str],
                   class_map: dict[str, str]) -> tuple[str, ...]:
    """The classes of faceset.json in their order if they contain all present ones, else sorted."""
    known = tuple(dict.fromkeys(class_map.get(name, name) for name in json_classes))
    return known if known and present <= set(known) else tuple(sorted(present))


def faceset_digest(files: list[str]) -> str:
    """CRC-32, in 8 hexadecimal digits, of the sorted base names: the same for copies elsewhere."""
    names = sorted(os.path.basename(file) for file in files)
    return f"{zlib.crc32(os.fsencode(chr(10).join(names))):08x}"


def read_faceset_json(root: Path) -> dict:
    """Content of the faceset.json that the builder writes, or an empty dict."""
    path = root / "faceset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise FaceSetError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise FaceSetError(f"{path} is not a JSON object")
    return content


def read_manifest(root: str | Path, files: list[str]) -> dict[str, dict[str, str]]:
    """Rows of the builder's manifest.csv by file; empty if it does not exist or lacks a file."""
    path = Path(root) / "manifest.csv"
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if not set(reader.fieldnames or ()) >= MANIFEST_COLUMNS:
            return {}
        rows = {row["file"]: row for row in reader}
    unknown = next((file for file in files if file not in rows), None)
    if unknown:
        print(f"{path} has no row for {unknown}: ages, genders and duplicate groups are not used")
    return {} if unknown else rows


def list_folders(root: Path, split: str | None) -> list[tuple[str, str]]:
    """(file, class folder) of every picture in root/split, if it exists, else root; sorted."""
    if not root.is_dir():
        raise FaceSetError(f"{root}: no such folder or list")
    split_folder = split if split and (root / split).is_dir() else ""
    if split and not split_folder and any((root / name).is_dir() for name in SPLITS):
        raise FaceSetError(f"{root} has no {split} folder")
    depth = 1 if split_folder else 0                # of the class folder in a path
    parts = ((path, path.split("/")) for path in walk_images(root, split_folder))
    return [(path, names[depth]) for path, names in parts if len(names) > depth + 1]


def list_csv(path: Path) -> list[tuple[str, str]]:
    """(file, class) of a CSV with columns image and class; files absolute or relative to it."""
    pairs = []
    # utf-8-sig skips the byte order mark that spreadsheets write.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        try:
            reader = csv.DictReader(file)
            if not {"image", "class"} <= set(reader.fieldnames or ()):
                raise FaceSetError(f"{path}: expects the columns image and class, "
                                   f"has {reader.fieldnames}")
            for row in reader:
                if not row["image"] or not row["class"]:
                    raise FaceSetError(f"{path}: line {reader.line_num} has no image or no class")
                pairs.append((row["image"], row["class"]))
        except csv.Error as error:
            raise FaceSetError(f"{path} cannot be read as a CSV ({error})") from None
    return pairs
