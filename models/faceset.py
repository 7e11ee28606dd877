"""Labelled sets of faces: folders or lists -> paths and labels -> aligned views, however the pictures come."""
import csv
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.align import CHIP_LANDMARKS, TEMPLATE, TEMPLATE_SIZE, align_faces, crop_views
from models.images import PhotoBatch, can_share, join_batches, load_photos, walk_images
from models.mtcnn import MTCNN, Faces
from models.threads import Cores

SPLITS = ("train", "val", "test")
GENDERS = {"0": "male", "1": "female"}      # as UTKFace's file names, and so a manifest, have it
MANIFEST_COLUMNS = {"file", "split", "age", "gender", "aligned_by", "duplicate_group"}
MAX_SIDE = 3000             # pixels: larger photographs are reduced to it while decoding, as infer.py does by default


class FaceSetError(Exception):
    """A folder or list that is no labelled set of faces; the message says what was looked for."""


@dataclass
class FaceSet:
    """Labelled pictures. `finished`: they are crops of the whole template; else photographs still to be aligned."""
    root: Path
    files: list[str]                    # relative to root, '/'-separated, or absolute
    labels: Tensor                      # (N,) int64 positions in classes
    classes: tuple[str, ...]
    finished: bool
    unmatched: tuple[str, ...] = ()     # class folders left out, because `classes` has no such name

    def __len__(self) -> int:
        return len(self.files)

    def paths(self) -> list[str]:
        """Where the pictures lie."""
        return [str(self.root / file) for file in self.files]

    def subset(self, rows: list[int]) -> "FaceSet":
        """The same set with some of its pictures."""
        return FaceSet(self.root, [self.files[row] for row in rows], self.labels[rows], self.classes, self.finished,
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
    about = read_about(root)
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


def read_about(root: Path) -> dict:
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


def central_face(faces: Faces, sizes: Tensor) -> Tensor:
    """The most central large face of each photograph: rows (B,) int64 of `faces`, -1 where there is none.

    Largest box area less twice the squared distance of its centre from the photograph's.
    """
    rows = torch.full((len(sizes),), -1)
    boxes, image_index = faces.boxes.cpu(), faces.image_index.cpu()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 - sizes.flip(1)[image_index] / 2
    merit = area - 2 * centre.square().sum(1)
    for row in merit.argsort().tolist():
        rows[image_index[row]] = row
    return rows


@dataclass
class AlignedBatch:
    """Aligned pictures of a list: views (n, 3, side, side) uint8 of the pictures at `positions`."""
    positions: list[int]
    views: Tensor
    aligned_by: str                             # 'mtcnn', 'template' (no face was found) or 'crop' (came aligned)
    failures: list[tuple[int, str, str]]        # position, status, reason


@dataclass
class SearchedBatch:
    """What a batch of pictures gave, and what those without a face need."""
    aligned: list[AlignedBatch]
    missed: list[int]                           # positions of the pictures without a face
    landmarks: Tensor                           # (k, 5, 2) float64 of those with one, relative to the picture's size


def align_set(paths: list[str], finished: bool, detector: MTCNN, window: tuple, side: int, *,
              template: tuple = TEMPLATE, chips: tuple | None = None, batch_size: int = 32, workers: int = 0,
              progress: str | None = None) -> Iterator[AlignedBatch]:
    """Views of every picture of a list, one face each, as a stream; the order is that of `positions`, not the list's.

    Finished crops are cut to the window, and so is any picture of the very size in which crops are handed around, or
    in which a checkpoint's chips are (chips: their side and template; not asked in a finished set). Of other pictures
    the most central large face is aligned by its landmarks; those without a face come last, aligned
    by the mean landmarks (relative to the picture's size) of those with one. Pictures over MAX_SIDE are reduced to it;
    where shared memory is scarce no worker processes decode, whatever `workers` says.
    """
    workers = workers if can_share() else 0
    device = next(detector.parameters()).device
    missed, landmarks = [], []
    bar = tqdm(total=len(paths), desc=progress, disable=progress is None, unit=" pictures", smoothing=0.05)
    with bar, Cores(device) as cores:
        batches = join_batches(load_photos(paths, batch_size, workers, MAX_SIDE, cores=cores), len(paths), device)
        for searched in cores.in_turn(
                lambda batch: align_batch(batch, finished, detector, window, side, template, chips), batches):
            bar.update(len(searched.missed) + sum(len(a.positions) + len(a.failures) for a in searched.aligned))
            missed += searched.missed
            landmarks.append(searched.landmarks)
            yield from searched.aligned
    found = torch.cat([torch.zeros(0, 5, 2, dtype=torch.float64), *landmarks])
    mean = found.mean(0) if len(found) else torch.tensor(CHIP_LANDMARKS, dtype=torch.float64) / 200
    for batch in load_photos(paths, batch_size, workers, MAX_SIDE, missed) if missed else ():
        where = (mean * batch.sizes.flip(1)[:, None]).float()
        views = align_faces(batch.images.to(device), batch.sizes, torch.arange(len(batch.positions)), where, window,
                            side, template)
        yield AlignedBatch(batch.positions, views.cpu(), "template", batch.failures)


def align_batch(batch: PhotoBatch, finished: bool, detector: MTCNN, window: tuple, side: int, template: tuple,
                chips: tuple | None) -> SearchedBatch:
    """The views of a batch, but for pictures without a face; the rest as for align_set."""
    device = next(detector.parameters()).device
    images = batch.images.to(device)
    positions = torch.tensor(batch.positions, dtype=torch.int64)
    ready = come_as_crops(batch.sizes, chips) | finished
    crops = ready.nonzero().squeeze(1)
    views = cut_crops(images[crops.to(device)], batch.sizes[crops], window, side, template, None if finished else chips)
    came = AlignedBatch(positions[crops].tolist(), views.cpu(), "crop", batch.failures)
    if ready.all():
        return SearchedBatch([came], [], torch.zeros(0, 5, 2, dtype=torch.float64))
    faces = detector.detect(images, batch.sizes)
    rows = central_face(faces, batch.sizes)
    having = ((rows >= 0) & ~ready).nonzero().squeeze(1)
    landmarks = faces.landmarks[rows[having].to(device)]
    views = align_faces(images, batch.sizes, having, landmarks, window, side, template)
    return SearchedBatch([came, AlignedBatch(positions[having].tolist(), views.cpu(), "mtcnn", [])],
                         positions[(rows < 0) & ~ready].tolist(),
                         (landmarks.cpu() / batch.sizes[having].flip(1)[:, None]).double())


def come_as_crops(sizes: Tensor, chips: tuple | None) -> Tensor:
    """Pictures (B,) bool of the very side of finished crops, or of a checkpoint's chips (side, template)."""
    return (sizes == TEMPLATE_SIZE).all(1) | (sizes == (chips[0] if chips else TEMPLATE_SIZE)).all(1)


def cut_crops(images: Tensor, sizes: Tensor, window: tuple, side: int, template: tuple = TEMPLATE,
              chips: tuple | None = None) -> Tensor:
    """Window views of finished crops, which are square but need not all have one resolution.

    They show all of the usual template; those of the side of chips (side, template) all of the chips' template.
    """
    def cut(some: Tensor, size: int) -> Tensor:
        shown = chips[1] if chips and chips[0] == size else TEMPLATE
        return crop_views(some[:, :, :size, :size], window, side, template, shown)

    resolutions = sizes[:, 0].unique().tolist()
    if len(resolutions) == 1:
        return cut(images, resolutions[0])
    views = torch.empty(len(images), 3, side, side, dtype=torch.uint8, device=images.device)
    for size in resolutions:
        rows = (sizes[:, 0] == size).nonzero().squeeze(1).to(images.device)
        views[rows] = cut(images[rows], size)
    return views
