"""Photographs -> aligned crops of the whole ArcFace template, one file for each face.

    python facesets/mtcnn_crop_align.py --input_dir photos --output_dir crops
    torchrun --nproc_per_node=4 facesets/mtcnn_crop_align.py --input_dir photos --output_dir crops

Reads every picture of a folder, of tar shards or of a list. Writes photo.jpg_0.jpg,
photo.jpg_1.jpg, ... for the faces of photo.jpg by descending size, in the same subfolders, and
skipped.csv: each photograph without a crop, with the reason.
"""
import argparse
import errno
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from models.data.chunks import count_chunks, count_files
from models.data.decoding import PhotoError
from models.data.index import PhotoIndex, index_photos
from models.data.listing import InputError
from models.faces.align import TEMPLATE_SIZE, WHOLE_TEMPLATE
from models.faces.checkout_detector import CheckoutDetector
from models.faces.pipeline import (
    AlignedBatch,
    FacePolicy,
    FaceRow,
    Loading,
    ViewSpec,
    align_photos,
    decode_workers,
)
from models.faces.predictions import quote_cell
from models.faces.second_look import load_detector
from models.running import cli
from models.running.command import run_command
from models.running.files import atomic_write, merge_parts
from models.running.parts import (
    PartsError,
    close_parts,
    exit_if_finished,
    missing_parts,
    open_parts,
    part_path,
)
from models.running.ranks import barrier, init_distributed, rank_slice, shutdown_distributed
from models.running.threads import OrderedThreadPool

PARTS = "align_parts"       # folder of an unfinished run, in the output folder
SKIPPED = "skipped.csv"
# Errors that are due to the name of one file; any other, such as a full disk, ends the run.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ)


def build_parser() -> cli.Parser:
    """All flags and their defaults."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_input_dir(parser, "folder of photographs, with subfolders, or .tar shards", nargs="+",
                      required=True)
    cli.add_output_dir(parser, "folder for the crops")
    add("--in_list", metavar="FILE", help="list of photographs in --input_dir, one path a line")
    add("--mtcnn_pytorch_path", metavar="DIR",
        help="detect with src.detect_faces of this checkout of mtcnn-pytorch")
    add("--out_res", type=cli.positive_int, default=TEMPLATE_SIZE, metavar="PX",
        help="size of a crop in pixels (%(default)s)")
    cli.add_photo_flags(parser)
    cli.add_rerun_flags(parser).add_argument(
        "--check_exists", action="store_true",
        help="leave out photographs whose first crop exists")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Aligns every photograph, chunk by chunk, and lists those without a crop."""
    parser = build_parser()
    args = parser.parse_args(argv)
    output_dir = cli.output_folder(parser, "--output_dir", args.output_dir).resolve()
    args.input_dir = [os.path.abspath(path) for path in args.input_dir]
    if args.resume:
        exit_if_finished(parser, output_dir / PARTS, output_dir / SKIPPED)
    if output_dir.is_relative_to(Path(args.input_dir[0]).resolve()):
        parser.error("--output_dir lies in --input_dir, where crops would count as photographs")
    rank, world_size, device = init_distributed(args.device)
    detector = choose_detector(parser, args, device)
    photos = open_photos(parser, args, output_dir, rank)
    todo = missing_parts(photos.parts, count_chunks(len(photos)), "csv")
    started = time.perf_counter()
    chunks = [todo[i] for i in rank_slice(len(todo), rank, world_size)]
    loading = Loading(num_workers=decode_workers(args.num_workers,
                                                 count_files(len(photos), chunks), device),
                      max_side=args.max_side)
    align_chunks(photos, chunks, CropWriter(photos, args.out_res, args.overwrite), detector,
                 loading, device, show_progress=rank == 0)
    photos.index.close()
    barrier()
    if rank == 0:
        finish(photos, count_files(len(photos), todo), time.perf_counter() - started)
    barrier()
    shutdown_distributed()


# -------------------------------------------------------------------------- before anything runs
def choose_detector(parser: cli.Parser, args: argparse.Namespace,
                    device: torch.device) -> nn.Module:
    """The networks of this project, or those of a checkout of mtcnn-pytorch."""
    if not args.mtcnn_pytorch_path:
        return load_detector(device, args.min_face_size, args.second_look)
    try:
        return CheckoutDetector(args.mtcnn_pytorch_path, args.min_face_size).to(device)
    except (ImportError, AttributeError, OSError) as error:
        parser.error(f"--mtcnn_pytorch_path {args.mtcnn_pytorch_path}: src.detect_faces cannot be "
                     f"imported ({error})")


def open_photos(parser: cli.Parser, args: argparse.Namespace, output_dir: Path,
                rank: int) -> "PhotosToAlign":
    """The photographs of a new or resumed run; rank 0 lists them for all ranks."""
    folder = output_dir / PARTS
    names = ("input_dir", "in_list", "mtcnn_pytorch_path", "out_res", "min_face_size", "max_side",
             "second_look")
    flags = {name: getattr(args, name) for name in names}
    keeps_crops = args.overwrite or args.check_exists
    begin = partial(begin_run, input_dir=args.input_dir, in_list=args.in_list,
                    must_be_empty=not keeps_crops)
    open_parts(parser, folder, flags, begin, rank, resume=args.resume, overwrite=keeps_crops)
    return PhotosToAlign(PhotoIndex(folder), args.input_dir[0], output_dir, args.check_exists)


def begin_run(folder: Path, input_dir: list[str], in_list: str | None,
              must_be_empty: bool) -> None:
    """Indexes the photographs, if no file of the output folder would be lost. Raises PartsError."""
    if must_be_empty:
        existing = [name for name in os.listdir(folder.parent)
                    if not name.startswith(".") and name != PARTS]
        if existing:
            raise PartsError(f"--output_dir {folder.parent} is not empty ({min(existing)}); "
                             "--check_exists adds missing crops, --overwrite replaces crops")
    try:
        index_photos(folder, input_dir, in_list)
    except InputError as error:
        raise PartsError(f"{'--in_list' if in_list else '--input_dir'} {error}") from None


@dataclass(frozen=True)
class PhotosToAlign:
    """The photographs of an index: [i] is a path or bytes, or raises PhotoError.

    The status of the error is 'exists' where --check_exists finds the first crop, and 'outside'
    where the crop would not lie in the output folder. Such a photograph keeps its place in the
    list, so that batches are the same whatever has been done before.
    """
    index: PhotoIndex
    input_dir: str
    output_dir: Path
    check_exists: bool

    def __len__(self) -> int:
        return len(self.index)

    @property
    def parts(self) -> Path:
        """The folder of the finished parts."""
        return self.output_dir / PARTS

    def crop_path(self, i: int, face: int) -> Path:
        """Where the crop of a face belongs. Raises PhotoError."""
        name = self.index.name(i)
        if os.path.isabs(name):
            name = os.path.relpath(name, self.input_dir)
        name = os.path.normpath(name)
        if name.split(os.sep)[0] == os.pardir:
            raise PhotoError("outside", "lies outside --input_dir, so its crops would lie outside "
                             "--output_dir")
        return self.output_dir / f"{name}_{face}.jpg"

    def __getitem__(self, i: int) -> str | bytes:
        first_crop = self.crop_path(i, 0)
        if self.check_exists and os.path.exists(first_crop):
            raise PhotoError("exists", f"{first_crop} exists")
        return self.index[i]


# --------------------------------------------------------------------------- photographs to crops
@dataclass
class WrittenBatch:
    """What became of the photographs of a batch: how many crops, and which gave none."""
    chunk: int
    n_photos: int = 0
    n_crops: int = 0
    skipped: list[tuple[int, str, str]] = field(default_factory=list)   # position, status, reason


@dataclass(frozen=True)
class CropWriter:
    """Writes the crops of aligned batches as JPEG files of quality 95, 4:4:4."""
    photos: PhotosToAlign
    out_res: int
    overwrite: bool

    def write_batch(self, batch: AlignedBatch) -> WrittenBatch:
        """Writes all crops of a batch; a photograph is never divided between batches."""
        written = WrittenBatch(batch.chunk)
        faces = zip(batch.rows, batch.views.cpu(), strict=True)
        for position, photo_faces in itertools.groupby(faces, lambda face: face[0].position):
            crops = list(photo_faces)
            if reason := self.write_photo(position, crops):
                written.skipped.append((position, "unwritable", reason))
            else:
                written.n_crops += len(crops)
                self.remove_older(position, len(crops))
            written.n_photos += 1
        for failure in batch.failures:
            if failure.status == "no_face":
                self.remove_older(failure.position, 0)
            written.skipped.append((failure.position, failure.status, failure.error))
        written.n_photos += len(batch.failures)
        return written

    def write_photo(self, position: int, crops: list[tuple[FaceRow, Tensor]]) -> str:
        """Writes the crops of one photograph, the first one last: if it exists, all exist.

        Returns the reason why they cannot be written, or ''.
        """
        try:
            for row, pixels in reversed(crops):
                path = self.photos.crop_path(position, row.face)
                path.parent.mkdir(parents=True, exist_ok=True)
                image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
                with atomic_write(path) as temporary_path:
                    image.save(temporary_path, "JPEG", quality=95, subsampling=0)
        except OSError as error:
            if error.errno not in NAME_ERRORS:
                raise
            return f"its crop cannot be written: {error.strerror}"
        return ""

    def remove_older(self, position: int, n_crops: int) -> None:
        """With --overwrite, removes the crops of an earlier run that found more faces."""
        for face in itertools.count(n_crops):
            older_crop = self.photos.crop_path(position, face)
            if not self.overwrite or not os.path.exists(older_crop):
                return
            older_crop.unlink()


def align_chunks(photos: PhotosToAlign, chunks: list[int], writer: CropWriter, detector: nn.Module,
                 loading: Loading, device: torch.device, show_progress: bool) -> None:
    """Writes the crops of some chunks, and a part for each finished chunk."""
    n_files = count_files(len(photos), chunks)
    bar = tqdm(total=n_files, unit=" photographs", disable=not show_progress, smoothing=0.05)
    with bar, OrderedThreadPool(device) as pool:
        aligned = align_photos(
            photos, detector, ViewSpec(WHOLE_TEMPLATE, writer.out_res),
            FacePolicy("all", align="always"), loading, chunks=chunks, pool=pool, device=device)
        written: Iterator[WrittenBatch] = pool.ordered_map(writer.write_batch, aligned)
        for chunk, batches in itertools.groupby(written, lambda batch: batch.chunk):
            whole_chunk = WrittenBatch(chunk)
            for batch in batches:
                whole_chunk.n_crops += batch.n_crops
                whole_chunk.skipped += batch.skipped
                bar.update(batch.n_photos)
            write_part(photos, chunk, whole_chunk)


# -------------------------------------------------------------------------------- parts to result
def write_part(photos: PhotosToAlign, chunk: int, written: WrittenBatch) -> None:
    """Writes the counts of a chunk and its rows of skipped.csv, which mark the chunk as done."""
    counts = Counter(status for _, status, _ in written.skipped)
    counts["crops"] = written.n_crops
    lines = [f"{quote_cell(photos.index.name(position))},{status},{quote_cell(reason)}\n"
             for position, status, reason in sorted(written.skipped) if status != "exists"]
    with atomic_write(part_path(photos.parts, chunk, "json")) as temporary_path:
        temporary_path.write_text(json.dumps(counts))
    with atomic_write(part_path(photos.parts, chunk, "csv")) as temporary_path:
        temporary_path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))


def finish(photos: PhotosToAlign, n_files: int, seconds: float) -> None:
    """Merges the parts into skipped.csv, prints the summary and removes the parts.

    n_files and seconds are those of this call.
    """
    chunks = range(count_chunks(len(photos)))
    skipped_path = photos.output_dir / SKIPPED
    merge_parts([part_path(photos.parts, chunk, "csv") for chunk in chunks], skipped_path,
                b"file,status,reason\n")
    counts: Counter = Counter()
    for chunk in chunks:
        counts.update(json.loads(part_path(photos.parts, chunk, "json").read_text()))
    n_crops, n_existing = counts.pop("crops", 0), counts.pop("exists", 0)
    n_with_crops = len(photos) - n_existing - sum(counts.values())
    rate = n_files / max(seconds, 1e-9)
    print(f"{n_files:,} photographs in {seconds:.1f} s: {rate:.1f} images/s")
    print(f"{n_crops:,} crops of {n_with_crops:,} photographs in {photos.output_dir}")
    if n_existing:
        print(f"{n_existing:,} photographs had their crops already")
    if counts:
        print("without a crop: " + ", ".join(f"{name} {n:,}" for name, n in sorted(counts.items()))
              + f" (see {skipped_path})")
    close_parts(photos.parts)


if __name__ == "__main__":
    run_command(main, "--resume finishes the run")
