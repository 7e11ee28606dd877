"""Accuracy and confidence of checkpoints on photographs of other origin, as they are and corrupted.

The largest face of each photograph is detected once, on the original. Each corruption is applied to
the photograph, and the view is rendered by the landmarks of the original. Photographs without a
face are left out. A set without a class of the checkpoint consists of faces of no class: only the
share that is answered `uncertain` at --target_error is of interest.

Reads   --ckpt, --data: folders of class folders, or CSV lists (image, class).
Writes  --out, CSV: a row per checkpoint, set, corruption and class, and one for all classes.

    python benchmarks/domain_shift.py --data ../foreign/mebeauty data/FairFace_val \\
        --class_map East_Asian=Asian,Southeast_Asian=Asian --out visualizations/domain_shift.csv
"""
import argparse
import csv
import io
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.data.decoding import decode_photo
from models.data.faceset import FaceSet, FaceSetError, read_faceset
from models.faces.align import align_faces
from models.faces.calibration import Calibration, class_thresholds, set_thresholds
from models.faces.checkpoint import CheckpointError, load_checkpoint
from models.faces.classifier import FaceSpec
from models.faces.pipeline import FacePolicy, FaceRow, Loading, ViewSpec, align_photos
from models.faces.predictor import Predictor, network_batch_size
from models.faces.second_look import load_detector
from models.reports.metrics import calibration_error, reliability_bins, wilson_interval
from models.running import cli
from models.running.files import atomic_write

NO_CLASS = -1                       # label of faces of no class
SURE = 0.9                          # confidence above which accuracy is reported on its own
COLUMNS = ("checkpoint", "set", "corruption", "class", "n", "accuracy", "low", "high",
           "mean_confidence", "ece", "sure", "accuracy_of_sure", "set_coverage", "set_size",
           "uncertain", "accuracy_of_answered")


def encode(image: Image.Image, file_format: str, **options) -> Image.Image:
    """The picture after lossy compression with 4:2:0."""
    data = io.BytesIO()
    image.save(data, file_format, subsampling="4:2:0", **options)
    return Image.open(data).convert("RGB")


def reduce(image: Image.Image, factor: float) -> Image.Image:
    """The picture reduced by a factor, and enlarged again."""
    size = [max(1, round(side * factor)) for side in image.size]
    return image.resize(size, Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR)


CORRUPTIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "none": lambda image: image,
    "grey": lambda image: image.convert("L").convert("RGB"),
    "jpeg85": lambda image: encode(image, "JPEG", quality=85),
    "jpeg30": lambda image: encode(image, "JPEG", quality=30),
    "avif50": lambda image: encode(image, "AVIF", quality=50),
    "half": lambda image: reduce(image, 0.5),
    "quarter": lambda image: reduce(image, 0.25),
    "mirrored": lambda image: image,            # of the view, in corrupted_views
}


def find_faces(paths: list[str], detector: nn.Module, view: ViewSpec,
               num_workers: int) -> list[FaceRow]:
    """The largest face of each photograph that has one."""
    batches = align_photos(paths, detector, view, FacePolicy("largest", "skip", "always"),
                           Loading(num_workers=num_workers))
    return [row for batch in batches for row in batch.rows]


def corrupted_views(paths: list[str], rows: list[FaceRow], corruption: str,
                    spec: FaceSpec) -> Iterator[Tensor]:
    """The view (1, 3, S, S) uint8 of each face, from its corrupted photograph."""
    for row in rows:
        photo, _ = decode_photo(paths[row.position])
        image = CORRUPTIONS[corruption](Image.fromarray(photo.permute(1, 2, 0).numpy()))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        size = torch.tensor([[image.height, image.width]])
        views = align_faces(pixels, size, torch.zeros(1, dtype=torch.int64), row.landmarks[None],
                            spec.window, spec.input_size, spec.template)
        yield views.flip(3) if corruption == "mirrored" else views


def classify(predictor: Predictor, views: Iterator[Tensor]) -> Tensor:
    """Probabilities (n, C) of single views."""
    stacked = torch.cat(list(views))
    parts = stacked.split(network_batch_size(predictor.device))
    return torch.cat([predictor.probs(part.to(predictor.device)) for part in parts])


def report_classes(probs: Tensor, labels: Tensor, calibration: Calibration,
                   classes: tuple[str, ...], target_error: float) -> Iterator[dict]:
    """Figures in percent of all pictures and of each class, from probs (n, C) and labels (n,)."""
    confidence, predictions = probs.max(1)
    is_right = predictions == labels
    in_set = probs >= set_thresholds(calibration, 0.1)
    is_answered = confidence >= class_thresholds(calibration, target_error)[predictions]
    groups = [("all", torch.ones_like(is_right))]
    groups += [(name, labels == c) for c, name in enumerate(classes)]
    for name, rows in groups:
        n = int(rows.sum())
        if not n:
            continue
        low, high = wilson_interval(int(is_right[rows].sum()), n)
        is_sure = rows & (confidence > SURE)
        _, ece = calibration_error(reliability_bins(confidence[rows], is_right[rows]))
        holds_label = in_set[rows].gather(1, labels[rows, None].clamp(min=0))
        shares = {
            "accuracy": percent(is_right[rows]), "low": 100 * low, "high": 100 * high,
            "mean_confidence": percent(confidence[rows]), "ece": 100 * ece if name == "all" else "",
            "sure": 100 * int(is_sure.sum()) / n, "accuracy_of_sure": percent(is_right[is_sure]),
            "set_coverage": percent(holds_label),
            "set_size": in_set[rows].sum(1).double().mean().item(),
            "uncertain": percent(~is_answered[rows]),
            "accuracy_of_answered": percent(is_right[rows & is_answered])}
        if (labels == NO_CLASS).all():
            shares |= dict.fromkeys(("accuracy", "low", "high", "ece", "accuracy_of_sure",
                                     "set_coverage", "accuracy_of_answered"), "")
        yield {"class": name, "n": n} | {key: value if value == "" else f"{value:.2f}"
                                         for key, value in shares.items()}


def percent(values: Tensor) -> float | str:
    """Mean of values in percent; '' of none."""
    return 100 * values.double().mean().item() if len(values) else ""


def read_set(root: str, class_map: dict[str, str], classes: tuple[str, ...]) -> FaceSet:
    """A labelled set; one that has none of the classes is of no class. Raises FaceSetError."""
    try:
        return read_faceset(root, None, class_map, classes)
    except FaceSetError:
        faces = read_faceset(root)
        return replace(faces, labels=torch.full_like(faces.labels, NO_CLASS))


def measure_set(root: str, faces: FaceSet, predictors: dict[str, Predictor],
                args: argparse.Namespace) -> Iterator[dict]:
    """Rows of the table for one set; prints the accuracy of each."""
    detector, paths = load_detector(args.device, args.min_face_size), faces.paths()
    for name, predictor in predictors.items():
        spec = predictor.spec
        rows = find_faces(paths, detector, ViewSpec.of_checkpoint(spec), args.num_workers)
        labels = faces.labels[[row.position for row in rows]]
        for corruption in args.corruptions:
            probs = classify(predictor, corrupted_views(paths, rows, corruption, spec))
            for figures in report_classes(probs, labels, predictor.checkpoint.calibration,
                                          spec.classes, args.target_error):
                if figures["class"] == "all":
                    print(f"{name} on {root}, {corruption}: n {figures['n']}, accuracy "
                          f"{figures['accuracy'] or '-'}, uncertain {figures['uncertain']} %",
                          flush=True)
                yield {"checkpoint": name, "set": Path(root).name,
                       "corruption": corruption} | figures


def parse_args(argv: list[str] | None = None) -> tuple[cli.Parser, argparse.Namespace]:
    """The flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--ckpt", nargs="+", default=[cli.DEFAULT_CHECKPOINT], metavar="FILE",
                        help="checkpoints with a calibration")
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH",
                        help="folders of class folders, or CSV lists")
    cli.add_class_map(parser)
    parser.add_argument("--corruptions", nargs="+", choices=CORRUPTIONS, metavar="NAME",
                        default=list(CORRUPTIONS), help=f"of {', '.join(CORRUPTIONS)} (all)")
    parser.add_argument("--target_error", type=cli.fraction, default=0.05, metavar="SHARE",
                        help="as for infer.py (%(default)s)")
    parser.add_argument("--min_face_size", type=cli.positive_float, default=20, metavar="PX",
                        help="smallest face that is detected (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="the table")
    cli.add_num_workers(parser, default=0)
    cli.add_device(parser)
    cli.add_overwrite(parser, "replace the table of an earlier run")
    args = parser.parse_args(argv)
    cli.output_folder(parser, "--out", args.out.parent)
    cli.refuse_existing(parser, "--out", [args.out], args.overwrite)
    return parser, args


def main(argv: list[str] | None = None) -> None:
    """Measures every checkpoint on every set, and writes the table."""
    parser, args = parse_args(argv)
    predictors = {}
    for path in args.ckpt:
        try:
            predictors[Path(path).stem] = Predictor(load_checkpoint(path), args.device)
        except CheckpointError as error:
            parser.error(f"--ckpt {path}: {error}")
        if predictors[Path(path).stem].checkpoint.calibration is None:
            parser.error(f"--ckpt {path}: it has no calibration")
    classes = next(iter(predictors.values())).spec.classes
    rows = []
    for root in args.data:
        try:
            faces = read_set(root, args.class_map, classes)
        except FaceSetError as error:
            parser.error(f"--data: {error}")
        rows += measure_set(root, faces, predictors, args)
    with atomic_write(args.out) as temporary_path, open(temporary_path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
