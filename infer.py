"""Predicted labels, and group shares, for a folder of photographs, a list of them, or tar shards.

    python infer.py --input_dir photos --output_dir out --visualize
    torchrun --nproc_per_node=4 infer.py --input_dir 'shards/*.tar' --output_dir out --resume

Reads a checkpoint of train.py and every picture of the input. Writes into the output folder predictions.csv (a row for
each face, and for each picture without one the reason), pred_ethnicities.txt, shares.json and shares.png (estimated
shares of the classes, with 95 % intervals: `all` for all faces and, with --by, `groups` for the faces of each group by
its name), and with --visualize grids of the faces 0.jpg, 1.jpg, ...
"""
import csv
import itertools
import json
import os
import shutil
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from models.data.faceset import FaceSet, FaceSetError, read_faceset
from models.data.index import PhotoIndex, index_photos
from models.data.listing import InputError
from models.faces.align import TEMPLATE_SIZE
from models.faces.calibration import class_thresholds, set_thresholds
from models.faces.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from models.faces.mtcnn import MTCNN
from models.faces.pipeline import (
    Predictor,
    Row,
    Settings,
    classify_files,
    count_chunks,
    count_files,
    decode_workers,
    network_batch,
)
from models.faces.predictions import STATUSES, UNCERTAIN, columns, format_row, label_name, read_predictions
from models.reports.shares import draw_shares, estimate_shares, format_shares
from models.running import cli
from models.running.files import atomic_write, merge_parts
from models.running.parts import PartsError, exit_if_finished, missing_parts, open_parts, part_path
from models.running.ranks import barrier, init_distributed, rank_slice, shutdown_distributed

CKPT = "checkpoints/resnet18_general.pt"     # in the project, wherever the command is run
PARTS = "infer_parts"               # folder of an unfinished run, in the output folder
FEWEST_FACES = 20                   # below, intervals of shares say nothing and drawing them takes longest of all
CROP_BYTES = 3 * TEMPLATE_SIZE * TEMPLATE_SIZE


def build_parser() -> cli.Parser:
    """All flags and their defaults."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--input_dir", nargs="+", metavar="DIR", help="folder of pictures, searched to the bottom, or .tar shards")
    add("--in_list", metavar="FILE", help="list of pictures, one path a line, relative to --input_dir if given")
    add("--output_dir", required=True, metavar="DIR", help="where the results go")
    add("--ckpt", default=str(Path(__file__).resolve().parent / CKPT), metavar="FILE",
        help=f"checkpoint of train.py, or a published Lightning one (the project's {CKPT})")
    add("--faces", choices=("largest", "all"), default="largest", help="faces labelled in a picture (%(default)s)")
    add("--flip", action="store_true", help="average each face with its mirror image: slower, a little more accurate")
    doubt = parser.add_mutually_exclusive_group()
    doubt.add_argument("--min_confidence", type=cli.fraction, metavar="P", help=f"below it a face is '{UNCERTAIN}'")
    doubt.add_argument("--target_error", type=cli.fraction, metavar="E",
                       help="share of wrong answers allowed in each predicted class, judged on validation faces")
    add("--alpha", type=cli.fraction, default=0.1, metavar="A",
        help="column `set` misses the true class in this share of the faces of every class (%(default)s)")
    add("--by", metavar="WHAT", help="shares per group too: `folder` (first level; of an absolute path in a list the "
        "folder that holds it), or FILE.csv with the columns file and one more; FILE.csv:COLUMN chooses among several")
    add("--reference", metavar="DIR", help="class folders of labelled pictures like yours, from which shares learn how "
        "the classifier errs; the checkpoint's validation faces then count as ten of each class")
    add("--visualize", action="store_true", help="draw grids of the faces with their predicted labels")
    add("--n_vis_samples_per_pic", type=cli.positive_int, default=40, metavar="N", help="faces a grid (%(default)s)")
    add("--n_vis_rows_per_pic", type=cli.positive_int, default=5, metavar="N", help="rows of a grid (%(default)s)")
    add("--figsize_h", type=cli.positive_float, default=20, metavar="INCH", help="height of a grid (%(default)s)")
    add("--figsize_w", type=cli.positive_float, default=20, metavar="INCH", help="width of a grid (%(default)s)")
    cli.add_labelling_flags(parser)
    cli.add_rerun_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Labels every picture, part by part, and makes the results of the parts."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    rank, world_size, device = init_distributed(args.device)
    checkpoint = read_checkpoint(parser, args)
    reference = read_reference(parser, args, checkpoint)
    run = open_run(parser, args, rank)
    settings = choose_settings(args, run, device)
    predictor, detector = load_networks(checkpoint, settings, args.min_face_size, device)
    started, todo = time.perf_counter(), [run.todo[i] for i in rank_slice(len(run.todo), rank, world_size)]
    label_part(run, todo, predictor, detector, settings, args, show=rank == 0)
    run.photos.close()
    barrier()
    seconds = time.perf_counter() - started
    if args.visualize:
        draw_grids(run, args, checkpoint.spec.classes, rank, world_size)
        barrier()
    if rank == 0:
        merge_run(run, args, checkpoint.spec.classes)
        tally = read_back(parser, args, checkpoint.spec.classes)
        print_summary(tally, count_files(len(run.photos), run.todo), seconds, checkpoint.spec.classes)
        own = label_reference(reference, predictor, detector, settings) if reference else None
        report_shares(tally, checkpoint, own, args)
        shutil.rmtree(run.folder)
    barrier()
    shutdown_distributed()


# ------------------------------------------------------------------------------------------------- before anything runs
def check_flags(parser: cli.Parser, args) -> None:
    """The one-line errors that can be told from the flags and the output folder alone."""
    if not args.input_dir and not args.in_list:
        parser.error("--input_dir or --in_list is needed")
    if args.n_vis_samples_per_pic % args.n_vis_rows_per_pic:
        parser.error(f"--n_vis_rows_per_pic {args.n_vis_rows_per_pic} must divide "
                     f"--n_vis_samples_per_pic {args.n_vis_samples_per_pic}")
    if args.by and args.by != "folder":
        read_groups(parser, args.by)
    if (args.input_dir and not args.in_list
            and Path(args.output_dir).resolve().is_relative_to(Path(args.input_dir[0]).resolve())):
        parser.error("--output_dir lies in --input_dir, where the pictures drawn would count as photographs next time")
    out = args.output_dir = cli.output_folder(parser, "--output_dir", args.output_dir)
    if args.resume:
        exit_if_finished(parser, out / PARTS, out / "predictions.csv")
        return
    grids = [path for path in out.glob("*.jpg") if path.stem.isdecimal()] if args.visualize else []
    cli.refuse_existing(parser, "--output_dir", [out / "predictions.csv", out / "pred_ethnicities.txt",
                                                 out / "shares.json", out / "shares.png", *grids], args.overwrite)


def read_groups(parser: cli.Parser, text: str) -> dict[str, str]:
    """File -> group from the CSV of --by."""
    path, _, column = text.partition(".csv:")
    path += ".csv" if column else ""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            others = [name for name in reader.fieldnames or () if name != "file"]
            column = column or (others[0] if len(others) == 1 else "")
            if column not in others or "file" not in reader.fieldnames:
                parser.error(f"--by {text}: wants the columns file and one more (FILE.csv:COLUMN chooses), "
                             f"has {', '.join(reader.fieldnames or ()) or 'none'}")
            return {row["file"]: row[column] for row in reader}
    except OSError as error:
        parser.error(f"--by {text}: wants `folder` or a CSV that can be read ({error.strerror})")


def read_checkpoint(parser: cli.Parser, args) -> Checkpoint:
    """The checkpoint, with all that the flags ask of it."""
    try:
        checkpoint = load_checkpoint(args.ckpt)
    except CheckpointError as error:
        parser.error(f"--ckpt {args.ckpt}: {error}")
    for flag, value in (("--target_error", args.target_error), ("--reference", args.reference)):
        if value is not None and checkpoint.calibration is None:
            parser.error(f"{flag}: {args.ckpt} is not calibrated (evaluate.py --calibrate does it)")
    return checkpoint


def read_reference(parser: cli.Parser, args, checkpoint: Checkpoint) -> FaceSet | None:
    """The labelled pictures of --reference."""
    if not args.reference:
        return None
    try:
        reference = read_faceset(args.reference, classes=checkpoint.spec.classes)
    except FaceSetError as error:
        parser.error(f"--reference {error}")
    if reference.unmatched:
        parser.error(f"--reference {args.reference}: folder {reference.unmatched[0]} matches no class of the "
                     f"checkpoint ({', '.join(reference.classes)})")
    return reference


# ----------------------------------------------------------------------------------------- a run and its finished parts
@dataclass
class Run:
    """A run whose finished chunks lie in a folder of parts: <chunk>.csv (rows), .txt (lines) and .crops (raw RGB)."""
    folder: Path
    photos: PhotoIndex
    todo: list[int]                 # chunks without a part, when the run was opened


def open_run(parser: cli.Parser, args, rank: int) -> Run:
    """The run of these flags, new or resumed; rank 0 lists the pictures and open chunks for all ranks."""
    folder = args.output_dir / PARTS
    open_parts(parser, folder, run_flags(args), lambda folder: begin(args, folder), rank,
               resume=args.resume, overwrite=args.overwrite)
    photos = PhotoIndex(folder)
    return Run(folder, photos, missing_parts(folder, count_chunks(len(photos)), "csv"))


def begin(args, folder: Path) -> None:
    """Indexes the pictures. Raises PartsError."""
    try:
        index_photos(folder, args.input_dir, args.in_list)
    except InputError as error:
        raise PartsError(f"{'--in_list' if args.in_list else '--input_dir'} {error}") from None


def run_flags(args) -> dict:
    """All that decides what a part holds; a run is resumed with the same only."""
    names = ("input_dir", "in_list", "align", "faces", "min_face_size", "max_side", "flip", "min_confidence",
             "target_error", "alpha", "visualize", "batch_size")
    return {name: getattr(args, name) for name in names} | {"ckpt": zlib.crc32(Path(args.ckpt).read_bytes())}


def choose_settings(args, run: Run, device: torch.device) -> Settings:
    """The flags with what they leave open chosen for this machine and list."""
    workers = decode_workers(args.num_workers, count_files(len(run.photos), run.todo), device)
    return Settings(args.align, args.faces, args.flip, args.batch_size or network_batch(device), workers,
                    args.max_side, args.visualize)


def load_networks(checkpoint: Checkpoint, settings: Settings, min_face_size: float,
                  device: torch.device) -> tuple[Predictor, MTCNN | None]:
    """Classifier and, unless all pictures are finished crops, detector."""
    detector = None if settings.align == "never" else MTCNN(min_face_size=min_face_size).to(device)
    return Predictor(checkpoint, device), detector


# ------------------------------------------------------------------------------------------------------ files to parts
def label_part(run: Run, todo: list[int], predictor: Predictor, detector: MTCNN | None, settings: Settings, args,
               show: bool) -> None:
    """Writes the parts of some chunks, each when it is done."""
    least, least_inside = answer_thresholds(predictor.checkpoint, args)
    names = [label_name(name) for name in predictor.spec.classes]
    with tqdm(total=count_files(len(run.photos), todo), unit=" pictures", disable=not show, smoothing=0.05) as bar:
        for chunk, rows in classify_files(run.photos, predictor, detector, settings, todo) if todo else ():
            labels, sets = decide(rows, names, least, least_inside)
            write_part(run, chunk, rows, labels, sets, len(names), many=args.faces == "all")
            bar.update(count_files(len(run.photos), [chunk]))


def answer_thresholds(checkpoint: Checkpoint, args) -> tuple[torch.Tensor, torch.Tensor]:
    """Least confidence (C,) at which each predicted class is answered; least probability (C,) of each class in a set.

    Without calibration no class is in a set.
    """
    n_classes, calibration = len(checkpoint.spec.classes), checkpoint.calibration
    least = torch.full((n_classes,), args.min_confidence or 0.0)
    if args.target_error is not None:
        least = class_thresholds(calibration, args.target_error)
    return least, set_thresholds(calibration, args.alpha) if calibration else torch.full((n_classes,), torch.inf)


def decide(rows: list[Row], names: list[str], least: torch.Tensor,
           least_inside: torch.Tensor) -> tuple[list[str], list[str]]:
    """Answer and prediction set of every row, both '' where there is no face; the set so too without calibration."""
    probs = [row.probs for row in rows if row.status == "ok"]
    probs = torch.stack(probs) if probs else torch.zeros(0, len(names))
    confidence, predicted = probs.max(1)
    sure = (confidence >= least[predicted]).tolist()
    answers = iter([names[c] if known else UNCERTAIN for c, known in zip(predicted.tolist(), sure, strict=True)])
    sets = iter(["|".join(itertools.compress(names, members)) for members in (probs >= least_inside).tolist()])
    return ([next(answers) if row.status == "ok" else "" for row in rows],
            [next(sets) if row.status == "ok" else "" for row in rows])


def write_part(run: Run, chunk: int, rows: list[Row], labels: list[str], sets: list[str], n_classes: int,
               many: bool) -> None:
    """Writes what a chunk adds to each result, the table's rows last: where they lie, the chunk is done."""
    names = [run.photos.name(row.position) for row in rows]
    lines = [text_line(f"{name}_{row.face}" if many else name, label)
             for name, row, label in zip(names, rows, labels, strict=True) if row.status == "ok"]
    table = [format_row(*cells, n_classes) for cells in zip(names, rows, labels, sets, strict=True)]
    crops = [row.crop.numpy().tobytes() for row in rows if row.crop is not None]
    for kind, content in (("crops", b"".join(crops)), ("txt", encoded(lines)), ("csv", encoded(table))):
        if content or kind == "csv":
            with atomic_write(part_path(run.folder, chunk, kind)) as beside:
                beside.write_bytes(content)


def text_line(name: str, label: str) -> str:
    """A line of pred_ethnicities.txt; line ends in a file name are written \\n and \\r."""
    return "{} {}\n".format(name.replace("\n", "\\n").replace("\r", "\\r"), label)


def encoded(lines: list[str]) -> bytes:
    """Lines as bytes; those of a file name that are no UTF-8 come back as they were."""
    return "".join(lines).encode("utf-8", "surrogateescape")


# ---------------------------------------------------------------------------------------------------- parts to results
def draw_grids(run: Run, args, classes: tuple[str, ...], rank: int, world_size: int) -> None:
    """Grids of the labelled faces, the last with what is left; the ranks take turns, one grid in memory each."""
    shown, count = shown_faces(run, classes), 0
    while faces := list(itertools.islice(shown, args.n_vis_samples_per_pic)):
        if count % world_size == rank:
            draw_grid(faces, args, args.output_dir / f"{count}.jpg")
        count += 1
    if rank == 0 and args.overwrite:
        while (old := args.output_dir / f"{count}.jpg").exists():
            old.unlink()
            count += 1


def shown_faces(run: Run, classes: tuple[str, ...]) -> Iterator[tuple[np.ndarray, str, float]]:
    """Crop (112, 112, 3) uint8, answer and confidence of every face, in the order of the results."""
    for chunk in range(count_chunks(len(run.photos))):
        rows = read_predictions(part_path(run.folder, chunk, "csv"), columns(classes))
        faces = [row for row in rows if row["status"] == "ok"]
        if not faces:
            continue
        with open(part_path(run.folder, chunk, "crops"), "rb") as file:
            for row in faces:
                crop = np.frombuffer(file.read(CROP_BYTES), np.uint8).reshape(3, TEMPLATE_SIZE, TEMPLATE_SIZE)
                yield crop.transpose(1, 2, 0), row["ethnicity"], float(row["confidence"])


def draw_grid(faces: list[tuple[np.ndarray, str, float]], args, path: Path) -> None:
    """One picture of up to n_vis_samples_per_pic crops under their answers and confidences."""
    from matplotlib.figure import Figure  # a second to import, and only grids need it
    figure = Figure(figsize=(args.figsize_w, args.figsize_h), layout="tight")
    n_rows = args.n_vis_rows_per_pic
    panels = figure.subplots(n_rows, args.n_vis_samples_per_pic // n_rows, squeeze=False).flatten()
    for panel in panels:
        panel.axis("off")
    for panel, (crop, label, confidence) in zip(panels, faces, strict=False):
        panel.imshow(crop)
        panel.set_title(f"{label} {confidence:.0%}", parse_math=False)
    with atomic_write(path) as beside:
        figure.savefig(beside, format="jpg")


def merge_run(run: Run, args, classes: tuple[str, ...]) -> None:
    """predictions.csv and pred_ethnicities.txt from the parts, in the order of the list."""
    chunks = range(count_chunks(len(run.photos)))
    lines = [path for path in (part_path(run.folder, chunk, "txt") for chunk in chunks) if path.exists()]
    merge_parts(lines, args.output_dir / "pred_ethnicities.txt")
    head = encoded([",".join(columns(classes)) + "\n"])
    merge_parts([part_path(run.folder, chunk, "csv") for chunk in chunks], args.output_dir / "predictions.csv", head)


@dataclass
class Tally:
    """What the finished predictions.csv holds. probs (n, C) float64 and groups (n,) int32 are those of the n faces."""
    statuses: Counter
    labels: Counter
    probs: np.ndarray
    groups: np.ndarray              # position in group_names, -1 for a file of none
    group_names: list[str]


def folder_of(file: str) -> str:
    """Group of a row of predictions.csv: first folder of a relative path, the whole folder of an absolute one."""
    folder = os.path.dirname(file)
    return folder if os.path.isabs(file) else folder.partition("/")[0] or "."


def read_back(parser: cli.Parser, args, classes: tuple[str, ...]) -> Tally:
    """Counts, and the probabilities of all faces as one array, by one pass over predictions.csv."""
    listed = read_groups(parser, args.by) if args.by and args.by != "folder" else None
    statuses, labels, probs, groups, names = Counter(), Counter(), array("d"), array("i"), {}
    keys = columns(classes)[5:5 + len(classes)]
    for row in read_predictions(args.output_dir / "predictions.csv"):
        statuses[row["status"]] += 1
        if row["status"] != "ok":
            continue
        labels[row["ethnicity"]] += 1
        probs.extend(float(row[key]) for key in keys)
        if args.by:
            group = folder_of(row["file"]) if listed is None else listed.get(row["file"])
            groups.append(-1 if group is None else names.setdefault(group, len(names)))
    return Tally(statuses, labels, np.array(probs).reshape(-1, len(classes)), np.array(groups, np.int32), list(names))


def print_summary(tally: Tally, n_files: int, seconds: float, classes: tuple[str, ...]) -> None:
    """Counts by status and answer, and the rate of this call."""
    rate = f"{n_files:,} pictures in {seconds:.1f} s: {n_files / max(seconds, 1e-9):.1f} images/s"
    answers = [*(label_name(name) for name in classes), *([UNCERTAIN] if tally.labels[UNCERTAIN] else [])]
    print(rate)
    print("rows:             " + ", ".join(f"{name} {tally.statuses[name]:,}" for name in STATUSES))
    print("predicted labels: " + ", ".join(f"{name} {tally.labels[name]:,}" for name in answers))


def label_reference(reference: FaceSet, predictor: Predictor, detector: MTCNN | None,
                    settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (r, C) and labels (r,) of the faces found in the pictures of --reference."""
    settings = replace(settings, align="never" if reference.is_aligned else settings.align, faces="largest", crops=False)
    rows = [row for _, rows in classify_files(reference.paths(), predictor, detector, settings)
            for row in rows if row.status == "ok"]
    probs = np.stack([row.probs.numpy() for row in rows]) if rows else np.zeros((0, len(predictor.spec.classes)))
    return probs, reference.labels.numpy()[[row.position for row in rows]]


def report_shares(tally: Tally, checkpoint: Checkpoint, own: tuple[np.ndarray, np.ndarray] | None, args) -> None:
    """Prints and writes the estimated shares of the classes, of all faces and of each group of --by.

    own: the faces of --reference, whose errors weigh beside those of the checkpoint's validation faces.
    """
    for name in ("shares.json", "shares.png"):
        (args.output_dir / name).unlink(missing_ok=True)
    if reason := no_shares(tally, checkpoint):
        print(f"shares: {reason}")
        return
    if own and not len(own[1]):
        print(f"--reference {args.reference}: no face was found, so the shares rest on validation faces alone")
    known, classes = checkpoint.calibration, checkpoint.spec.classes
    estimate = partial(estimate_shares, val_probs=known.val_probs.numpy(), val_labels=known.val_labels.numpy(),
                       reference=own)
    everyone, groups = estimate(tally.probs), {}
    for i, name in enumerate(tally.group_names):
        if (tally.groups == i).sum() >= FEWEST_FACES:
            groups[name] = estimate(tally.probs[tally.groups == i])
    reports = {"all": everyone} | {f"group {printable(name)}": report for name, report in groups.items()}
    for name, report in reports.items():
        print(f"\n{name}\n{format_shares(report, classes)}" if args.by else f"\n{format_shares(report, classes)}")
    if small := len(tally.group_names) - len(groups):
        print(f"{small} groups with fewer than {FEWEST_FACES} faces have no estimate of their own")
    written = {"classes": classes, "all": everyone} | ({"groups": groups} if args.by else {})
    with atomic_write(args.output_dir / "shares.json") as beside:
        beside.write_text(json.dumps(written, indent=1))
    with atomic_write(args.output_dir / "shares.png") as beside:
        draw_shares(reports, classes, beside)


def printable(name: str) -> str:
    """A name that any output takes: bytes of a file name that are no UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def no_shares(tally: Tally, checkpoint: Checkpoint) -> str:
    """Why no shares can be estimated, or ''."""
    if len(tally.probs) < FEWEST_FACES:
        n = len(tally.probs)
        return f"{n} {'face is' if n == 1 else 'faces are'} too few for an estimate (at least {FEWEST_FACES})"
    if checkpoint.calibration is None:
        return "the checkpoint is not calibrated, so nothing is known of its errors (evaluate.py --calibrate)"
    return ""


if __name__ == "__main__":
    main()
