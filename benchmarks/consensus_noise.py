"""Label noise that the consensus of a person's photos removes, by the correlation of the errors.

A first classifier labels the training photos of a labelled set. The photos are dealt into synthetic
people of one class each, the rule of facesets/consensus.py decides who is kept, and every photo of
a kept person gets the person's label. For each number of photos per person and each threshold the
table has the share of wrong labels before and after, the people kept, and the validation accuracy
of a classifier trained on the labels kept. That classifier is the first one's backbone with a new
last layer, which takes seconds to train. The backbone has learned from true labels, so label noise
costs it less than it would cost a network trained from the start.

The errors on the photos of a synthetic person are independent, or have the correlation of
--correlation. The correlation of real people is estimated from --people, a predictions.csv of
infer.py over a folder with a folder for each person. The votes of a person of class c are modelled
as Dirichlet-multinomial, with the mean of the class and one correlation for all classes (0:
independent photos; 1: all photos of a person get one label). Class shares, means and correlation
are fitted together by maximum likelihood. The true class of these people is unknown: a person whose
photos are all misclassified alike counts as a person of the other class, so the estimate is a lower
bound.

    python infer.py --ckpt checkpoints/stage1.pt --input_dir people --output_dir out/people
    python benchmarks/consensus_noise.py --data data/utk_published --ckpt checkpoints/stage1.pt \\
        --people out/people/predictions.csv

Reads   --data, a set with train and val folders; --ckpt; --people.
Writes  <output_dir>/consensus_noise.csv, a row for each rule, and consensus_noise.png.
"""
import csv
import sys
from argparse import Namespace
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluate import open_checkpoint, open_faceset
from models.data.faceset import FaceSet
from models.faces.checkpoint import Checkpoint
from models.faces.mtcnn import MTCNN
from models.faces.pipeline import ViewSpec, align_labelled_set
from models.faces.predictions import label_name, read_predictions
from models.reports.votes import ConsensusRule, VoteTable, apply_rule
from models.running import cli
from models.running.files import atomic_write

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PER_PERSON = (3, 5, 10, 20)
COLUMNS = ("correlation", "dealt_correlation", "images_per_person", "threshold", "people",
           "kept_people", "kept_least_of_a_class", "error_before", "error_after", "accuracy")
DEALT_SHARE = 0.5       # of the photos; with all dealt, the last people would get what is left over
MIN_CLASS_MEAN = 1e-3   # of a class in a person's votes: keeps the likelihood finite


def parse_args(argv: list[str] | None = None) -> tuple[cli.Parser, Namespace]:
    """The parser and the checked command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_ckpt(parser, help="the first classifier")
    cli.add_data(parser, "labelled set that the first classifier was not trained on")
    cli.add_class_map(parser)
    add("--people", metavar="FILE",
        help="predictions.csv of real people, whose correlation is estimated")
    add("--correlation", type=cli.fraction, nargs="+", default=[],
        help="further correlations of the errors on a person's photos")
    add("--per_person", type=cli.positive_int, nargs="+", default=list(PER_PERSON),
        help="photos per person")
    add("--thresholds", type=cli.fraction, nargs="+", default=list(THRESHOLDS),
        help="thresholds of the rule")
    cli.add_num_workers(parser, default=cli.worker_count())
    cli.add_seed(parser, 0, "seed of the synthetic people")
    cli.add_output_dir(parser, "folder for the table and the figure", "visualizations")
    cli.add_device(parser)
    args = parser.parse_args(argv)
    if args.correlation and max(args.correlation) == 1:
        parser.error("--correlation 1: all photos of a person would be the same photo")
    if min(args.per_person) < 2:
        parser.error("--per_person 1: the vote of one photo is always unanimous")
    return parser, args


# ----------------------------------------------------------- correlation of a person's predictions
def read_votes(path: str, classes: tuple[str, ...]) -> np.ndarray:
    """Votes (P, C) int64 of the people of a predictions.csv.

    A photo votes by its largest face. A person is the first folder of the file name.
    """
    class_index = {label_name(name): i for i, name in enumerate(classes)}
    votes = defaultdict(lambda: np.zeros(len(classes), np.int64))
    for row in read_predictions(path):
        person, slash, _ = row["file"].partition("/")
        is_largest_face = row["status"] == "ok" and row["face"] == "0"
        if slash and is_largest_face and row["ethnicity"] in class_index:
            votes[person][class_index[row["ethnicity"]]] += 1
    if not votes:
        raise ValueError("no labelled file lies in a person's folder, or its labels are not "
                         f"{', '.join(classes)}")
    return np.stack([votes[person] for person in sorted(votes)])


def vote_correlation(votes: np.ndarray, steps: int = 60) -> float:
    """Correlation between two votes of one person, given the person's class: 0 to 1.

    votes (P, C). Fits a mixture of C Dirichlet-multinomials, one per class, by maximum likelihood;
    the correlation is 1 / (1 + concentration). A person with one vote does not affect the fit.
    """
    counts = torch.tensor(votes, dtype=torch.float64)
    n_classes, n_votes = counts.shape[1], counts.sum(1)
    class_logits = torch.zeros(n_classes, dtype=torch.float64, requires_grad=True)
    mean_logits = (3 * torch.eye(n_classes, dtype=torch.float64)).requires_grad_()
    log_concentration = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([class_logits, mean_logits, log_concentration], max_iter=steps,
                                  line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        concentration = log_concentration.exp()
        means = mean_logits.softmax(1) * (1 - n_classes * MIN_CLASS_MEAN) + MIN_CLASS_MEAN
        alpha = concentration * means                                                   # (C, C)
        terms = (torch.lgamma(alpha + counts[:, None]) - torch.lgamma(alpha)).sum(2)    # (P, C)
        normaliser = torch.lgamma(concentration) - torch.lgamma(concentration + n_votes)
        log_likelihood = class_logits.log_softmax(0) + (normaliser[:, None] + terms)
        value = -log_likelihood.logsumexp(1).mean()
        value.backward()
        return value

    optimizer.step(loss)
    return 1 / (1 + log_concentration.exp().item())


def correlation_interval(votes: np.ndarray, rng: np.random.Generator,
                         n_boot: int = 200) -> tuple[float, float]:
    """95 % interval of vote_correlation, by a bootstrap over people."""
    replicates = [vote_correlation(votes[rng.integers(len(votes), size=len(votes))])
                  for _ in range(n_boot)]
    return tuple(np.percentile(replicates, [2.5, 97.5]).tolist())


def estimate_correlation(path: str, classes: tuple[str, ...], seed: int) -> float:
    """The correlation of the people of a predictions.csv, printed with its interval.

    Raises ValueError for a table with fewer than two people with two votes, OSError.
    """
    votes = read_votes(path, classes)
    votes = votes[votes.sum(1) >= 2]
    if len(votes) < 2:
        raise ValueError("expects at least two people with two labelled photos")
    correlation = round(vote_correlation(votes), 3)
    low, high = correlation_interval(votes, np.random.default_rng(seed))
    n = votes.sum(1)
    agreement = ((votes * (votes - 1)).sum(1) / (n * (n - 1))).mean()
    print(f"{len(votes)} people: two photos of a person get the same label in "
          f"{100 * agreement:.1f} % of cases; correlation of a person's votes at least "
          f"{correlation:.3f} (95 % interval {low:.3f} to {high:.3f})")
    return correlation


# ------------------------------------------------------------------------------- synthetic people
def deal_people(predictions: np.ndarray, labels: np.ndarray, n_classes: int, per_person: int,
                correlation: float, rng: np.random.Generator) -> np.ndarray:
    """Photos (P, per_person) of synthetic people of one class each. A photo is used at most once.

    predictions, labels (n,): predicted and true classes. DEALT_SHARE of the photos are used. The
    predicted classes of a person's photos are multinomial, with shares drawn from a Dirichlet
    distribution around those of the class. Raises ValueError for a class with too few photos.
    """
    people = []
    for label in range(n_classes):
        piles = [rng.permutation(np.flatnonzero((labels == label) & (predictions == c)))
                 for c in range(n_classes)]
        sizes = np.array([len(pile) for pile in piles])
        shares = sizes / max(1, sizes.sum())
        n_people = int(DEALT_SHARE * sizes.sum()) // per_person
        if n_people == 0:
            raise ValueError(f"{sizes.sum()} photos of a class are too few for people of "
                             f"{per_person} photos")
        means = np.tile(shares, (n_people, 1)) if correlation == 0 else rng.dirichlet(
            np.maximum(shares, MIN_CLASS_MEAN) * (1 - correlation) / correlation, n_people)
        counts = fit_to_piles(rng.multinomial(per_person, means), sizes, rng)
        ends = counts.cumsum(0)
        people += [np.concatenate([pile[ends[k, c] - counts[k, c]:ends[k, c]]
                                   for c, pile in enumerate(piles)]) for k in range(n_people)]
    return np.array(people)


def fit_to_piles(counts: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """counts (P, C), photos of each predicted class, reduced to the sizes (C,) of the piles.

    Single photos of a class that is drawn too often, chosen at random, are replaced by photos of
    the other classes. Changes counts in place.
    """
    while (excess := counts.sum(0) - sizes).max() > 0:
        c, spare = excess.argmax(), np.maximum(-excess, 0)
        person = rng.choice(len(counts), p=counts[:, c] / counts[:, c].sum())
        counts[person, c] -= 1
        counts[person, rng.choice(len(sizes), p=spare / spare.sum())] += 1
    return counts


def votes_of(predictions: np.ndarray, people: np.ndarray, n_classes: int) -> np.ndarray:
    """Votes (P, C) of synthetic people, whose photos are people (P, per_person)."""
    return np.stack([(predictions[people] == c).sum(1) for c in range(n_classes)], 1)


def dealt_correlation(predictions: np.ndarray, labels: np.ndarray, people: np.ndarray,
                      n_classes: int) -> float:
    """Correlation between two votes of a synthetic person, whose class is known.

    It compares the share of agreeing pairs with that expected of independent votes.
    """
    agreeing, expected = 0.0, 0.0
    for label in range(n_classes):
        votes = votes_of(predictions, people[labels[people[:, 0]] == label], n_classes)
        n, shares = people.shape[1], votes.sum(0) / votes.sum()
        agreeing += (votes * (votes - 1)).sum() / (n * (n - 1))
        expected += len(votes) * (shares @ shares)
    # 0 if all photos of a class get one label.
    return (agreeing - expected) / max(len(people) - expected, 1e-12)


# ------------------------------------------------------------------------- label, select, train
@dataclass(frozen=True)
class LabelledFeatures:
    """The photos of a split in which a face was classified."""
    features: np.ndarray        # (n, 512) float32
    predictions: np.ndarray     # (n,) int64 classes by the first classifier
    labels: np.ndarray          # (n,) int64


class Backbone(nn.Module):
    """A classifier without its last layer: views (n, 3, S, S) uint8 -> (n, 512) float32."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        super().__init__()
        self.network = checkpoint.classifier(device)
        self.head = self.network.backbone.fc
        self.network.backbone.fc = nn.Identity()

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """n may be 0."""
        if not len(views):
            return views.new_zeros(0, self.head.in_features, dtype=torch.float32)
        return self.network(views)


def extract_features(faces: FaceSet, checkpoint: Checkpoint, n_workers: int, device: torch.device,
                     split: str) -> LabelledFeatures:
    """Features, predicted classes and labels of a set. split: shown on the progress bar."""
    backbone, spec = Backbone(checkpoint, device), checkpoint.spec
    features = np.zeros((len(faces), backbone.head.in_features), np.float32)
    predictions = np.full(len(faces), -1)
    batches = align_labelled_set(faces.paths(), faces.is_aligned, MTCNN().to(device),
                                 ViewSpec.of_checkpoint(spec), n_workers, split)
    for batch in batches:
        outputs = backbone(batch.views.to(device))
        probs = checkpoint.probs(backbone.head(outputs).detach())
        features[batch.positions()] = outputs.cpu().numpy()
        predictions[batch.positions()] = probs.argmax(1).cpu().numpy()
    is_classified = predictions >= 0
    return LabelledFeatures(features[is_classified], predictions[is_classified],
                            faces.labels.numpy()[is_classified])


def decide_people(predictions: np.ndarray, people: np.ndarray, n_classes: int,
                  threshold: float) -> np.ndarray:
    """Labels (P,) of synthetic people by the rule of facesets/consensus.py, -1 if dropped."""
    n = np.full(len(people), people.shape[1])
    votes = VoteTable(classes=[], person_ids=[], person_index={}, n_images=n, n_sampled=n,
                      n_faces=n, counts=votes_of(predictions, people, n_classes), n_outside=0)
    return apply_rule(votes, ConsensusRule(threshold=threshold, min_images=1)).labels


def head_accuracy(features: np.ndarray, labels: np.ndarray, val: LabelledFeatures) -> float:
    """Validation accuracy of a last layer trained on features and labels.

    nan if a class of the validation set has no training photo.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if set(val.labels) - set(labels):
        return float("nan")
    head = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300))
    return head.fit(features, labels).score(val.features, val.labels)


def evaluate_rule(train: LabelledFeatures, val: LabelledFeatures, people: np.ndarray,
                  threshold: float, n_classes: int) -> dict:
    """The results of one rule on synthetic people: a row of the table, without its settings."""
    labels = decide_people(train.predictions, people, n_classes, threshold)
    true_labels, is_kept = train.labels[people[:, 0]], labels >= 0
    photos, photo_labels = people[is_kept].ravel(), np.repeat(labels[is_kept], people.shape[1])
    kept_shares = [is_kept[true_labels == c].mean() for c in range(n_classes)]
    error_after = float("nan")
    if is_kept.any():
        error_after = (labels[is_kept] != true_labels[is_kept]).mean()
    return {"people": len(people), "kept_people": int(is_kept.sum()),
            "kept_least_of_a_class": min(kept_shares),
            "error_before": (train.predictions[people] != train.labels[people]).mean(),
            "error_after": error_after,
            "accuracy": head_accuracy(train.features[photos], photo_labels, val)}


# ------------------------------------------------------------------------------------ the results
def write_table(rows: list[dict], path: Path) -> None:
    """Writes the rows as CSV, shares with four digits."""
    with (atomic_write(path) as temporary_path,
          open(temporary_path, "w", encoding="utf-8", newline="") as file):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(float(value), 4) if isinstance(value, float) else value
                             for key, value in row.items()})


def draw_figure(rows: list[dict], bounds: dict[str, float], path: Path) -> None:
    """Draws label error and accuracy against the threshold.

    A column of panels for each correlation, a line for each number of photos per person.
    """
    from matplotlib.figure import Figure

    correlations = sorted({row["correlation"] for row in rows})
    figure = Figure(figsize=(4.6 * len(correlations), 7), layout="constrained")
    panels = figure.subplots(2, len(correlations), sharex=True, sharey="row", squeeze=False)
    for (upper, lower), correlation in zip(panels.T, correlations, strict=True):
        draw_column(upper, lower, [row for row in rows if row["correlation"] == correlation])
        for (name, value), style in zip(bounds.items(), (":", "--", "-."), strict=True):
            lower.axhline(100 * value, color="0.5", linestyle=style, label=name)
        upper.set_title("independent errors on a person's photos" if correlation == 0 else
                        f"correlated errors, correlation {correlation:.2f}")
        lower.set_xlabel("threshold")
    panels[0, 0].set_ylabel("wrong labels of the photos kept, %")
    panels[1, 0].set_ylabel("accuracy after training on them, %")
    panels[0, 0].set_ylim(bottom=0)
    for row in panels:
        row[0].legend(fontsize=8)
    with atomic_write(path) as temporary_path:
        figure.savefig(temporary_path, dpi=120, format="png")


def draw_column(upper, lower, rows: list[dict]) -> None:
    """Draws label error and accuracy of one correlation into two Matplotlib axes."""
    for n in sorted({row["images_per_person"] for row in rows}):
        line = [row for row in rows if row["images_per_person"] == n]
        thresholds = [row["threshold"] for row in line]
        upper.plot(thresholds, [100 * row["error_after"] for row in line], "o-",
                   label=f"{n} photos per person")
        lower.plot(thresholds, [100 * row["accuracy"] for row in line], "o-")
    upper.axhline(100 * rows[0]["error_before"], color="0.5", linestyle=":",
                  label="before the consensus")


def open_split(parser: cli.Parser, args: Namespace, checkpoint: Checkpoint,
               split: str) -> LabelledFeatures:
    """Features of a split of --data; a one-line error for a set that cannot be read."""
    faces = open_faceset(parser, args.data, split, args.class_map, checkpoint.spec.classes)
    return extract_features(faces, checkpoint, args.num_workers, args.device, split)


def main(argv: list[str] | None = None) -> None:
    """Estimates the correlation, evaluates every rule and writes the table and the figure."""
    parser, args = parse_args(argv)
    output_dir = cli.output_folder(parser, "--output_dir", args.output_dir)
    checkpoint = open_checkpoint(parser, args.ckpt)
    correlations = {0.0, *args.correlation}
    if args.people:
        try:
            correlations.add(estimate_correlation(args.people, checkpoint.spec.classes, args.seed))
        except (OSError, ValueError) as error:
            parser.error(f"--people {args.people}: {error}")
    train, val = (open_split(parser, args, checkpoint, split) for split in ("train", "val"))
    bounds = {"first classifier": float((val.predictions == val.labels).mean()),
              "new last layer, predicted labels":
                  head_accuracy(train.features, train.predictions, val),
              "new last layer, true labels": head_accuracy(train.features, train.labels, val)}
    print(", ".join(f"{name}: {100 * value:.2f} %" for name, value in bounds.items()))
    rows = evaluate_rules(parser, args, train, val, len(checkpoint.spec.classes),
                          sorted(correlations))
    write_table(rows, output_dir / "consensus_noise.csv")
    draw_figure(rows, bounds, output_dir / "consensus_noise.png")
    for row in rows:
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()))


def evaluate_rules(parser: cli.Parser, args: Namespace, train: LabelledFeatures,
                   val: LabelledFeatures, n_classes: int, correlations: list[float]) -> list[dict]:
    """The rows of the table: every correlation, number of photos per person and threshold."""
    rows = []
    settings = [(correlation, n) for correlation in correlations for n in args.per_person]
    for correlation, n in tqdm(settings, unit="setting", disable=None):
        rng = np.random.default_rng([args.seed, n])
        try:
            people = deal_people(train.predictions, train.labels, n_classes, n, correlation, rng)
        except ValueError as error:
            parser.error(f"--per_person {n}: {error}")
        dealt = dealt_correlation(train.predictions, train.labels, people, n_classes)
        for threshold in sorted(args.thresholds):
            rows.append({"correlation": correlation, "dealt_correlation": dealt,
                         "images_per_person": n, "threshold": threshold,
                         **evaluate_rule(train, val, people, threshold, n_classes)})
    return rows


if __name__ == "__main__":
    main()
