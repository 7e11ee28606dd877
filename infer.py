"""Predicted labels and group shares for a folder of photographs, a list of them, or tar shards.

    python infer.py --input_dir photos --output_dir out --visualize
    torchrun --nproc_per_node=4 infer.py --input_dir 'shards/*.tar' --output_dir out --resume

Reads a checkpoint of train.py and every picture of the input. Writes to the output folder:
  predictions.csv            a row for each face, and a row with the reason for each other picture
  pred_ethnicities.txt       file name and label of each face
  shares.json, shares.png    estimated shares of the classes with 95 % intervals, of all faces and,
                             with --by, of each group
  0.jpg, 1.jpg, ...          grids of the labelled faces (--visualize)
"""
import argparse
import itertools
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from models.data.chunks import count_chunks, count_files
from models.data.faceset import FaceSet, FaceSetError, read_faceset
from models.data.index import PhotoIndex, index_photos
from models.data.listing import InputError
from models.faces.align import TEMPLATE_SIZE
from models.faces.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from models.faces.pipeline import (
    Classification,
    FacePolicy,
    FaceRow,
    Loading,
    ViewSpec,
    classify_photos,
    decode_workers,
)
from models.faces.predictions import (
    STATUSES,
    UNCERTAIN,
    Prediction,
    Thresholds,
    format_row,
    label_name,
    predict_labels,
    prediction_columns,
    read_predictions,
)
from models.faces.predictor import Predictor, network_batch_size
from models.faces.second_look import load_detector
from models.reports.grids import GridFace, GridLayout, draw_grid
from models.reports.shares import report_shares
from models.reports.tally import (
    GroupsError,
    GroupTable,
    Tally,
    count_unlisted,
    read_groups,
    tally_predictions,
)
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

PARTS = "infer_parts"       # folder of an unfinished run, in the output folder
MAX_GRID_INCHES = 300       # 30,000 pixels a side at matplotlib's 100 pixels an inch
CROP_BYTES = 3 * TEMPLATE_SIZE * TEMPLATE_SIZE


def build_parser() -> cli.Parser:
    """All flags and their defaults."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_input_dir(parser, "folder of pictures, with subfolders, or .tar shards", nargs="+")
    add("--in_list", metavar="FILE",
        help="list of pictures, one path a line, relative to --input_dir if that is given")
    cli.add_output_dir(parser)
    cli.add_ckpt(parser)
    add("--faces", choices=("largest", "all"), default="largest",
        help="which faces of a picture are labelled (%(default)s)")
    add("--flip", action="store_true",
        help="test-time augmentation: average each face with its mirror image")
    add_threshold_flags(parser)
    add("--by", metavar="WHAT",
        help="estimate the shares of groups too: `folder` groups by the first folder of a relative "
             "path or by the parent of an absolute one; FILE.csv groups by its columns file and "
             "one more; FILE.csv:COLUMN chooses the column")
    add("--reference", metavar="DIR",
        help="class folders of labelled pictures like the input, which correct the shares; the "
             "checkpoint's validation faces then count as ten faces of each class")
    add_grid_flags(parser)
    cli.add_labelling_flags(parser)
    cli.add_rerun_flags(parser)
    return parser


def add_threshold_flags(parser: cli.Parser) -> None:
    """--min_confidence, --target_error and --alpha."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--min_confidence", type=cli.fraction, metavar="P",
                       help=f"label faces of a lower confidence '{UNCERTAIN}'")
    group.add_argument("--target_error", type=cli.fraction, metavar="E",
                       help="label faces 'uncertain' so that, on validation, at most this share of "
                            "the labels stated for each class is wrong")
    parser.add_argument("--alpha", type=cli.fraction, default=0.1, metavar="A",
                        help="error of the prediction sets (column `set`): share of the faces of "
                             "each class whose set misses the class (%(default)s)")


def add_grid_flags(parser: cli.Parser) -> None:
    """--visualize and the layout of the grids."""
    add = parser.add_argument
    add("--visualize", action="store_true", help="draw grids of the faces with their labels")
    add("--n_vis_samples_per_pic", type=cli.positive_int, default=40, metavar="N",
        help="faces in a grid (%(default)s)")
    add("--n_vis_rows_per_pic", type=cli.positive_int, default=5, metavar="N",
        help="rows of a grid (%(default)s)")
    add("--figsize_h", type=cli.positive_float, default=20, metavar="INCH",
        help="height of a grid (%(default)s)")
    add("--figsize_w", type=cli.positive_float, default=20, metavar="INCH",
        help="width of a grid (%(default)s)")


def main(argv: list[str] | None = None) -> None:
    """Labels every picture, chunk by chunk, and merges the results."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    rank, world_size, device = init_distributed(args.device)
    checkpoint = read_checkpoint(parser, args)
    reference = read_reference(parser, args, checkpoint)
    groups = read_group_table(parser, args)
    run = open_run(parser, args, rank)
    if groups is not None and rank == 0:
        check_groups(parser, run, groups, is_new=not args.resume)
    labelling = choose_labelling(args, checkpoint, run, device)
    started = time.perf_counter()
    chunks = [run.open_chunks[i] for i in rank_slice(len(run.open_chunks), rank, world_size)]
    label_chunks(run, chunks, labelling, show_progress=rank == 0)
    run.photos.close()
    barrier()
    seconds = time.perf_counter() - started
    classes = checkpoint.spec.classes
    if args.visualize:
        layout = GridLayout(args.n_vis_samples_per_pic, args.n_vis_rows_per_pic, args.figsize_w,
                            args.figsize_h)
        n_grids = draw_grids(run, layout, classes, rank, world_size)
        barrier()
        if rank == 0 and args.overwrite:
            remove_older_grids(run.output_dir, n_grids)
    if rank == 0:
        merge_run(run, classes)
        tally = tally_predictions(run.output_dir / "predictions.csv", classes, args.by, groups)
        print_summary(tally, count_files(len(run.photos), run.open_chunks), seconds, classes)
        own_faces = label_reference(reference, labelling) if reference else None
        report_shares(tally, checkpoint.calibration, classes, run.output_dir,
                      with_groups=bool(args.by), reference=own_faces)
        close_parts(run.folder)
    barrier()
    shutdown_distributed()


# -------------------------------------------------------------------------- before anything runs
def check_flags(parser: cli.Parser, args: argparse.Namespace) -> None:
    """Ends with a one-line error where the flags or the output folder alone show a mistake."""
    if not args.input_dir and not args.in_list:
        parser.error("--input_dir or --in_list is required")
    if args.n_vis_samples_per_pic % args.n_vis_rows_per_pic:
        parser.error(f"--n_vis_rows_per_pic {args.n_vis_rows_per_pic} must divide "
                     f"--n_vis_samples_per_pic {args.n_vis_samples_per_pic}")
    output_path = Path(args.output_dir).resolve()
    input_dirs = [] if args.in_list else args.input_dir or []
    if any(output_path.is_relative_to(Path(folder).resolve()) for folder in input_dirs):
        parser.error("--output_dir lies in --input_dir, where its pictures would be labelled by "
                     "the next run")
    for flag, inches in (("--figsize_h", args.figsize_h), ("--figsize_w", args.figsize_w)):
        if not 1 <= inches <= MAX_GRID_INCHES:
            parser.error(f"{flag} {inches:g}: expects 1 to {MAX_GRID_INCHES} inches")
    output_dir = args.output_dir = cli.output_folder(parser, "--output_dir", args.output_dir)
    if args.resume:
        exit_if_finished(parser, output_dir / PARTS, output_dir / "predictions.csv")
        return
    results = [output_dir / name for name in ("predictions.csv", "pred_ethnicities.txt",
                                              "shares.json", "shares.png")]
    if args.visualize:
        results += [path for path in output_dir.glob("*.jpg") if path.stem.isdecimal()]
    cli.refuse_existing(parser, "--output_dir", results, args.overwrite)


def read_checkpoint(parser: cli.Parser, args: argparse.Namespace) -> Checkpoint:
    """The checkpoint; ends with a one-line error where it lacks what the flags require."""
    try:
        checkpoint = load_checkpoint(args.ckpt)
    except CheckpointError as error:
        parser.error(f"--ckpt {args.ckpt}: {error}")
    for flag, value in (("--target_error", args.target_error), ("--reference", args.reference)):
        if value is not None and checkpoint.calibration is None:
            parser.error(f"{flag}: {args.ckpt} is not calibrated (evaluate.py --calibrate does it)")
    return checkpoint


def read_reference(parser: cli.Parser, args: argparse.Namespace,
                   checkpoint: Checkpoint) -> FaceSet | None:
    """The labelled pictures of --reference."""
    if not args.reference:
        return None
    try:
        reference = read_faceset(args.reference, classes=checkpoint.spec.classes)
    except FaceSetError as error:
        parser.error(f"--reference {error}")
    if reference.unmatched:
        parser.error(f"--reference {args.reference}: folder {reference.unmatched[0]} matches no "
                     f"class of the checkpoint ({', '.join(reference.classes)})")
    return reference


def read_group_table(parser: cli.Parser, args: argparse.Namespace) -> GroupTable | None:
    """The groups of --by FILE.csv."""
    if not args.by or args.by == "folder":
        return None
    try:
        return read_groups(args.by, args.input_dir[0] if args.input_dir else "")
    except GroupsError as error:
        parser.error(f"--by {error}")


# -------------------------------------------------------------------- a run and its finished parts
@dataclass(frozen=True)
class Run:
    """A run whose finished chunks are parts: <chunk>.csv (rows), .txt (lines), .crops (raw RGB)."""
    folder: Path
    photos: PhotoIndex
    open_chunks: list[int]          # chunks without a part when the run was opened

    @property
    def output_dir(self) -> Path:
        """The folder of the results."""
        return self.folder.parent


def open_run(parser: cli.Parser, args: argparse.Namespace, rank: int) -> Run:
    """The run of these flags, new or resumed; rank 0 lists pictures and open chunks for all."""
    folder = args.output_dir / PARTS
    names = ("input_dir", "in_list", "align", "faces", "min_face_size", "max_side",
             "second_look", "flip", "min_confidence", "target_error", "alpha", "visualize",
             "batch_size")
    flags = {name: getattr(args, name) for name in names}
    flags["ckpt"] = zlib.crc32(Path(args.ckpt).read_bytes())
    begin = partial(begin_run, input_dir=args.input_dir, in_list=args.in_list)
    open_parts(parser, folder, flags, begin, rank, resume=args.resume, overwrite=args.overwrite)
    photos = PhotoIndex(folder)
    return Run(folder, photos, missing_parts(folder, count_chunks(len(photos)), "csv"))


def begin_run(folder: Path, input_dir: list[str] | None, in_list: str | None) -> None:
    """Indexes the pictures. Raises PartsError."""
    try:
        index_photos(folder, input_dir, in_list)
    except InputError as error:
        raise PartsError(f"{'--in_list' if in_list else '--input_dir'} {error}") from None


def check_groups(parser: cli.Parser, run: Run, groups: GroupTable, is_new: bool) -> None:
    """Ends the run before anything is labelled where --by lists none of its pictures."""
    names = (run.photos.name(i) for i in range(len(run.photos)))
    try:
        n_unlisted = count_unlisted(groups, names)
    except GroupsError as error:
        if is_new:
            close_parts(run.folder)
        parser.error(f"--by: {error}")
    if n_unlisted:
        print(f"--by: {n_unlisted:,} of {len(run.photos):,} pictures are in no group")


@dataclass(frozen=True)
class Labelling:
    """Everything that turns pictures into rows: networks, policies and thresholds."""
    predictor: Predictor
    detector: nn.Module | None
    policy: FacePolicy
    loading: Loading
    classification: Classification
    thresholds: Thresholds
    with_crops: bool

    @property
    def names(self) -> list[str]:
        """The classes as the results spell them."""
        return [label_name(name) for name in self.predictor.spec.classes]


def choose_labelling(args: argparse.Namespace, checkpoint: Checkpoint, run: Run,
                     device: torch.device) -> Labelling:
    """The networks and settings of the flags; what they leave open is chosen for this machine."""
    n_files = count_files(len(run.photos), run.open_chunks)
    detector = None
    if args.align != "never":
        detector = load_detector(device, args.min_face_size, args.second_look)
    return Labelling(
        Predictor(checkpoint, device), detector, FacePolicy(args.faces, align=args.align),
        Loading(num_workers=decode_workers(args.num_workers, n_files, device),
                max_side=args.max_side),
        Classification(args.batch_size or network_batch_size(device), args.flip),
        Thresholds.of_checkpoint(checkpoint, args.alpha, args.min_confidence or 0.0,
                                 args.target_error),
        args.visualize)


# ------------------------------------------------------------------------------- pictures to parts
def label_chunks(run: Run, chunks: list[int], labelling: Labelling, show_progress: bool) -> None:
    """Labels the pictures of some chunks and writes a part for each finished chunk."""
    if not chunks:
        return
    view = ViewSpec.of_checkpoint(labelling.predictor.spec, labelling.with_crops)
    n_files = count_files(len(run.photos), chunks)
    with tqdm(total=n_files, unit=" pictures", disable=not show_progress, smoothing=0.05) as bar:
        for chunk, rows in classify_photos(
                run.photos, labelling.predictor, labelling.detector, labelling.policy,
                labelling.loading, labelling.classification, view=view, chunks=chunks):
            predictions = predict_labels(rows, labelling.names, labelling.thresholds)
            write_part(run, chunk, rows, predictions, labelling)
            bar.update(count_files(len(run.photos), [chunk]))


def write_part(run: Run, chunk: int, rows: list[FaceRow], predictions: list[Prediction],
               labelling: Labelling) -> None:
    """Writes what a chunk adds to each result; the CSV comes last and marks the chunk as done."""
    names = [run.photos.name(row.position) for row in rows]
    has_many_faces = labelling.policy.faces == "all"
    lines = [text_line(f"{name}_{row.face}" if has_many_faces else name, prediction.label)
             for name, row, prediction in zip(names, rows, predictions, strict=True)
             if row.status == "ok"]
    table = [format_row(name, row, prediction, len(labelling.names))
             for name, row, prediction in zip(names, rows, predictions, strict=True)]
    crops = [row.crop.numpy().tobytes() for row in rows if row.crop is not None]
    contents = ("crops", b"".join(crops)), ("txt", encode(lines)), ("csv", encode(table))
    for kind, content in contents:
        if content or kind == "csv":
            with atomic_write(part_path(run.folder, chunk, kind)) as temporary_path:
                temporary_path.write_bytes(content)


def text_line(name: str, label: str) -> str:
    """A line of pred_ethnicities.txt; line ends in a file name are written \\n and \\r."""
    return "{} {}\n".format(name.replace("\n", "\\n").replace("\r", "\\r"), label)


def encode(lines: list[str]) -> bytes:
    """Lines as UTF-8; bytes of a file name that are not UTF-8 are kept as they are."""
    return "".join(lines).encode("utf-8", "surrogateescape")


# -------------------------------------------------------------------------------- parts to results
def draw_grids(run: Run, layout: GridLayout, classes: tuple[str, ...], rank: int,
               world_size: int) -> int:
    """Draws the grids and returns their number; the ranks take turns, one grid in memory each."""
    faces = labelled_crops(run, classes)
    for number in itertools.count():
        grid_faces = list(itertools.islice(faces, layout.n_faces))
        if not grid_faces:
            break
        if number % world_size == rank:
            draw_grid(grid_faces, layout, run.output_dir / f"{number}.jpg")
    return number


def remove_older_grids(output_dir: Path, n_grids: int) -> None:
    """Removes the grids that an earlier run with more faces left behind."""
    for number in itertools.count(n_grids):
        path = output_dir / f"{number}.jpg"
        if not path.exists():
            return
        path.unlink()


def labelled_crops(run: Run, classes: tuple[str, ...]) -> Iterator[GridFace]:
    """Crop, label and confidence of every face, in the order of the results."""
    for chunk in range(count_chunks(len(run.photos))):
        rows = read_predictions(part_path(run.folder, chunk, "csv"), prediction_columns(classes))
        faces = [row for row in rows if row["status"] == "ok"]
        if not faces:
            continue
        with open(part_path(run.folder, chunk, "crops"), "rb") as file:
            for row in faces:
                crop = np.frombuffer(file.read(CROP_BYTES), np.uint8)
                crop = crop.reshape(3, TEMPLATE_SIZE, TEMPLATE_SIZE).transpose(1, 2, 0)
                yield GridFace(crop, row["ethnicity"], float(row["confidence"]))


def merge_run(run: Run, classes: tuple[str, ...]) -> None:
    """Merges the parts, in the order of the list, into predictions.csv and pred_ethnicities.txt."""
    chunks = range(count_chunks(len(run.photos)))
    lines = [part_path(run.folder, chunk, "txt") for chunk in chunks]
    merge_parts([path for path in lines if path.exists()],
                run.output_dir / "pred_ethnicities.txt")
    header = encode([",".join(prediction_columns(classes)) + "\n"])
    merge_parts([part_path(run.folder, chunk, "csv") for chunk in chunks],
                run.output_dir / "predictions.csv", header)


def print_summary(tally: Tally, n_files: int, seconds: float, classes: tuple[str, ...]) -> None:
    """Prints the rate of this call and the counts by status and label."""
    labels = [label_name(name) for name in classes]
    labels += [UNCERTAIN] if tally.labels[UNCERTAIN] else []
    print(f"{n_files:,} pictures in {seconds:.1f} s: {n_files / max(seconds, 1e-9):.1f} images/s")
    print("rows:             " + ", ".join(f"{name} {tally.statuses[name]:,}"
                                           for name in STATUSES))
    if tally.statuses["ok"]:
        print("found by:         " + ", ".join(f"{name} {n:,}"
                                               for name, n in tally.found_by.most_common()))
    print("predicted labels: " + ", ".join(f"{name} {tally.labels[name]:,}" for name in labels))


def label_reference(reference: FaceSet, labelling: Labelling) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (r, C) and labels (r,) of the faces in the pictures of --reference."""
    align = "never" if reference.is_aligned else labelling.policy.align
    policy = replace(labelling.policy, align=align, faces="largest")
    classified = classify_photos(reference.paths(), labelling.predictor, labelling.detector, policy,
                                 labelling.loading, labelling.classification)
    rows = [row for _, chunk_rows in classified for row in chunk_rows if row.probs is not None]
    probs = np.zeros((len(rows), len(labelling.names)))
    for i, row in enumerate(rows):
        probs[i] = row.probs.numpy()
    return probs, reference.labels.numpy()[[row.position for row in rows]]


if __name__ == "__main__":
    run_command(main, "--resume finishes the run")
