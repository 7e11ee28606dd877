"""Photographs -> aligned crops of the whole template, one file for each face.

    python facesets/mtcnn_crop_align.py --in_dir photos --out_dir crops --n_threads 4
    torchrun --nproc_per_node=4 facesets/mtcnn_crop_align.py --in_dir photos --out_dir crops

Reads every picture under --in_dir (or in tar shards, or those of a list). Writes photo.jpg_0.jpg, photo.jpg_1.jpg, ...
for the faces of photo.jpg by descending size, in the same subfolders, and skipped.csv: each photograph that gave no
crop, with the reason.
"""
import contextlib
import errno
import importlib
import itertools
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from models.data.batches import PhotoBatch, first_position, join_batches, load_photos
from models.data.decoding import PhotoError
from models.data.index import PhotoIndex, index_photos
from models.data.listing import InputError
from models.faces.align import TEMPLATE_SIZE, WHOLE_TEMPLATE, align_faces
from models.faces.mtcnn import MTCNN, Faces
from models.faces.pipeline import DECODE_BATCH, chunk_size, count_chunks, count_files, decode_workers, rank_by_size
from models.faces.predictions import quote_cell
from models.running import cli
from models.running.files import atomic_write, merge_parts
from models.running.parts import PartsError, exit_if_finished, missing_parts, open_parts, part_path
from models.running.ranks import barrier, init_distributed, rank_slice, shutdown_distributed
from models.running.threads import OrderedThreadPool

PARTS = "align_parts"                                   # folder of an unfinished run, in the output folder
SKIPPED = "skipped.csv"
THRESHOLDS, NMS_THRESHOLDS = [0.6, 0.7, 0.8], [0.7, 0.7, 0.7]       # of the reference, for --mtcnn_pytorch_path
VIEW_BYTES = 1 << 27                                    # crops of a batch are rendered so many bytes at a time
UNWRITABLE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ)     # the name's fault


def build_parser() -> cli.Parser:
    """All flags and their defaults."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--in_dir", nargs="+", required=True, metavar="DIR", help="folder of photographs, with subfolders, or .tar "
        "shards")
    add("--out_dir", required=True, metavar="DIR", help="where the crops go")
    add("--in_list", metavar="FILE", help="list of photographs in --in_dir, one path a line")
    add("--mtcnn_pytorch_path", metavar="DIR", help="use src.detect_faces of this checkout of mtcnn-pytorch in place "
        "of the built-in networks")
    add("--out_res", type=cli.positive_int, default=TEMPLATE_SIZE, metavar="PX", help="side of a crop (%(default)s)")
    cli.add_photo_flags(parser)
    cli.add_rerun_flags(parser).add_argument("--check_exists", action="store_true",
                                             help="pass over photographs whose first crop exists")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Aligns every photograph, part by part, and lists what gave no crop."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.out_dir = cli.output_folder(parser, "--out_dir", args.out_dir).resolve()
    args.in_dir = [os.path.abspath(path) for path in args.in_dir]
    if args.resume:
        exit_if_finished(parser, args.out_dir / PARTS, args.out_dir / SKIPPED)
    if args.out_dir.is_relative_to(Path(args.in_dir[0]).resolve()):
        parser.error("--out_dir lies in --in_dir, where the crops would count as photographs")
    rank, world_size, device = init_distributed(args.device)
    detector = load_detector(parser, args).to(device)
    folder = args.out_dir / PARTS
    open_parts(parser, folder, run_flags(args), lambda folder: begin(args, folder), rank,
               resume=args.resume, overwrite=args.overwrite or args.check_exists)
    photos = Photos(PhotoIndex(folder), args)
    todo = missing_parts(folder, count_chunks(len(photos)), "csv")
    started = time.perf_counter()
    align_chunks(photos, [todo[i] for i in rank_slice(len(todo), rank, world_size)], detector, device, args, rank == 0)
    photos.index.close()
    barrier()
    if rank == 0:
        finish(photos, todo, time.perf_counter() - started, args)
    barrier()
    shutdown_distributed()


# ------------------------------------------------------------------------------------------------- before anything runs
def load_detector(parser: cli.Parser, args) -> torch.nn.Module:
    """The built-in networks, or those of the checkout; both have detect(images, sizes) -> Faces."""
    if not args.mtcnn_pytorch_path:
        return MTCNN(min_face_size=args.min_face_size)
    try:
        return CheckoutDetector(args.mtcnn_pytorch_path, args.min_face_size)
    except (ImportError, AttributeError, OSError) as error:
        parser.error(f"--mtcnn_pytorch_path {args.mtcnn_pytorch_path}: src.detect_faces cannot be imported ({error})")


def begin(args, folder: Path) -> None:
    """Indexes the photographs, if nothing in the output folder would be lost. Raises PartsError."""
    if not (args.overwrite or args.check_exists):
        there = [name for name in os.listdir(args.out_dir) if not name.startswith(".") and name != PARTS]
        if there:
            raise PartsError(f"--out_dir {args.out_dir} is not empty ({min(there)}); --check_exists adds what is "
                             "missing, --overwrite replaces crops")
    try:
        index_photos(folder, args.in_dir, args.in_list)
    except InputError as error:
        raise PartsError(f"{'--in_list' if args.in_list else '--in_dir'} {error}") from None


def run_flags(args) -> dict:
    """All that decides what a part holds."""
    names = ("in_dir", "in_list", "mtcnn_pytorch_path", "out_res", "min_face_size", "max_side")
    return {name: getattr(args, name) for name in names}


class Photos:
    """The photographs of an index, [i] -> a path or bytes; PhotoError for one that is not to be aligned.

    Its status is 'exists' where --check_exists finds the first crop, 'outside' where its crop would not lie in
    --out_dir. A batch so keeps its place in the list, whatever has been done already.
    """

    def __init__(self, index: PhotoIndex, args):
        self.index, self.in_dir, self.out_dir, self.check_exists = (index, args.in_dir[0], args.out_dir,
                                                                    args.check_exists)

    def __len__(self) -> int:
        return len(self.index)

    def target(self, i: int, face: int) -> Path:
        """Where a crop belongs. Raises PhotoError."""
        name = self.index.name(i)
        name = os.path.normpath(os.path.relpath(name, self.in_dir) if os.path.isabs(name) else name)
        if name.split(os.sep)[0] == os.pardir:
            raise PhotoError("outside", "lies outside --in_dir, so that its crops would lie outside --out_dir")
        return self.out_dir / f"{name}_{face}.jpg"

    def __getitem__(self, i: int) -> str | bytes:
        first = self.target(i, 0)
        if self.check_exists and os.path.exists(first):
            raise PhotoError("exists", f"{first} exists")
        return self.index[i]


# ------------------------------------------------------------------------------------------------- photographs to crops
class CheckoutDetector(torch.nn.Module):
    """src.detect_faces of a checkout of mtcnn-pytorch: one picture at a time, as that code does it.

    The checkout finds its weights relative to itself, so it runs there. Raises ImportError, AttributeError, OSError.
    """

    def __init__(self, checkout: str, min_face_size: float):
        super().__init__()
        self.checkout, self.min_face_size = os.path.abspath(checkout), min_face_size
        for name in [name for name in sys.modules if name == "src" or name.startswith("src.")]:
            del sys.modules[name]
        sys.path.insert(0, self.checkout)
        try:
            with contextlib.chdir(self.checkout):
                package = importlib.import_module("src")
                self.detect_faces = package.detect_faces
        finally:
            sys.path.remove(self.checkout)
        if not any(os.path.abspath(path).startswith(self.checkout + os.sep) for path in package.__path__):
            raise ImportError(f"it has no package src; another lies in {list(package.__path__)[0]}")

    def detect(self, images: torch.Tensor, sizes: torch.Tensor) -> Faces:
        """As MTCNN.detect."""
        found = [self.detect_one(image[:, :height, :width].permute(1, 2, 0).contiguous().cpu().numpy())
                 for image, (height, width) in zip(images, sizes.tolist(), strict=True)]
        boxes, landmarks = (torch.from_numpy(np.concatenate([np.zeros((0, n)), *(pair[i] for pair in found)])).float()
                            for i, n in enumerate((5, 10)))
        image_index = torch.repeat_interleave(torch.tensor([len(pair[0]) for pair in found], dtype=torch.int64))
        points = landmarks.unflatten(1, (2, 5)).mT                                      # (n, 5, 2)
        spread = (points - points.mean(1, keepdim=True)).square().sum((1, 2)) > 1        # else no transform exists
        return Faces(*(rows[spread].to(images.device) for rows in (boxes[:, :4], boxes[:, 4], points, image_index)))

    def detect_one(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (n, 5) and landmarks (n, 10) of a picture (h, w, 3) uint8."""
        try:
            with contextlib.chdir(self.checkout):
                boxes, landmarks = self.detect_faces(Image.fromarray(pixels), min_face_size=self.min_face_size,
                                                     thresholds=THRESHOLDS, nms_thresholds=NMS_THRESHOLDS)
        except ValueError as error:         # what the published code raises where its first stage finds nothing
            if "concatenate" not in str(error):
                raise
            boxes, landmarks = [], []
        return np.asarray(boxes, float).reshape(-1, 5), np.asarray(landmarks, float).reshape(-1, 10)


def align_chunks(photos: Photos, chunks: list[int], detector: torch.nn.Module, device: torch.device, args,
                 show: bool) -> None:
    """Writes the crops of some chunks of the list; of each, when it is done, the part: what was skipped and counts."""
    size, n_batches = chunk_size(len(photos)), -(-len(photos) // DECODE_BATCH)
    per_chunk, n_files = size // DECODE_BATCH, count_files(len(photos), chunks)
    workers = decode_workers(args.num_workers, n_files, device)
    numbers = [k for chunk in chunks for k in range(chunk * per_chunk, min((chunk + 1) * per_chunk, n_batches))]

    def search(batch: PhotoBatch) -> tuple[PhotoBatch, Faces]:
        batch = replace(batch, images=batch.images.to(device))
        return batch, detector.detect(batch.images, batch.sizes)

    bar = tqdm(total=n_files, unit=" photographs", disable=not show, smoothing=0.05)
    with bar, OrderedThreadPool(device) as pool:
        batches = load_photos(photos, DECODE_BATCH, workers, args.max_side, batches=numbers, pool=pool)
        batches = join_batches(batches, size, device)
        # A checkout's networks run in its folder, which is the whole process's: one batch at a time.
        searched = map(search, batches) if args.mtcnn_pytorch_path else pool.ordered_map(search, batches)
        for chunk, its in itertools.groupby(searched, lambda pair: first_position(pair[0]) // size):
            skipped, counts = [], Counter()
            for batch, faces in its:
                skipped += write_batch(photos, batch, faces, args, counts)
                bar.update(len(batch.positions) + len(batch.failures))
            write_part(photos, chunk, skipped, counts, args)


def write_batch(photos: Photos, batch: PhotoBatch, faces: Faces, args, counts: Counter) -> list[tuple[int, str, str]]:
    """Writes the crops of a batch and counts them; (position, status, reason) of photographs that gave none."""
    order, number = rank_by_size(faces)
    order, number = order.flip(0), number.flip(0)               # of each photograph the largest face, number 0, last
    image_index = faces.image_index.cpu()[order]
    crops = zip(image_index.tolist(), number.tolist(), render_crops(batch, faces, order, args.out_res), strict=True)
    reasons = {i: write_crops(photos, batch.positions[i], its)
               for i, its in itertools.groupby(crops, lambda crop: crop[0])}
    n_faces = torch.bincount(image_index, minlength=len(batch.positions)).tolist()
    skipped = list(batch.failures)
    for i, (position, n) in enumerate(zip(batch.positions, n_faces, strict=True)):
        if reasons.get(i):
            skipped.append((position, "unwritable", reasons[i]))
            continue
        if not n:
            skipped.append((position, "no_face", ""))
        counts["crops"] += n
        if args.overwrite:
            remove_older(photos, position, n)
    return skipped


def render_crops(batch: PhotoBatch, faces: Faces, order: torch.Tensor, side: int) -> Iterator[torch.Tensor]:
    """Crops (3, side, side) uint8 of faces, in an order (n,) of theirs; VIEW_BYTES of them are rendered at a time."""
    for some in order.split(max(1, VIEW_BYTES // (3 * side ** 2))):
        where = some.to(batch.images.device)
        yield from align_faces(batch.images, batch.sizes, faces.image_index[where], faces.landmarks[where], WHOLE_TEMPLATE,
                               side).cpu()


def write_crops(photos: Photos, position: int, crops: Iterable[tuple[int, int, torch.Tensor]]) -> str:
    """Writes the crops (photograph, number, pixels) of a photograph, the first one last: where it lies, all do.

    Returns why they could not be written, or ''.
    """
    try:
        for _, face, crop in crops:
            path = photos.target(position, face)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as beside:
                Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy()).save(beside, "JPEG", quality=95,
                                                                                 subsampling=0)
    except OSError as error:
        if error.errno not in UNWRITABLE:                       # a full disk is the end of the run
            raise
        return f"its crop cannot be written: {error.strerror}"
    return ""


def remove_older(photos: Photos, position: int, n: int) -> None:
    """Removes what an earlier run, which found more faces, wrote beyond the n crops of a photograph."""
    for face in itertools.count(n):
        old = photos.target(position, face)
        if not os.path.exists(old):         # false of a name that is too long, too
            break
        old.unlink()


# ------------------------------------------------------------------------------------------------------ parts to result
def write_part(photos: Photos, chunk: int, skipped: list[tuple[int, str, str]], counts: Counter, args) -> None:
    """What a chunk adds to skipped.csv, and its counts; the table last: where it lies, the chunk is done."""
    counts.update(status for _, status, _ in skipped)
    lines = [f"{quote_cell(photos.index.name(position))},{status},{quote_cell(reason)}\n"
             for position, status, reason in sorted(skipped) if status != "exists"]
    with atomic_write(part_path(args.out_dir / PARTS, chunk, "json")) as beside:
        beside.write_text(json.dumps(counts))
    with atomic_write(part_path(args.out_dir / PARTS, chunk, "csv")) as beside:
        beside.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))


def finish(photos: Photos, done: list[int], seconds: float, args) -> None:
    """skipped.csv from the parts, the summary; the folder of parts is gone then."""
    folder, chunks = args.out_dir / PARTS, range(count_chunks(len(photos)))
    merge_parts([part_path(folder, chunk, "csv") for chunk in chunks], args.out_dir / SKIPPED, b"file,status,reason\n")
    counts = Counter()
    for chunk in chunks:
        counts.update(json.loads(part_path(folder, chunk, "json").read_text()))
    n_now, n_crops, n_kept = count_files(len(photos), done), counts.pop("crops", 0), counts.pop("exists", 0)
    print(f"{n_now:,} photographs in {seconds:.1f} s: {n_now / max(seconds, 1e-9):.1f} images/s")
    print(f"{n_crops:,} crops of {len(photos) - n_kept - sum(counts.values()):,} photographs in {args.out_dir}")
    if n_kept:
        print(f"{n_kept:,} photographs had their crops already")
    if counts:
        print(f"without a crop: {', '.join(f'{name} {n:,}' for name, n in sorted(counts.items()))} "
              f"(see {args.out_dir / SKIPPED})")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
