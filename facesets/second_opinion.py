"""Labelled faces -> what another classifier, which has not seen it, says of each: a table for train.py --teacher.

    python facesets/second_opinion.py --data data/utk_published data/FairFace_train \\
        --class_map East_Asian=Asian,Southeast_Asian=Asian --out data/second_opinion.csv

Reads the sets that train.py is to be given, with the same flags: what it will validate on is left out. Their training
pictures are aligned and described by the 128 numbers by which dlib's network tells persons apart. Set by set, a support
vector machine with a Gaussian kernel learns the labels of four fifths of the pictures, and says its probabilities of
the last fifth; pictures of one person's folder, or (nearly) identical ones, stay in one fifth. It errs on other faces
than a network that learnt the labels, and contradicts wrong ones.
Needs dlib and its weights, for this alone: pip install dlib face_recognition_models
Writes --out, CSV: image (relative to it), label, p_<class>..., error: an unreadable picture's reason.
"""
import csv
import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from models.data.faceset import FaceSet, FaceSetError
from models.data.splits import leakage_groups, read_training_sets
from models.faces.labelled import align_set
from models.faces.mtcnn import MTCNN
from models.running import cli
from models.running.files import atomic_write

FOLDS = 5
CHIP_WINDOW = (6.8, 20.5, 107.4, 121.1)     # of the template: what dlib's get_face_chip shows at its padding of 0.25
CHIP_SIDE = 150                             # pixels, the only input that dlib's network takes
WEIGHTS = "dlib_face_recognition_resnet_model_v1.dat"
# Chosen on UTKFace's validation pictures, 92.0 %; half or twice of either changes that by 0.2.
PENALTY, KERNEL_WIDTH = 1.5, 1 / 128


def load_describer(parser: cli.Parser):
    """dlib's network, with the weights of the package face_recognition_models; without them the run ends."""
    package = importlib.util.find_spec("face_recognition_models")       # importing it wants setuptools
    weights = Path(package.origin).parent / "models" / WEIGHTS if package else Path(WEIGHTS)
    if not weights.is_file() or not importlib.util.find_spec("dlib"):
        parser.error("dlib or its weights are missing: pip install dlib face_recognition_models")
    import dlib
    return dlib.face_recognition_model_v1(str(weights))


def number_groups(faces: FaceSet, workers: int) -> np.ndarray:
    """Group (N,) int64 of each picture: those of one group must not be learnt from to judge each other.

    Raises FaceSetError where a class has fewer groups than there are folds, or is the only one.
    """
    groups = np.empty(len(faces), np.int64)
    for number, rows in enumerate(leakage_groups(faces, workers).values()):
        groups[rows] = number
    labels = faces.labels.numpy()
    counts = {name: len(set(groups[labels == c].tolist())) for c, name in enumerate(faces.classes) if c in labels}
    fewest = min(counts, key=counts.get)
    if counts[fewest] < FOLDS or len(counts) == 1:
        raise FaceSetError(f"{faces.root}: {counts[fewest]} persons or photographs of class {fewest}, {len(counts)} "
                           f"classes; wanted are {FOLDS} of each of two classes at least")
    return groups


def describe(faces: FaceSet, describer, args) -> tuple[np.ndarray, dict[int, str]]:
    """The pictures' 128 numbers (N, 128) float64, and the reason why by row of those that cannot be read."""
    numbers, reasons = np.full((len(faces), 128), np.nan), {}
    for batch in align_set(faces.paths(), faces.is_aligned, MTCNN(min_face_size=40), CHIP_WINDOW, CHIP_SIDE,
                           workers=args.workers, progress=f"describing {faces.root}"):
        reasons |= {row: f"{status}: {reason}" for row, status, reason in batch.failures}
        if batch.positions:
            chips = list(batch.views.permute(0, 2, 3, 1).contiguous().numpy())
            numbers[batch.positions] = describer.compute_face_descriptor(chips, 0)
    return numbers, reasons


def unseen_probabilities(numbers: np.ndarray, labels: np.ndarray, groups: np.ndarray, n_classes: int,
                         seed: int) -> np.ndarray:
    """Probabilities (n, n_classes) float64 by machines that learnt from other groups' numbers (n, d) and labels (n,).

    A multinomial regression turns a machine's distances into probabilities; it is fitted to the other folds too.
    Classes that the set has not get 0.
    """
    folds = list(StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed).split(numbers, labels, groups))
    machine = make_pipeline(StandardScaler(), SVC(C=PENALTY, gamma=KERNEL_WIDTH))
    distances = cross_val_predict(machine, numbers, labels, cv=folds, method="decision_function")
    probs = np.zeros((len(labels), n_classes))
    probs[:, np.unique(labels)] = cross_val_predict(LogisticRegression(), distances.reshape(len(labels), -1), labels,
                                                    cv=folds, method="predict_proba")
    return probs


def table_rows(faces: FaceSet, groups: np.ndarray, describer, folder: Path, args) -> list[list[str]]:
    """A set's rows of the table, relative to its folder; prints how often the machines say what the label says."""
    numbers, reasons = describe(faces, describer, args)
    labels, n_classes = faces.labels.numpy(), len(faces.classes)
    read = np.array([row not in reasons for row in range(len(faces))])
    probs = unseen_probabilities(numbers[read], labels[read], groups[read], n_classes, args.seed)
    same = np.mean(probs.argmax(1) == labels[read])
    print(f"{faces.root}: {100 * same:.2f} % of {read.sum()} pictures labelled as they are; {len(reasons)} unreadable")
    cells = np.full((len(faces), n_classes), "", dtype=object)
    cells[read] = [[f"{p:.6f}" for p in its] for its in probs]
    return [[Path(os.path.relpath(path, folder)).as_posix(), faces.classes[label], *its, reasons.get(row, "")]
            for row, (path, label, its) in enumerate(zip(faces.paths(), labels, cells, strict=True))]


def parse_args(argv: list[str] | None = None):
    """Every default, and the mistakes that can be told before anything slow starts."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["data/utk_races"], help="folders or CSV lists, as for train.py")
    add("--class_map", type=cli.class_map, default={}, metavar="FROM=TO,...", help="rename classes")
    add("--out", type=Path, required=True, metavar="FILE.csv", help="the table")
    add("--val_share", type=cli.fraction, default=0.06, help="as for train.py (%(default)s)")
    add("--seed", type=cli.non_negative_int, default=2023, help="as for train.py (%(default)s)")
    add("--workers", type=cli.non_negative_int, default=cli.worker_count(), help="decoding processes")
    add("--overwrite", action="store_true", help="replace the table of an earlier run")
    args = parser.parse_args(argv)
    if args.out.suffix != ".csv" or args.out.is_dir():
        parser.error(f"--out {args.out}: wants a file name that ends with .csv")
    if args.out.resolve() in [Path(root).resolve() for root in args.data]:
        parser.error(f"--out {args.out}: it would replace --data")
    cli.output_folder(parser, "--out", args.out.parent)
    cli.refuse_existing(parser, "--out", [args.out], args.overwrite)
    args.parser, args.rank = parser, 0
    return args


def main(argv: list[str] | None = None) -> None:
    """Describes, learns and asks, set by set, and writes the table."""
    args = parse_args(argv)
    describer = load_describer(args.parser)
    try:
        sets, _ = read_training_sets(args)
        groups = [number_groups(faces, args.workers) for faces in sets]
    except FaceSetError as error:
        args.parser.error(f"--data: {error}")
    rows = [["image", "label", *(f"p_{name}" for name in sets[0].classes), "error"]]
    for faces, its in zip(sets, groups, strict=True):
        rows += table_rows(faces, its, describer, args.out.parent, args)
    with atomic_write(args.out) as beside, open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
