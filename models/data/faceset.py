"""Labelled sets of faces: folders or lists -> paths and labels -> aligned views, however the pictures come."""
import csv
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.data.listing import walk_images

SPLITS = ("train", "val", "test")
GENDERS = {"0": "male", "1": "female"}      # as UTKFace's file names, and so a manifest, have it
MANIFEST_COLUMNS = {"file", "split", "age", "gender", "aligned_by", "duplicate_group"}


class FaceSetError(Exception):
    """A folder or list that is no labelled set of faces; the message says what was looked for."""


@dataclass
class FaceSet:
    """Labelled pictures. `finished`: they are crops of the whole template; else photographs still to be aligned."""
    root: Path
    files: list[str]                    # relative to root, '/'-separated, or absolute
    labels: Tensor                      # (N,) int64 positions in classes
    classes: tuple[str, ...]
    is_aligned: bool
    unmatched: tuple[str, ...] = ()     # class folders left out, because `classes` has no such name

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> list[str]:
        """Where the pictures lie."""
        return [str(self.root / file) for file in self.files]

    def subset(self, rows: list[int]) -> "FaceSet":
        """The same set with some of its pictures."""
        return FaceSet(self.root, [self.files[row] for row in rows], self.labels[rows], self.classes, self.is_aligned,
                       self.unmatched)


def read_faceset(root: str | Path, split: str | None = None, class_map: dict[str, str] | None = None,
                 classes: tuple[str, ...] | None = None) -> FaceSet:
    """The labelled pictures under a folder of class folders, or of a CSV list with columns image and class.

    root/<split>/<class>/..., where that split exists, else root/<class>/...; everything under a class folder counts,
    person folders too. Where faceset.json stands, its class names replace the folders' numbers. class_map renames
    classes; `classes` fixes their order, otherwise faceset.json's order or the alphabet. Pictures of a class that is
    not among `classes` are left out and named in `unmatched`. Raises FaceSetError where nothing is left.
    """
    root = Path(root)
    about = read_faceset_json(root)
    named = list_csv(root) if root.is_file() else list_folders(root, split)
    names = {str(i): name for i, name in enumerate(about.get("classes", ()))}
    class_map = class_map or {}
    pairs = [(file, class_map.get(name, name)) for file, name in ((f, names.get(n, n)) for f, n in named)]
    found = {name for _, name in pairs}
    if classes is None:
        known = [class_map.get(name, name) for name in about.get("classes", ())]
        classes = tuple(dict.fromkeys(known)) if set(known) >= found and known else tuple(sorted(found))
    wanted = {name: i for i, name in enumerate(classes)}
    wanted |= {str(i): i for i in range(len(classes))} if not found & set(classes) else {}
    kept = [(file, wanted[name]) for file, name in pairs if name in wanted]
    if not kept:
        raise FaceSetError(f"{root}: no class folder matches {', '.join(classes) or 'any class'}; "
                           f"found {', '.join(sorted(found)) or 'no class folders with pictures'}")
    base = root.parent if root.is_file() else root
    return FaceSet(base, [file for file, _ in kept], torch.tensor([label for _, label in kept]), classes,
                   bool(about.get("aligned")), tuple(sorted(found - set(wanted))))


def faceset_digest(files: list[str]) -> str:
    """crc32 over the sorted base names of a set's pictures, 8 hex digits: equal lists, wherever they lie, agree."""
    return f"{zlib.crc32(os.fsencode(chr(10).join(sorted(os.path.basename(file) for file in files)))):08x}"


def read_faceset_json(root: Path) -> dict:
    """faceset.json of a folder that the builder made, or an empty dict."""
    path = root / "faceset.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise FaceSetError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(about, dict):
        raise FaceSetError(f"{path} holds no JSON object")
    return about


def read_manifest(root: str | Path, files: list[str]) -> dict[str, dict[str, str]]:
    """Rows of the builder's manifest.csv by file; empty where there is none, or where it does not know the files."""
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
        print(f"{path} has no row for {unknown}: no ages, genders and twins from it")
    return {} if unknown else rows


def list_folders(root: Path, split: str | None) -> list[tuple[str, str]]:
    """(file, class folder) of every picture below root, or below root/split where that exists, sorted by path."""
    if not root.is_dir():
        raise FaceSetError(f"{root}: no such folder or list")
    below = split if split and (root / split).is_dir() else ""
    if split and not below and any((root / name).is_dir() for name in SPLITS):
        raise FaceSetError(f"{root} has no {split} folder")
    depth = 1 if below else 0
    parts = ((path, path.split("/")) for path in walk_images(root, below))
    return [(path, names[depth]) for path, names in parts if len(names) > depth + 1]


def list_csv(path: Path) -> list[tuple[str, str]]:
    """(file, class) of every row of a CSV with columns image and class; files relative to it, or absolute."""
    pairs = []
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:    # a mark, of spreadsheets
        try:
            reader = csv.DictReader(file)
            if not {"image", "class"} <= set(reader.fieldnames or ()):
                raise FaceSetError(f"{path}: wants the columns image and class, has {reader.fieldnames}")
            for row in reader:
                if not row["image"] or not row["class"]:
                    raise FaceSetError(f"{path}: line {reader.line_num} has no image or no class")
                pairs.append((row["image"], row["class"]))
        except csv.Error as error:
            raise FaceSetError(f"{path} cannot be read as a CSV ({error})") from None
    return pairs


