"""Checkpoint + labelled faces -> accuracy with its interval, per-class figures, confusion matrices, calibration.

Reads   --data: a folder that utk_dataset_builder.py made, any folder of class folders, or a CSV list (image, class).
        Finished crops are cut to the checkpoint's window; other pictures are aligned on the fly with infer.py's
        detector and warp, by the central large face of each (infer.py takes the largest).
Writes  <out_dir>/<name>_confusion_matrix.png, <name>_confusion_matrix_percentage.png, <name>_reliability.png,
        <name>_risk_coverage.png, <name>_age_gender.png and <name>_age_gender.csv (where the manifest knows age and
        gender) and <name>_metrics.json with every number drawn. A rerun replaces the files of its --name, and says so
        where they showed something else. <out_dir>/summary.csv has a line for each <name>_metrics.json there: models
        and data sets side by side. --calibrate also writes the calibration into the checkpoint.

    python evaluate.py --data data/utk_published --split test --ckpt checkpoints/resnet18_utk.pt
    python evaluate.py --data data/FairFace_val --name fairface_val --class_map East_Asian=Asian,Southeast_Asian=Asian
    python evaluate.py --data data/utk_races --ckpt checkpoints/mine.pt --calibrate
    python evaluate.py --shares out/predictions.csv --ckpt checkpoints/resnet18_general.pt --out_dir out
"""
import csv
import io
import json
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from models.data.decoding import decode_photo
from models.data.faceset import (
    GENDERS,
    FaceSet,
    FaceSetError,
    faceset_digest,
    read_faceset,
    read_faceset_json,
    read_manifest,
)
from models.faces.align import TEMPLATE, TEMPLATE_SIZE, WHOLE_TEMPLATE, crop_views
from models.faces.calibration import Calibration, class_thresholds, fit_calibration, set_thresholds
from models.faces.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from models.faces.classifier import FaceClassifier
from models.faces.labelled import align_set
from models.faces.mtcnn import MTCNN
from models.faces.predictions import read_predictions
from models.reports.metrics import (
    calibration_error,
    class_figures,
    confusion_matrix,
    ece_interval,
    mcnemar_exact,
    proper_scores,
    reliability_bins,
    risk_coverage,
    wilson_interval,
)
from models.reports.shares import draw_shares, estimate_shares, format_shares
from models.running import cli
from models.running.files import atomic_write

CKPT = "checkpoints/resnet18_utk.pt"            # in the project, wherever the command is run
AGE_BANDS = (0, 10, 20, 30, 40, 60)             # lower ends, years
BEFORE, AFTER = "#999999", "#1f6fb2"


def parse_args(argv: list[str] | None = None):
    """The parser and the checked command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", default="data/utk_races", help="folder of splits or of class folders, or a CSV list (%(default)s)")
    add("--split", help="folder of --data to read, where it has splits (test; val with --calibrate)")
    add("--ckpt", help=f"the classifier: a checkpoint of train.py, or a published Lightning one (the project's {CKPT})")
    add("--out_dir", default="visualizations", help="where figures go (%(default)s)")
    add("--name", help="first part of the figures' names (the split)")
    add("--class_map", type=cli.class_map,
        help="names to read differently, of folders and of the checkpoint's classes: FROM=TO,FROM=TO")
    add("--batch_size", type=cli.positive_int, default=32, help="pictures in one step; on CUDA up to 128 where "
        "fewer are asked for (%(default)s)")
    add("--workers", type=cli.non_negative_int, default=cli.worker_count(), help="decoding processes (%(default)s)")
    cli.add_device(parser)
    add("--flip", action="store_true", help="average the logits of each face and of its mirror image")
    add("--through_112", action="store_true", help="state beside it the accuracy through finished 112 x 112 JPEG crops")
    add("--save_probs", action="store_true", help="also write <name>_probs.npz: files, labels, logits, probs")
    add("--against", metavar="FILE", help="compare with another checkpoint: its <name>_probs.npz for the same pictures "
                                          "(McNemar's exact test)")
    add("--target_error", type=cli.fraction, default=0.05,
        help="state how many pictures stay unanswered where this much error is allowed (%(default)s)")
    add("--alpha", type=cli.fraction, default=0.1, help="error allowed to the prediction sets (%(default)s)")
    add("--calibrate", action="store_true", help="fit the calibration on the validation split, into the checkpoint")
    add("--shares", metavar="FILE", help="instead: group shares of a predictions.csv of infer.py, by the --ckpt that "
                                         "made it; writes shares.json and shares.png")
    args = parser.parse_args(argv)
    args.split = args.split or ("val" if args.calibrate else "test")
    args.name = args.name or args.split
    if args.calibrate and args.split == "test":
        parser.error("--calibrate: fits on validation pictures; --split test is kept for the figures")
    if Path(args.name).name != args.name:
        parser.error(f"--name {args.name}: wants a file name's beginning, not a path")
    if args.shares and not args.ckpt:
        parser.error(f"--shares {args.shares}: wants --ckpt, the checkpoint that made it: each errs in its own way")
    if args.against and Path(args.against).resolve() == (Path(args.out_dir) / f"{args.name}_probs.npz").resolve():
        parser.error(f"--against {args.against}: this report would replace it; another --name keeps both")
    args.ckpt = args.ckpt or str(Path(__file__).resolve().parent / CKPT)
    return parser, args


# ------------------------------------------------------------------------------------------------- pictures to logits
@dataclass
class Answers:
    """What the classifier said of the readable pictures of a set."""
    files: list[str]                # as in the FaceSet
    labels: Tensor                  # (n,) int64
    logits: Tensor                  # (n, C) float32
    probs: Tensor                   # (n, C) float32, by the checkpoint's calibration: the label is their largest
    aligned_by: list[str]           # 'mtcnn', 'template' (no face was found) or 'crop' (came aligned)
    unreadable: list[str]           # 'file: reason' of the others

    def predictions(self) -> Tensor:
        """(n,) int64, the labels that infer.py gives."""
        return self.probs.argmax(1)

    def correct(self) -> Tensor:
        """(n,) bool: the predicted label is the annotators'."""
        return self.predictions() == self.labels


def open_checkpoint(parser: cli.Parser, args) -> Checkpoint:
    """--ckpt, or the one-line error."""
    try:
        return load_checkpoint(args.ckpt)
    except CheckpointError as error:
        parser.error(f"--ckpt {args.ckpt}: {error}")


def open_faceset(parser: cli.Parser, args, classes: tuple[str, ...]) -> FaceSet:
    """The pictures of --data, labelled in the checkpoint's classes; a folder that matches none is an error."""
    try:
        faces = read_faceset(args.data, args.split, args.class_map, classes)
    except (FaceSetError, OSError) as error:
        parser.error(f"--data {args.data}: {error}")
    if faces.unmatched:
        parser.error(f"--data {args.data}: folder {faces.unmatched[0]} matches no class of the checkpoint "
                     f"({', '.join(classes)}); --class_map {faces.unmatched[0]}=CLASS names its class")
    return faces


def report_classes(classes: tuple[str, ...], class_map: dict[str, str] | None) -> tuple[str, ...]:
    """The checkpoint's classes as the report names them: class_map renames those it gives a name that is none of them.

    So Caucasian=White serves a checkpoint of either name on folders of either name. Names that class_map would join
    stay as they are: they are two outputs of the network.
    """
    class_map = class_map or {}
    renamed = tuple(name if class_map.get(name, name) in classes else class_map[name] for name in classes)
    return renamed if len(set(renamed)) == len(renamed) else classes


def has_splits(args) -> bool:
    """Whether --split names a folder of --data."""
    return (Path(args.data) / args.split).is_dir()


def is_another_split(checkpoint: Checkpoint, args) -> bool:
    """Whether --data is a builder's set whose training pictures are not those the checkpoint was trained on."""
    trained_on = checkpoint.metadata.get("train_files")
    if trained_on is None or not read_faceset_json(Path(args.data)) or not (Path(args.data) / "train").is_dir():
        return False
    try:
        train = read_faceset(args.data, "train", args.class_map,
                             report_classes(checkpoint.spec.classes, args.class_map))
    except FaceSetError:                                                    # an empty folder: nothing to compare
        return False
    return faceset_digest(train.files) not in trained_on.values()


@torch.inference_mode()
def classify(faces: FaceSet, checkpoint: Checkpoint, args, through_112: bool = False) -> Answers:
    """Logits of every picture's central large face; `through_112`: by way of a finished 112 x 112 JPEG crop."""
    spec, classifier = checkpoint.spec, checkpoint.classifier(args.device)
    window, side, template = ((WHOLE_TEMPLATE, TEMPLATE_SIZE, TEMPLATE) if through_112
                              else (spec.window, spec.input_size, spec.template))
    logits = torch.full((len(faces), len(spec.classes)), torch.nan)
    aligned_by, unreadable = [""] * len(faces), []
    for batch in align_set(faces.paths(), faces.is_aligned, MTCNN().to(args.device), window, side,
                           template=template, chips=spec.chip_geometry, batch_size=args.batch_size, workers=args.workers,
                           progress=f"{args.name}, 112 px" if through_112 else args.name):
        views = (crop_views(recompress(batch.views), spec.window, spec.input_size, spec.template) if through_112
                 else batch.views)
        logits[batch.positions] = answer(classifier, views.to(args.device), args.flip).cpu()
        for position in batch.positions:
            aligned_by[position] = batch.aligned_by
        unreadable += [f"{faces.files[position]}: {reason}" for position, _, reason in batch.failures]
    rows = [row for row, how in enumerate(aligned_by) if how]
    return Answers([faces.files[row] for row in rows], faces.labels[rows], logits[rows],
                   checkpoint.probs(logits[rows]), [aligned_by[row] for row in rows], unreadable)


def answer(classifier: FaceClassifier, views: Tensor, flip: bool) -> Tensor:
    """Logits (n, C) float32 of views; with `flip` the mean of those of the views and of their mirror images."""
    logits = classifier(views)
    return (logits + classifier(views.flip(-1))) / 2 if flip else logits


def recompress(crops: Tensor) -> Tensor:
    """Crops (n, 3, R, R) uint8 as they come back from JPEG files of quality 95, 4:4:4."""
    decoded = torch.empty_like(crops)
    for row, crop in enumerate(crops):
        file = io.BytesIO()
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95, subsampling=0)
        decoded[row] = decode_photo(file.getvalue())[0]
    return decoded


# ------------------------------------------------------------------------------------------------------- the manifest
def with_manifest(answers: Answers, manifest: dict[str, dict[str, str]]) -> Answers:
    """The same, with the builder's word on which finished crops were aligned without a detected face."""
    if not manifest:
        return answers
    return replace(answers, aligned_by=[manifest[file]["aligned_by"] if how == "crop" else how
                                        for file, how in zip(answers.files, answers.aligned_by, strict=True)])


def without_twin(files: list[str], manifest: dict[str, dict[str, str]]) -> Tensor:
    """(n,) bool: no picture of another split is identical or nearly so; by the manifest's duplicate_group."""
    splits: dict[str, set[str]] = {}
    for row in manifest.values():
        splits.setdefault(row["duplicate_group"], set()).add(row["split"])
    groups = [manifest[file]["duplicate_group"] for file in files]          # '' of a picture that is like no other
    return torch.tensor([not group or len(splits[group]) == 1 for group in groups])


def age_band(age: int) -> str:
    """'20-29' of 25, '60+' of 71."""
    at = sum(age >= low for low in AGE_BANDS) - 1
    return f"{AGE_BANDS[at]}-{AGE_BANDS[at + 1] - 1}" if at + 1 < len(AGE_BANDS) else f"{AGE_BANDS[at]}+"


# ---------------------------------------------------------------------------------------------------------- figures
def figures_of(answers: Answers, rows: Tensor, classes: tuple[str, ...]) -> dict:
    """Accuracy with its 95 % interval, per-class figures, confusion matrix of some pictures: rows (n,) bool."""
    confusion = confusion_matrix(answers.labels[rows], answers.predictions()[rows], len(classes))
    figures = class_figures(confusion)
    figures["per_class"] = dict(zip(classes, figures["per_class"], strict=True))
    interval = wilson_interval(int(confusion.diagonal().sum()), figures["n"])
    return {"accuracy": figures.pop("accuracy"), "accuracy_ci95": list(interval), **figures,
            "confusion_matrix": confusion.tolist()}


def calibration_figures(probs: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict:
    """Calibration errors (15 equal-mass bins), NLL and Brier score, over all and per class, with the bins drawn.

    Over all, the stated confidence is held against being right, `ece_ci95` from a bootstrap. Per class, `ece` holds
    p_class against being of that class, over all pictures; `ece_predicted` the confidence against being right, over
    those predicted so; `nll` and `brier` are means over the pictures of the class.
    """
    confidence, predictions = probs.max(1)
    nll, brier = proper_scores(probs, labels)
    bins = reliability_bins(confidence, predictions == labels)
    figures = dict(zip(("ece", "ece_debiased"), calibration_error(bins), strict=True))
    figures |= {"ece_ci95": list(ece_interval(confidence, predictions == labels)), "nll": nll.mean().item(),
                "brier": brier.mean().item(), "bins": bins.tolist(), "per_class": {}}
    for c, name in enumerate(classes):
        of_class, so_predicted = labels == c, predictions == c
        bins = reliability_bins(probs[:, c], of_class)
        predicted = calibration_error(reliability_bins(confidence[so_predicted], of_class[so_predicted]))
        ece, debiased = calibration_error(bins)
        some = of_class.sum().clamp(min=1)
        figures["per_class"][name] = {
            "ece": ece, "ece_debiased": debiased, "ece_predicted": predicted[0],
            "ece_predicted_debiased": predicted[1], "nll": (nll[of_class].sum() / some).item(),
            "brier": (brier[of_class].sum() / some).item(), "bins": bins.tolist()}
    return figures


def risk_figures(probs: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict:
    """Risk-coverage curves, over all and for the pictures of each class: area, and error at each percent answered."""
    confidence, predictions = probs.max(1)
    curves = {}
    for c, name in enumerate(("all", *classes), start=-1):
        rows = torch.ones_like(labels, dtype=torch.bool) if c < 0 else labels == c
        risk = risk_coverage(confidence[rows], predictions[rows] == labels[rows])
        at = [max(1, round(len(risk) * percent / 100)) - 1 for percent in range(1, 101)] if len(risk) else []
        curves[name] = {"n": len(risk), "area": risk.mean().item() if len(risk) else 0.0, "risk": risk[at].tolist()}
    return curves


def abstention_figures(answers: Answers, calibration: Calibration, classes: tuple[str, ...],
                       args) -> tuple[dict, Tensor]:
    """What the validation's thresholds and prediction sets do here, over all and per class; who is answered (n,) bool.

    A predicted label is answered where its confidence reaches its class's threshold for --target_error. Per class of
    the data set: the share left unanswered, the error of the answered, how often the --alpha set holds the label.
    """
    confidence, predictions = answers.probs.max(1)
    thresholds = class_thresholds(calibration, args.target_error)
    answered = confidence >= thresholds[predictions]
    sets = answers.probs >= set_thresholds(calibration, args.alpha)
    covered = sets.gather(1, answers.labels[:, None]).squeeze(1)
    figures = {"target_error": args.target_error, "alpha": args.alpha, "per_class": {},
               "thresholds": {name: value if value <= 1 else None
                              for name, value in zip(classes, thresholds.tolist(), strict=True)}}
    for c, name in enumerate(("all", *classes), start=-1):
        rows = torch.ones_like(answered) if c < 0 else answers.labels == c
        n, n_answered = int(rows.sum()), int((rows & answered).sum())
        wrong = int((rows & answered & ~answers.correct()).sum())
        row = {"n": n, "abstained": (n - n_answered) / max(n, 1), "error_of_answered": wrong / max(n_answered, 1),
               "set_coverage": int((rows & covered).sum()) / max(n, 1),
               "mean_set_size": sets[rows].sum().item() / max(n, 1)}
        (figures if c < 0 else figures["per_class"].setdefault(name, {})).update(row)
    return figures, answered


def subgroup_figures(answers: Answers, answered: Tensor | None, manifest: dict,
                     classes: tuple[str, ...]) -> list[dict]:
    """A row for each class x age band x gender: n, accuracy, mean confidence less accuracy, share unanswered.

    Intervals are Wilson's; that of the calibration gap takes the mean confidence as given. answered (n,) bool is None
    where the checkpoint holds no calibration, and so nothing to abstain by.
    """
    confidence, correct = answers.probs.max(1).values, answers.correct()
    members: dict[tuple, list[int]] = {}
    for row, (file, label) in enumerate(zip(answers.files, answers.labels.tolist(), strict=True)):
        person = manifest[file]
        key = (label, age_band(int(person["age"])), GENDERS.get(person["gender"], person["gender"]))
        members.setdefault(key, []).append(row)
    table = []
    for (label, band, gender), rows in sorted(members.items()):
        n, right, stated = len(rows), int(correct[rows].sum()), confidence[rows].double().mean().item()
        unanswered = None if answered is None else int((~answered[rows]).sum())
        low, high = wilson_interval(right, n)
        table.append({"class": classes[label], "age_band": band, "gender": gender, "n": n,
                      "accuracy": right / n, "accuracy_ci95": [low, high],
                      "mean_confidence": stated, "calibration_gap": stated - right / n,
                      "calibration_gap_ci95": [stated - high, stated - low],
                      "abstained": None if unanswered is None else unanswered / n,
                      "abstained_ci95": [None] * 2 if unanswered is None else list(wilson_interval(unanswered, n))})
    return table


# ---------------------------------------------------------------------------------------------------------- drawing
def save_figure(figure: Figure, path: Path) -> None:
    """The figure as a file, whole or not at all."""
    with atomic_write(path) as beside:
        figure.savefig(beside, dpi=150)


def draw_confusion(confusion: np.ndarray, classes: tuple[str, ...], title: str, percentage: bool, path: Path) -> None:
    """Confusion matrix (C, C) as counts, or row by row as percentages of the pictures labelled so."""
    share = confusion / confusion.sum(1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(1.6 + 1.15 * len(classes), 1.5 + 1.05 * len(classes)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(confusion.shape):
        text = f"{100 * share[row, column]:.1f} %" if percentage else f"{confusion[row, column]:,}"
        axes.text(column, row, text, ha="center", va="center", fontsize=11,
                  color="white" if share[row, column] > 0.5 else "black")
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), [f"{name}\nn = {n:,}" for name, n in zip(classes, confusion.sum(1),
                                                                                 strict=True)])
    axes.set_xlabel("predicted label")
    axes.set_ylabel("label in the data set")
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def draw_bins(axes: Axes, bins: list, colour: str, label: str) -> None:
    """One curve of a reliability diagram, from reliability_bins."""
    stated, seen, _ = zip(*bins, strict=True) if bins else ((), (), ())
    axes.plot(stated, seen, "o-", color=colour, markersize=3.5, linewidth=1, label=label)


def draw_reliability(calibration: dict, classes: tuple[str, ...], title: str, path: Path) -> None:
    """Stated against observed probability, ECE, NLL and Brier before and after calibration, over all and per class."""
    states = [(state, colour) for state, colour in (("before", BEFORE), ("after", AFTER)) if state in calibration]
    figure = Figure(figsize=(3.1 * (len(classes) + 1), 4.2), layout="constrained")
    panels = figure.subplots(1, len(classes) + 1, sharey=True)
    for axes, name in zip(panels, ("all", *classes), strict=True):
        axes.plot((0, 1), (0, 1), color="black", linewidth=0.6)
        figures = [calibration[state] if name == "all" else calibration[state]["per_class"][name]
                   for state, _ in states]
        for (state, colour), row in zip(states, figures, strict=True):
            draw_bins(axes, row["bins"], colour, state)
        axes.text(0.98, 0.03, score_lines(figures), ha="right", va="bottom", fontsize=8, transform=axes.transAxes)
        axes.set_title("predicted label" if name == "all" else name, fontsize=10)
        axes.set_xlabel("stated confidence" if name == "all" else f"stated p({name})")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
        axes.legend(fontsize=8, loc="upper left", frameon=False)
    panels[0].set_ylabel("observed share")
    figure.suptitle(f"{title}\n15 bins of equal mass; ECE debiased; NLL and Brier of a class over its pictures; "
                    + " → ".join(f"{state} calibration" for state, _ in states), fontsize=10)
    save_figure(figure, path)


def score_lines(figures: list[dict]) -> str:
    """'ECE 3.1 → 0.9 %', NLL and Brier likewise, a line each, from calibration_figures before and after."""
    ece, nll, brier = (" → ".join(f"{scale * row[key]:.{digits}f}" for row in figures)
                       for key, scale, digits in (("ece_debiased", 100, 1), ("nll", 1, 3), ("brier", 1, 3)))
    return f"ECE {ece} %\nNLL {nll}\nBrier {brier}"


def draw_risk(curves: dict, title: str, path: Path) -> None:
    """Error of the answered pictures over the share answered, most confident first, over all and per class."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(range(1, 1 + len(curve["risk"])), [100 * risk for risk in curve["risk"]],
                  color="black" if name == "all" else None, linewidth=2 if name == "all" else 1.2,
                  label=f"{name}: area {100 * curve['area']:.2f} %")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("pictures answered, most confident first (%)")
    axes.set_ylabel("error among the answered (%)")
    axes.grid(alpha=0.3)
    axes.legend(title="label in the data set", fontsize=8)
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


def draw_subgroups(table: list[dict], classes: tuple[str, ...], title: str, path: Path) -> None:
    """Accuracy, calibration gap and share unanswered (a row of panels each) of class x age band, a column a gender."""
    genders = sorted({row["gender"] for row in table}, reverse=True)
    kinds = [("accuracy", "accuracy", "{:.0f} %", {"cmap": "Blues", "vmin": 0.4, "vmax": 1}),
             ("calibration_gap", "mean confidence less accuracy, points", "{:+.0f}",
              {"cmap": "RdBu_r", "vmin": -0.3, "vmax": 0.3}),
             ("abstained", "share unanswered", "{:.0f} %", {"cmap": "Oranges", "vmin": 0, "vmax": 1})]
    kinds = [kind for kind in kinds if table[0][kind[0]] is not None]
    figure = Figure(figsize=(1.2 + 6.2 * len(genders), 0.8 + len(kinds) * (0.8 + 0.75 * len(classes))),
                    layout="constrained")
    panels = figure.subplots(len(kinds), len(genders), squeeze=False)
    for line, (key, what, form, colours) in zip(panels, kinds, strict=True):
        for axes, gender in zip(line, genders, strict=True):
            draw_cells(axes, [row for row in table if row["gender"] == gender], classes, key, form, colours)
            axes.set_title(f"{gender}: {what}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("age in the data set (years)")
    figure.suptitle(f"{title}\nby label, age and gender in the data set: the figure, its 95 % interval, pictures",
                    fontsize=10)
    save_figure(figure, path)


def draw_cells(axes: Axes, rows: list[dict], classes: tuple[str, ...], key: str, form: str, colours: dict) -> None:
    """A grid of class x age band: rows[...][key], a fraction, as a colour and by form, with its interval and n."""
    bands = [age_band(low) for low in AGE_BANDS]
    shown = np.full((len(classes), len(bands)), np.nan)
    image = axes.imshow(shown, aspect="auto", **colours)
    for row in rows:
        at = classes.index(row["class"]), bands.index(row["age_band"])
        shown[at] = row[key]
        red, green, blue, _ = image.to_rgba(row[key])
        low, high = (form.format(100 * end).removesuffix(" %") for end in row[f"{key}_ci95"])
        axes.text(at[1], at[0], f"{form.format(100 * row[key])}\n{low} to {high}\nn = {row['n']}",
                  ha="center", va="center", fontsize=8,
                  color="white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black")
    image.set_data(shown)
    axes.set_xticks(range(len(bands)), bands)
    axes.set_yticks(range(len(classes)), classes)


# ----------------------------------------------------------------------------------------------------------- the report
def calibrate(parser: cli.Parser, answers: Answers, checkpoint: Checkpoint, args) -> Answers:
    """Fits the calibration to validation pictures, into the checkpoint; the answers with the new probabilities.

    A Lightning file stays as it is: NAME_calibrated.pt beside it is the checkpoint with its calibration.
    """
    path = Path(args.ckpt)
    path = path.with_name(f"{path.stem}_calibrated.pt") if checkpoint.is_lightning else path
    try:
        checkpoint.calibration = fit_calibration(answers.logits, answers.labels)
        save_checkpoint(path, checkpoint)
    except (ValueError, OSError) as error:
        parser.error(f"--calibrate: {error}")
    bias = ", ".join(f"{name} {value:+.3f}" for name, value in zip(checkpoint.spec.classes, checkpoint.calibration.bias,
                                                                   strict=True))
    print(f"Calibration on {len(answers.labels)} pictures: temperature {checkpoint.calibration.temperature:.3f}, "
          f"curve {checkpoint.calibration.curve:.3f}, bias {bias}; written to {path}")
    return replace(answers, probs=checkpoint.probs(answers.logits))


def measure(answers: Answers, checkpoint: Checkpoint, classes: tuple[str, ...], manifest: dict, args) -> dict:
    """Every figure of the report, as test_metrics.json holds it."""
    found = torch.tensor([how != "template" for how in answers.aligned_by])
    everyone = torch.ones_like(found)
    figures = {"data": Path(args.data).resolve().name, "split": args.split if has_splits(args) else "",
               "checkpoint": Path(args.ckpt).name, "classes": list(classes), "flip": args.flip,
               **figures_of(answers, everyone, classes), "unreadable": answers.unreadable,
               "with_detected_face": figures_of(answers, found, classes),
               "without_detected_face": figures_of(answers, ~found, classes)}
    if manifest:
        figures["without_twin"] = figures_of(answers, without_twin(answers.files, manifest), classes)
    figures["calibration"] = {"before": calibration_figures(answers.logits.softmax(1), answers.labels, classes)}
    answered = None
    if checkpoint.calibration:
        figures["calibration"]["after"] = calibration_figures(answers.probs, answers.labels, classes)
        figures["abstention"], answered = abstention_figures(answers, checkpoint.calibration, classes, args)
    figures["risk_coverage"] = risk_figures(answers.probs, answers.labels, classes)
    if manifest:
        figures["age_gender"] = subgroup_figures(answers, answered, manifest, classes)
    return figures


def compare_112(answers: Answers, small: Answers, classes: tuple[str, ...]) -> dict:
    """Figures through finished 112 x 112 crops, and the p that they err as often as straight from the source."""
    figures = figures_of(small, torch.ones_like(small.labels, dtype=torch.bool), classes)
    return figures | {"mcnemar_p": mcnemar_exact(answers.correct(), small.correct())}


def read_saved(parser: cli.Parser, path: str) -> dict[str, tuple[int, int]]:
    """Label and prediction of each picture in a file of --save_probs, for --against."""
    try:
        with np.load(path) as saved:
            rows = zip(saved["labels"].tolist(), saved["probs"].argmax(1).tolist(), strict=True)
            return dict(zip(saved["files"].tolist(), rows, strict=True))
    except OSError as error:
        parser.error(f"--against {path}: {error.strerror or error}")
    except (KeyError, ValueError, TypeError, zipfile.BadZipFile):
        parser.error(f"--against {path}: is no file of --save_probs")


def compare_against(answers: Answers, others: dict[str, tuple[int, int]]) -> dict:
    """Accuracy of another checkpoint, and the p that both err as often.

    others: what read_saved found. Raises ValueError where it is of other pictures or labels.
    """
    if {file: label for file, (label, _) in others.items()} != dict(zip(answers.files, answers.labels.tolist(),
                                                                        strict=True)):
        raise ValueError("is of other pictures or labels")
    correct = torch.tensor([others[file][1] for file in answers.files]) == answers.labels
    return {"accuracy": correct.double().mean().item(),
            "right_here_alone": int((answers.correct() & ~correct).sum()),
            "right_there_alone": int((correct & ~answers.correct()).sum()),
            "mcnemar_p": mcnemar_exact(answers.correct(), correct)}


def percent(figures: dict) -> str:
    """'88.26 % (95 % interval 87.28 to 89.18) of 4,404'."""
    low, high = (100 * end for end in figures["accuracy_ci95"])
    return f"{100 * figures['accuracy']:.2f} % (95 % interval {low:.2f} to {high:.2f}) of {figures['n']:,}"


def print_report(figures: dict, set_name: str) -> None:
    """The figures, readable; the first line in the published form."""
    print(f"Accuracy of the model on the {set_name} set: {100 * figures['accuracy']:.3f} %")
    print(f"  all pictures              {percent(figures)}")
    print(f"  with a detected face      {percent(figures['with_detected_face'])}; "
          f"{figures['without_detected_face']['n']:,} aligned by mean landmarks")
    if "without_twin" in figures:
        print(f"  no twin in another split  {percent(figures['without_twin'])}")
    if "through_112" in figures:
        print(f"  through 112 x 112 crops   {percent(figures['through_112'])}; "
              f"McNemar p {figures['through_112']['mcnemar_p']:.3g}")
    if other := figures.get("against"):
        print(f"  the other checkpoint      {100 * other['accuracy']:.2f} %; right here alone "
              f"{other['right_here_alone']}, there alone {other['right_there_alone']}: "
              f"McNemar p {other['mcnemar_p']:.3g}")
    print(f"  balanced accuracy {100 * figures['balanced_accuracy']:.2f} %, macro-F1 {100 * figures['macro_f1']:.2f} %")
    if figures["unreadable"]:
        print(f"  {len(figures['unreadable'])} unreadable, left out; the first: {figures['unreadable'][0]}")
    width = max(map(len, figures["classes"])) + 2
    print(f"\n{'':{width}}precision   recall       F1        n")
    for name, row in figures["per_class"].items():
        cells = "".join(f"{100 * row[key]:7.2f} %" for key in ("precision", "recall", "f1"))
        print(f"{name:{width}}{cells}{row['n']:9,}")
    print_confidence(figures)


def print_confidence(figures: dict) -> None:
    """Calibration before and after; abstention and prediction sets per class, where the checkpoint is calibrated."""
    print()
    for state, scores in figures["calibration"].items():
        per_class = ", ".join(f"{name} {100 * row['ece_debiased']:.1f}" for name, row in scores["per_class"].items())
        print(f"{state:7}calibration: ECE {100 * scores['ece_debiased']:.2f} % ({per_class}), "
              f"NLL {scores['nll']:.4f}, Brier {scores['brier']:.4f}")
    if "abstention" not in figures:
        print("The checkpoint holds no calibration: evaluate.py --calibrate writes one")
        return
    abstention = figures["abstention"]
    print(f"Unanswered where {100 * abstention['target_error']:g} % error is allowed, error of the answered, coverage "
          f"and size of the {100 - 100 * abstention['alpha']:g} % prediction sets:")
    for name, row in (("all", abstention), *abstention["per_class"].items()):
        print(f"  {name:{max(map(len, figures['classes'])) + 2}}{100 * row['abstained']:5.1f} %"
              f"{100 * row['error_of_answered']:8.2f} %{100 * row['set_coverage']:8.1f} %{row['mean_set_size']:8.2f}")


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all."""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_subgroups(table: list[dict], path: Path) -> None:
    """subgroup_figures as a CSV; an interval is two columns, <what>_low and <what>_high."""
    with atomic_write(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        for number, row in enumerate(table):
            cells = {}
            for key, value in row.items():
                what = key.removesuffix("_ci95")
                cells |= {key: value} if what == key else dict(zip((f"{what}_low", f"{what}_high"), value, strict=True))
            if not number:
                writer.writerow(cells)
            writer.writerow([f"{value:.4f}" if isinstance(value, float) else value for value in cells.values()])


@matplotlib.rc_context({"text.parse_math": False})              # a name of a class or folder may hold a $
def write_report(figures: dict, folder: Path, name: str) -> None:
    """All files of the report; says so where they replace figures of another set or checkpoint."""
    path, classes = folder / f"{name}_metrics.json", tuple(figures["classes"])
    low, high = (100 * end for end in figures["accuracy_ci95"])
    title = (f"{figures['data']} {figures['split']}".strip() + f": {figures['n']:,} pictures, "
             f"accuracy {100 * figures['accuracy']:.2f} % ({low:.2f} to {high:.2f})")
    confusion = np.array(figures["confusion_matrix"])
    draw_confusion(confusion, classes, title, False, folder / f"{name}_confusion_matrix.png")
    draw_confusion(confusion, classes, title, True, folder / f"{name}_confusion_matrix_percentage.png")
    draw_reliability(figures["calibration"], classes, title, folder / f"{name}_reliability.png")
    draw_risk(figures["risk_coverage"], title, folder / f"{name}_risk_coverage.png")
    for optional in ("age_gender.png", "age_gender.csv", "probs.npz"):        # an earlier report's are not this one's
        (folder / f"{name}_{optional}").unlink(missing_ok=True)
    if "age_gender" in figures:
        draw_subgroups(figures["age_gender"], classes, title, folder / f"{name}_age_gender.png")
        write_subgroups(figures["age_gender"], folder / f"{name}_age_gender.csv")
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if any(before.get(key) != figures[key] for key in ("data", "split", "checkpoint")):
            print(f"Replaced the {name} figures of {before.get('data')} with {before.get('checkpoint')}; "
                  "--name keeps both")
    write_text(path, json.dumps(figures, indent=1) + "\n")


def write_summary(folder: Path) -> None:
    """summary.csv, and the same on the screen: what each checkpoint reached on each set, of all reports in a folder."""
    rows = []
    for path in sorted(folder.glob("*_metrics.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        if not {"checkpoint", "per_class", "accuracy_ci95"} <= set(figures):         # another program's
            continue
        recall = {name: row["recall"] for name, row in figures["per_class"].items() if row["n"]}
        worst = min(recall, key=recall.get)
        low, high = figures["accuracy_ci95"]
        twinless = figures.get("without_twin", {}).get("accuracy")
        rows.append({"name": path.name.removesuffix("_metrics.json"), "checkpoint": figures["checkpoint"],
                     "data": f"{figures['data']} {figures['split']}".strip(), "n": figures["n"],
                     "accuracy": f"{100 * figures['accuracy']:.2f}", "low": f"{100 * low:.2f}",
                     "high": f"{100 * high:.2f}", "without twin": "" if twinless is None else f"{100 * twinless:.2f}",
                     "worst class": worst, "its recall": f"{100 * recall[worst]:.1f}",
                     "recall gap": f"{100 * (max(recall.values()) - recall[worst]):.1f}"})
    with atomic_write(folder / "summary.csv") as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    width = max(len(f"{row['checkpoint']} on {row['data']}") for row in rows)
    print(f"\nAll reports in {folder} (accuracy and 95 % interval in %, n, worst class and its recall):")
    for row in rows:
        print(f"  {row['checkpoint'] + ' on ' + row['data']:{width}}  {row['accuracy']} ({row['low']} to {row['high']})"
              f"  n {row['n']:,}  {row['worst class']} {row['its recall']}")


def read_probs(path: str, classes: tuple[str, ...]) -> np.ndarray:
    """Probabilities (n, C) of the faces in a predictions.csv of infer.py. Raises ValueError where it is none."""
    try:
        rows = [[row[f"p_{name}"] for name in classes] for row in read_predictions(path) if row["status"] == "ok"]
        return np.array(rows, dtype=np.float64).reshape(len(rows), len(classes))
    except KeyError as error:
        raise ValueError(f"it has no column {error.args[0]}: another checkpoint made it") from None


def report_shares(parser: cli.Parser, args, checkpoint: Checkpoint, folder: Path) -> None:
    """Estimated share of each class among the faces of a predictions.csv, as infer.py prints and writes them."""
    if not checkpoint.calibration:
        parser.error(f"--ckpt {args.ckpt}: holds no calibration, so how it errs is unknown; --calibrate writes one")
    classes, calibration = checkpoint.spec.classes, checkpoint.calibration
    try:
        report = estimate_shares(read_probs(args.shares, classes), calibration.val_probs.numpy(),
                                 calibration.val_labels.numpy())
    except (ValueError, OSError) as error:
        parser.error(f"--shares {args.shares}: {error}")
    print(format_shares(report, classes))
    write_text(folder / "shares.json", json.dumps({"classes": classes, "all": report}, indent=1) + "\n")
    with atomic_write(folder / "shares.png") as beside:
        draw_shares({"all": report}, classes, beside)


def main(argv: list[str] | None = None) -> None:
    """Reads checkpoint and pictures, classifies, reports."""
    parser, args = parse_args(argv)
    checkpoint = open_checkpoint(parser, args)
    classes = report_classes(checkpoint.spec.classes, args.class_map)
    folder = cli.output_folder(parser, "--out_dir", args.out_dir)
    if args.shares:
        report_shares(parser, args, checkpoint, folder)
        return
    faces = open_faceset(parser, args, classes)
    if is_another_split(checkpoint, args):
        what = "the checkpoint was trained on another split; pictures of this one may be among its training pictures"
        if args.calibrate:
            parser.error(f"--calibrate: {what}")
        print(f"warning: {what}")
    others = args.against and read_saved(parser, args.against)
    manifest = read_manifest(args.data, faces.files)
    answers = classify(faces, checkpoint, args)
    if not answers.files:
        parser.error(f"--data {args.data}: not one picture can be read; the first: {answers.unreadable[0]}")
    answers = with_manifest(answers, manifest)
    if args.calibrate:
        answers = calibrate(parser, answers, checkpoint, args)
    figures = measure(answers, checkpoint, classes, manifest, args)
    if args.against:
        try:
            figures["against"] = compare_against(answers, others)
        except ValueError as error:
            parser.error(f"--against {args.against}: {error}")
    if args.through_112:
        figures["through_112"] = compare_112(answers, classify(faces, checkpoint, args, through_112=True), classes)
    print_report(figures, args.split if has_splits(args) else args.name)
    write_report(figures, folder, args.name)
    write_summary(folder)
    if args.save_probs:
        with atomic_write(folder / f"{args.name}_probs.npz") as beside:
            np.savez_compressed(beside, files=np.array(answers.files), labels=answers.labels.numpy(),
                                logits=answers.logits.numpy(), probs=answers.probs.numpy())


if __name__ == "__main__":
    main()
