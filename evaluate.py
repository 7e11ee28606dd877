"""Checkpoint + labelled faces -> accuracy, per-class figures, confusion matrices, calibration.

Measures the network and number format that infer.py runs.

Reads   --data: a folder that utk_dataset_builder.py wrote, a folder of class folders, or a CSV list
        with the columns image and class. Aligned crops are cut to the window of the checkpoint. In
        other pictures the most central large face is detected and aligned as in infer.py, which
        takes the largest face.
Writes  into --output_dir, for each --name:
        <name>_metrics.json                 every figure of the report
        <name>_confusion_matrix.png         counts; <name>_confusion_matrix_percentage.png: shares
        <name>_reliability.png              reliability diagrams, before and after calibration
        <name>_risk_coverage.png            risk-coverage curves
        <name>_age_gender.png and .csv      subgroups, if the manifest has age and gender
        summary.csv                         a row for each <name>_metrics.json of the folder
        A second run replaces the files of the same --name, and prints a note if they showed another
        data set or checkpoint. --calibrate also writes the calibration into the checkpoint.

    python evaluate.py --data data/utk_published --split test --ckpt checkpoints/resnet18_utk.pt
    python evaluate.py --data data/FairFace_val --name fairface_val \\
        --class_map East_Asian=Asian,Southeast_Asian=Asian
    python evaluate.py --data data/utk_races --ckpt checkpoints/mine.pt --calibrate
    python evaluate.py --shares out/predictions.csv --ckpt checkpoints/resnet18_general.pt
"""
import argparse
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from models.data.decoding import decode_photo
from models.data.faceset import (
    FaceSet,
    FaceSetError,
    faceset_digest,
    read_faceset,
    read_faceset_json,
    read_manifest,
)
from models.faces.align import TEMPLATE, TEMPLATE_SIZE, WHOLE_TEMPLATE, crop_views
from models.faces.calibration import fit_calibration
from models.faces.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from models.faces.pipeline import (
    Classification,
    FacePolicy,
    FaceRow,
    Loading,
    ViewSpec,
    classify_photos,
    decode_workers,
)
from models.faces.predictor import Predictor, network_batch_size
from models.faces.second_look import load_detector
from models.reports.evaluation import (
    LabelledPredictions,
    compare_checkpoints,
    compare_resolution,
    measure,
    with_manifest,
)
from models.reports.plots import draw_confusion, draw_reliability, draw_risk, draw_subgroups
from models.reports.shares import report_shares
from models.reports.tables import (
    print_report,
    read_saved_predictions,
    save_predictions,
    write_json,
    write_subgroups,
    write_summary,
)
from models.reports.tally import tally_predictions
from models.running import cli
from models.running.command import run_command

OTHER_SPLIT = ("the checkpoint was trained on another split, so this split may contain training "
               "pictures")


def parse_args(argv: list[str] | None = None) -> tuple[cli.Parser, argparse.Namespace]:
    """The parser and the checked command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_data(parser, "folder of splits or of class folders, or a CSV list")
    add("--split", help="split of --data, if it has splits (test; val with --calibrate)")
    cli.add_ckpt(parser, default=None, help="checkpoint of train.py, or a published Lightning "
                 f"checkpoint (default: {cli.CHECKPOINT_NAME} of this repository)")
    cli.add_output_dir(parser, "folder for the report", default="out/evaluation")
    add("--name", help="prefix of the file names (the split)")
    cli.add_class_map(parser)
    cli.add_batch_size(parser, "views per forward pass of the classifier (CPU 16, CUDA 256)")
    cli.add_second_look(parser)
    cli.add_num_workers(parser, "number of decoding processes (CPU 0, CUDA by number of cores)")
    cli.add_device(parser)
    add("--flip", action="store_true",
        help="test-time augmentation: average the logits of each face and of its mirror image")
    add("--through_112", action="store_true",
        help="also report the accuracy through 112 x 112 JPEG crops")
    add("--save_probs", action="store_true",
        help="also write <name>_probs.npz: files, labels, logits, probs")
    add("--against", metavar="FILE", help="compare with another checkpoint by McNemar's exact "
        "test: its <name>_probs.npz for the same pictures")
    add("--target_error", type=cli.fraction, default=0.05, metavar="E",
        help="error rate allowed in selective prediction (%(default)s)")
    add("--alpha", type=cli.fraction, default=0.1, metavar="A",
        help="error rate allowed to the prediction sets (%(default)s)")
    add("--calibrate", action="store_true",
        help="fit the calibration on the validation split and write it into the checkpoint")
    add("--shares", metavar="FILE", help="instead estimate group shares from a predictions.csv of "
        "infer.py, which the --ckpt made; writes shares.json and shares.png")
    args = parser.parse_args(argv)
    args.split = args.split or ("val" if args.calibrate else "test")
    args.name = args.name or args.split
    check_args(parser, args)
    args.ckpt = args.ckpt or cli.DEFAULT_CHECKPOINT
    return parser, args


def check_args(parser: cli.Parser, args: argparse.Namespace) -> None:
    """One-line errors for flags that contradict each other."""
    if args.calibrate and args.ckpt == cli.DEFAULT_CHECKPOINT:
        parser.error("--calibrate expects --ckpt: it would change the shipped checkpoint")
    if args.calibrate and args.split == "test":
        parser.error("--calibrate expects validation pictures; --split test is for the report")
    if Path(args.name).name != args.name:
        parser.error(f"--name {args.name}: expects a prefix of file names, not a path")
    if args.shares and not args.ckpt:
        parser.error(f"--shares {args.shares}: expects --ckpt, the checkpoint that made the file")
    if args.against:
        own = Path(args.output_dir) / f"{args.name}_probs.npz"
        if Path(args.against).resolve() == own.resolve():
            parser.error(f"--against {args.against}: this run would replace the file; choose "
                         "another --name")


def main(argv: list[str] | None = None) -> None:
    """Reads the checkpoint and the pictures, classifies them and reports."""
    parser, args = parse_args(argv)
    checkpoint = open_checkpoint(parser, args.ckpt)
    classes = report_classes(checkpoint.spec.classes, args.class_map)
    output_dir = cli.output_folder(parser, "--output_dir", args.output_dir)
    if args.shares:
        report_table_shares(parser, args, checkpoint, output_dir)
        return
    faces = open_faceset(parser, args.data, args.split, args.class_map, classes)
    if is_other_split(checkpoint, args.data, args.class_map):
        if args.calibrate:
            parser.error(f"--calibrate: {OTHER_SPLIT}")
        print(f"warning: {OTHER_SPLIT}")
    saved = read_against(parser, args.against) if args.against else None
    manifest = read_manifest(args.data, faces.files)
    classifier = choose_classifier(args, checkpoint, len(faces))
    predictions = classify(faces, classifier, args.name)
    if not predictions.files:
        parser.error(f"--data {args.data}: no picture can be read; the first: "
                     f"{predictions.unreadable[0]}")
    predictions = with_manifest(predictions, manifest)
    if args.calibrate:
        calibrate(parser, checkpoint, predictions, Path(args.ckpt))
        predictions = replace(predictions, probs=checkpoint.probs(predictions.logits))
    figures = describe_run(args, classes) | measure(
        predictions, checkpoint.calibration, classes, manifest, args.target_error, args.alpha)
    if saved is not None:
        figures["against"] = compare_saved(parser, args.against, predictions, saved)
    if args.through_112:
        small = classify(faces, classifier, f"{args.name}, 112 px", through_112=True)
        figures["through_112"] = compare_resolution(predictions, small, classes)
    print_report(figures, figures["split"] or args.name)
    write_report(figures, output_dir, args.name)
    write_summary(output_dir)
    if args.save_probs:
        save_predictions(output_dir / f"{args.name}_probs.npz", predictions)


# ------------------------------------------------------------------------------------- inputs
def open_checkpoint(parser: cli.Parser, path: str) -> Checkpoint:
    """The checkpoint of --ckpt, or the one-line error."""
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        parser.error(f"--ckpt {path}: {error}")


def open_faceset(parser: cli.Parser, data: str, split: str, class_map: dict[str, str],
                 classes: tuple[str, ...]) -> FaceSet:
    """The pictures of --data with labels among `classes`, or the one-line error.

    A class folder that is not among `classes` is an error.
    """
    try:
        faces = read_faceset(data, split, class_map, classes)
    except (FaceSetError, OSError) as error:
        parser.error(f"--data {data}: {error}")
    if faces.unmatched:
        folder = faces.unmatched[0]
        parser.error(f"--data {data}: folder {folder} matches no class of the checkpoint "
                     f"({', '.join(classes)}); --class_map {folder}=CLASS names its class")
    return faces


def report_classes(classes: tuple[str, ...],
                   class_map: dict[str, str] | None) -> tuple[str, ...]:
    """The checkpoint's classes under the names of the report, in the same order.

    class_map renames a class if the new name is not another class of the checkpoint, so that
    Caucasian=White works for checkpoints and folders with either name. Names that class_map would
    merge stay as they are, because they are two outputs of the network.
    """
    class_map = class_map or {}
    renamed = tuple(name if class_map.get(name, name) in classes else class_map[name]
                    for name in classes)
    return renamed if len(set(renamed)) == len(renamed) else classes


def is_other_split(checkpoint: Checkpoint, data: str, class_map: dict[str, str]) -> bool:
    """Whether the training pictures of --data differ from those the checkpoint was trained on.

    False if that is unknown: for a checkpoint without a record of them, or a set not built by
    utk_dataset_builder.py.
    """
    trained_on = checkpoint.metadata.get("train_files")
    root = Path(data)
    if trained_on is None or not read_faceset_json(root) or not (root / "train").is_dir():
        return False
    classes = report_classes(checkpoint.spec.classes, class_map)
    try:
        train = read_faceset(data, "train", class_map, classes)
    except FaceSetError:                                # an empty folder: nothing to compare
        return False
    return faceset_digest(train.files) not in trained_on.values()


def read_against(parser: cli.Parser, path: str) -> dict[str, tuple[int, int]]:
    """Label and predicted label by file from --against, or the one-line error."""
    try:
        return read_saved_predictions(path)
    except OSError as error:
        parser.error(f"--against {path}: {error.strerror or error}")
    except ValueError as error:
        parser.error(f"--against {path}: {error}")


# --------------------------------------------------------------------------- pictures to logits
@dataclass(frozen=True)
class Classifier:
    """Networks and settings, as in infer.py."""
    predictor: Predictor
    detector: nn.Module
    loading: Loading
    batch_size: int
    flip: bool


def choose_classifier(args: argparse.Namespace, checkpoint: Checkpoint, n_files: int) -> Classifier:
    """The networks and settings of the flags; what they leave open is chosen for the machine."""
    return Classifier(
        Predictor(checkpoint, args.device),
        load_detector(args.device, second_look=args.second_look),
        Loading(num_workers=decode_workers(args.num_workers, n_files, args.device)),
        args.batch_size or network_batch_size(args.device), args.flip)


def classify(faces: FaceSet, classifier: Classifier, progress: str,
             through_112: bool = False) -> LabelledPredictions:
    """Predictions for the most central large face of every picture.

    A picture without a detected face is aligned by the mean landmarks of the others. through_112:
    the views come from 112 x 112 JPEG crops instead of the pictures.
    """
    spec, checkpoint = classifier.predictor.spec, classifier.predictor.checkpoint
    policy = FacePolicy("central", "mean_landmarks", "never" if faces.is_aligned else "auto")
    view, transform = ViewSpec.of_checkpoint(spec), None
    if through_112:
        view = replace(view, window=WHOLE_TEMPLATE, size=TEMPLATE_SIZE, template=TEMPLATE)

        def transform(crops: Tensor) -> Tensor:
            views = recompress(crops.cpu())
            views = crop_views(views, spec.window, spec.input_size, spec.template)
            return views.to(crops.device)

    if faces.is_aligned:
        view = replace(view, chips=None)
    rows = []
    with tqdm(total=len(faces), desc=progress, unit=" pictures", smoothing=0.05) as bar:
        for _, chunk_rows in classify_photos(
                faces.paths(), classifier.predictor, classifier.detector, policy,
                classifier.loading,
                Classification(classifier.batch_size, classifier.flip, transform), view=view):
            rows += chunk_rows
            bar.update(len(chunk_rows))
    return label_predictions(faces, rows, checkpoint)


def label_predictions(faces: FaceSet, rows: list[FaceRow],
                      checkpoint: Checkpoint) -> LabelledPredictions:
    """The rows of a labelled set as tensors, in the order of the set."""
    rows = sorted(rows, key=lambda row: row.position)
    unreadable = [f"{faces.files[row.position]}: {row.error}" for row in rows if row.status != "ok"]
    rows = [row for row in rows if row.status == "ok"]
    positions = [row.position for row in rows]
    logits = torch.zeros(len(rows), len(checkpoint.spec.classes))
    for i, row in enumerate(rows):
        logits[i] = row.logits
    return LabelledPredictions([faces.files[position] for position in positions],
                               faces.labels[positions], logits, checkpoint.probs(logits),
                               [row.aligned_by for row in rows], unreadable)


def recompress(crops: Tensor) -> Tensor:
    """Crops (n, 3, R, R) uint8, written as JPEG of quality 95 (4:4:4) and decoded again."""
    decoded = torch.empty_like(crops)
    for i, crop in enumerate(crops):
        file = io.BytesIO()
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95, subsampling=0)
        decoded[i] = decode_photo(file.getvalue())[0]
    return decoded


# ---------------------------------------------------------------------------------- the report
def calibrate(parser: cli.Parser, checkpoint: Checkpoint, predictions: LabelledPredictions,
              path: Path) -> None:
    """Fits the calibration to validation pictures and saves the checkpoint with it.

    A Lightning file stays as it is; NAME_calibrated.pt in the same folder is written instead.
    """
    path = path.with_name(f"{path.stem}_calibrated.pt") if checkpoint.is_lightning else path
    try:
        calibration = fit_calibration(predictions.logits, predictions.labels)
        checkpoint.calibration = calibration
        save_checkpoint(path, checkpoint)
    except (ValueError, OSError) as error:
        parser.error(f"--calibrate: {error}")
    bias = ", ".join(f"{name} {value:+.3f}" for name, value
                     in zip(checkpoint.spec.classes, calibration.bias, strict=True))
    print(f"Calibration on {len(predictions.labels)} pictures: temperature "
          f"{calibration.temperature:.3f}, curve {calibration.curve:.3f}, bias {bias}; written to "
          f"{path}")


def describe_run(args: argparse.Namespace, classes: tuple[str, ...]) -> dict:
    """What was measured: data set, split ('' if it has no splits), checkpoint, classes, flip."""
    split = args.split if (Path(args.data) / args.split).is_dir() else ""
    return {"data": Path(args.data).resolve().name, "split": split,
            "checkpoint": Path(args.ckpt).name, "classes": list(classes), "flip": args.flip}


def compare_saved(parser: cli.Parser, path: str, predictions: LabelledPredictions,
                  saved: dict[str, tuple[int, int]]) -> dict:
    """Comparison with the checkpoint of --against, or the one-line error."""
    try:
        return compare_checkpoints(predictions, saved)
    except ValueError as error:
        parser.error(f"--against {path}: {error}")


def write_report(figures: dict, folder: Path, name: str) -> None:
    """All files of the report; prints a note if they replace those of other data."""
    path, classes = folder / f"{name}_metrics.json", tuple(figures["classes"])
    low, high = (100 * end for end in figures["accuracy_ci95"])
    title = (f"{figures['data']} {figures['split']}".strip() + f": {figures['n']:,} pictures, "
             f"accuracy {100 * figures['accuracy']:.2f} % ({low:.2f} to {high:.2f})")
    confusion = np.array(figures["confusion_matrix"])
    draw_confusion(confusion, classes, title, False, folder / f"{name}_confusion_matrix.png")
    draw_confusion(confusion, classes, title, True,
                   folder / f"{name}_confusion_matrix_percentage.png")
    draw_reliability(figures["calibration"], classes, title, folder / f"{name}_reliability.png")
    draw_risk(figures["risk_coverage"], title, folder / f"{name}_risk_coverage.png")
    for suffix in ("age_gender.png", "age_gender.csv", "probs.npz"):    # of an earlier report
        (folder / f"{name}_{suffix}").unlink(missing_ok=True)
    if "age_gender" in figures:
        draw_subgroups(figures["age_gender"], classes, title, folder / f"{name}_age_gender.png")
        write_subgroups(figures["age_gender"], folder / f"{name}_age_gender.csv")
    if path.is_file():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if any(earlier.get(key) != figures[key] for key in ("data", "split", "checkpoint")):
            print(f"Replaced the {name} figures of {earlier.get('data')} with "
                  f"{earlier.get('checkpoint')}; another --name keeps both")
    write_json(path, figures)


def report_table_shares(parser: cli.Parser, args: argparse.Namespace, checkpoint: Checkpoint,
                        output_dir: Path) -> None:
    """Group shares of the faces in a predictions.csv, as infer.py reports them."""
    if not checkpoint.calibration:
        parser.error(f"--ckpt {args.ckpt}: has no calibration, so its error rates are unknown; "
                     "--calibrate fits one")
    classes = checkpoint.spec.classes
    try:
        tally = tally_predictions(Path(args.shares), classes)
        report_shares(tally, checkpoint.calibration, classes, output_dir)
    except KeyError as error:                           # of a row of the table
        parser.error(f"--shares {args.shares}: no column {error}; another checkpoint made it")
    except (ValueError, OSError) as error:
        parser.error(f"--shares {args.shares}: {error}")


if __name__ == "__main__":
    run_command(main, "run the command again")
