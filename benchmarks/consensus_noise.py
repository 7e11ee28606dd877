"""How much label noise the consensus of a person's pictures removes, and what it is worth when they err together.

A first classifier labels the training pictures of a labelled set. These are dealt into made-up people of one class
each, the rule of facesets/consensus.py decides who is kept, and every picture of a kept person gets the person's class.
Told of each number of pictures a person and each threshold: the share of wrong labels before and after, how many
people are kept, and the accuracy on the validation pictures of a classifier trained on what is kept: the first one's
network with a new last layer, which takes seconds to train. Its features were learned from true labels, so noise costs
it less than it would cost a network trained from the start.

The pictures of a made-up person err independently, or as much together as --correlation says. That of real people is
measured on --people, a predictions.csv of infer.py over a folder of person folders: the votes of a person of class c
are Dirichlet-multinomial, with the mean of the class and one correlation for all (0: independent pictures; 1: all
pictures of a person get one label); classes, means and correlation are fitted together by maximum likelihood. Nobody
says of which class a person is: one whose pictures are all mistaken alike passes for one of the other class, so what is
measured is the least that it can be.

    python infer.py --ckpt checkpoints/stage1.pt --input_dir people --output_dir out/people
    python benchmarks/consensus_noise.py --data data/utk_published --ckpt checkpoints/stage1.pt \\
        --people out/people/predictions.csv

Reads   --data, a set with train and val folders; --ckpt; --people.
Writes  <out_dir>/consensus_noise.csv, a row for each rule, and consensus_noise.png.
"""
import csv
import sys
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from evaluate import open_checkpoint, open_faceset
from facesets.consensus import Votes, decide
from models.faces.checkpoint import Checkpoint
from models.faces.labelled import align_set
from models.faces.mtcnn import MTCNN
from models.faces.predictions import label_name, read_predictions
from models.running import cli
from models.running.files import atomic_write

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
PER_PERSON = (3, 5, 10, 20)
COLUMNS = ("correlation", "dealt_correlation", "images_per_person", "threshold", "people", "kept_people",
           "kept_least_of_a_class", "error_before", "error_after", "accuracy")
DEALT = 0.5                         # of the pictures: were all dealt, what is left for the last people would be fixed
LEAST_MEAN = 1e-3                   # of a class in a person's votes: keeps the likelihood finite


def parse_args(argv: list[str] | None = None):
    """The parser and the checked command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", default="checkpoints/stage1.pt", help="the first classifier (%(default)s)")
    add("--data", default="data/utk_races", help="labelled set it was not trained on (%(default)s)")
    add("--class_map", type=cli.class_map, help="rename the classes of --data: FROM=TO,...")
    add("--people", metavar="FILE", help="predictions.csv of real people, whose correlation is measured")
    add("--correlation", type=cli.fraction, nargs="+", default=[], help="further correlations of a person's errors")
    add("--per_person", type=cli.positive_int, nargs="+", default=list(PER_PERSON), help="pictures of a person")
    add("--thresholds", type=cli.fraction, nargs="+", default=list(THRESHOLDS))
    add("--workers", type=cli.non_negative_int, default=cli.worker_count(), help="decoding processes (%(default)s)")
    add("--seed", type=cli.non_negative_int, default=0, help="of the made-up people (%(default)s)")
    add("--out_dir", default="visualizations", help="where table and figure go (%(default)s)")
    cli.add_device(parser)
    return parser, parser.parse_args(argv)


# ------------------------------------------------------------------------------------------ how a person's pictures err
def read_votes(path: str, classes: tuple[str, ...]) -> np.ndarray:
    """Votes (P, C) int64 of the people of a predictions.csv: the labels of the largest faces, by first folder."""
    names = {label_name(name): i for i, name in enumerate(classes)}
    votes = defaultdict(lambda: np.zeros(len(classes), np.int64))
    for row in read_predictions(path):
        person, slash, _ = row["file"].partition("/")
        if slash and row["status"] == "ok" and row["face"] == "0" and row["ethnicity"] in names:
            votes[person][names[row["ethnicity"]]] += 1
    if not votes:
        raise ValueError(f"no labelled file lies in a person's folder, or its labels are not {', '.join(classes)}")
    return np.stack([votes[person] for person in sorted(votes)])


def vote_correlation(votes: np.ndarray, steps: int = 60) -> float:
    """Correlation between two votes of one person, given the person's class; votes (P, C) -> 0 to 1.

    A mixture of C Dirichlet-multinomials, one a class, fitted by maximum likelihood; a person with one vote says
    nothing. The correlation is 1 / (1 + concentration).
    """
    counts = torch.tensor(votes, dtype=torch.float64)
    n_classes, total = counts.shape[1], counts.sum(1)
    weight = torch.zeros(n_classes, dtype=torch.float64, requires_grad=True)
    means = (3 * torch.eye(n_classes, dtype=torch.float64)).requires_grad_()
    concentration = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)          # its logarithm
    fit = torch.optim.LBFGS([weight, means, concentration], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        fit.zero_grad()
        scale = concentration.exp()
        alpha = scale * (means.softmax(1) * (1 - n_classes * LEAST_MEAN) + LEAST_MEAN)             # (C, C)
        likelihood = (torch.lgamma(scale) - torch.lgamma(scale + total)[:, None]
                      + (torch.lgamma(alpha + counts[:, None]) - torch.lgamma(alpha)).sum(2))      # (P, C)
        value = -(weight.log_softmax(0) + likelihood).logsumexp(1).mean()
        value.backward()
        return value

    fit.step(loss)
    return 1 / (1 + concentration.exp().item())


def correlation_interval(votes: np.ndarray, rng: np.random.Generator, n_boot: int = 200) -> tuple[float, float]:
    """95 % interval of vote_correlation by a bootstrap over people."""
    drawn = [vote_correlation(votes[rng.integers(len(votes), size=len(votes))]) for _ in range(n_boot)]
    return tuple(np.percentile(drawn, [2.5, 97.5]).tolist())


def deal_people(said: np.ndarray, labels: np.ndarray, n_classes: int, per_person: int, correlation: float,
                rng: np.random.Generator) -> np.ndarray:
    """Pictures (P, per_person) of made-up people of one class each; every picture at most once, DEALT of them in all.

    said, labels (n,): predicted and true classes. A person draws the shares of its votes from a Dirichlet distribution
    about those of its class, then as many pictures of each predicted class as the shares give.
    """
    people = []
    for label in range(n_classes):
        piles = [rng.permutation(np.flatnonzero((labels == label) & (said == c))) for c in range(n_classes)]
        sizes = np.array([len(pile) for pile in piles])
        shares, n_people = sizes / max(1, sizes.sum()), int(DEALT * sizes.sum()) // per_person
        if n_people == 0:
            raise ValueError(f"{sizes.sum()} pictures of a class are too few for people of {per_person}")
        means = np.tile(shares, (n_people, 1)) if correlation == 0 else rng.dirichlet(
            np.maximum(shares, LEAST_MEAN) * (1 - correlation) / correlation, n_people)
        wanted = fit_to_piles(rng.multinomial(per_person, means), sizes, rng)
        ends = wanted.cumsum(0)
        people += [np.concatenate([pile[ends[k, c] - wanted[k, c]:ends[k, c]] for c, pile in enumerate(piles)])
                   for k in range(n_people)]
    return np.array(people)


def votes_of(said: np.ndarray, people: np.ndarray, n_classes: int) -> np.ndarray:
    """Votes (P, C) of made-up people, whose pictures are people (P, per_person)."""
    return np.stack([(said[people] == c).sum(1) for c in range(n_classes)], 1)


def dealt_correlation(said: np.ndarray, labels: np.ndarray, people: np.ndarray, n_classes: int) -> float:
    """Correlation between two votes of a made-up person, whose class is known: by how many pairs agree."""
    agreed, chance = 0.0, 0.0
    for label in range(n_classes):
        votes = votes_of(said, people[labels[people[:, 0]] == label], n_classes)
        n, shares = people.shape[1], votes.sum(0) / votes.sum()
        agreed += (votes * (votes - 1)).sum() / (n * (n - 1))
        chance += len(votes) * (shares @ shares)
    return (agreed - chance) / max(len(people) - chance, 1e-12)          # 0 where all pictures get one label


def fit_to_piles(wanted: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """wanted (P, C) pictures of each predicted class, no class more often than there are pictures of it, sizes (C,).

    Single votes of what is wanted too often, drawn at random, become votes of what is left.
    """
    while (over := wanted.sum(0) - sizes).max() > 0:
        much, spare = over.argmax(), np.maximum(-over, 0)
        person = rng.choice(len(wanted), p=wanted[:, much] / wanted[:, much].sum())
        wanted[person, much] -= 1
        wanted[person, rng.choice(len(sizes), p=spare / spare.sum())] += 1
    return wanted


# ------------------------------------------------------------------------------------------------- label, choose, train
class Features(nn.Module):
    """A classifier without its last layer: views (n, 3, S, S) uint8 -> (n, 512) float32."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        super().__init__()
        self.network = checkpoint.classifier(device)
        self.head = self.network.backbone.fc
        self.network.backbone.fc = nn.Identity()

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """Of an empty batch too."""
        return self.network(views) if len(views) else views.new_zeros(0, self.head.in_features, dtype=torch.float32)


def describe_set(parser: cli.Parser, args, checkpoint: Checkpoint, split: str) -> tuple[np.ndarray, ...]:
    """Features (n, 512), predicted classes (n,) and labels (n,) of a split of --data."""
    faces = open_faceset(parser, Namespace(**vars(args), split=split), checkpoint.spec.classes)
    network, spec = Features(checkpoint, args.device), checkpoint.spec
    features, said = np.zeros((len(faces), network.head.in_features), np.float32), np.full(len(faces), -1)
    for batch in align_set(faces.paths(), faces.is_aligned, MTCNN().to(args.device), spec.window, spec.input_size,
                           template=spec.template, chips=spec.chip_geometry, workers=args.workers, progress=split):
        found = network(batch.views.to(args.device))
        features[batch.positions] = found.cpu().numpy()
        said[batch.positions] = checkpoint.probs(network.head(found).detach()).argmax(1).cpu().numpy()
    good = said >= 0
    return features[good], said[good], faces.labels.numpy()[good]


def decide_people(said: np.ndarray, people: np.ndarray, n_classes: int, threshold: float) -> np.ndarray:
    """Class (P,) of made-up people by the rule of facesets/consensus.py, -1 of those who are dropped."""
    n = np.full(len(people), people.shape[1])
    votes = Votes([], [], {}, n, n, votes_of(said, people, n_classes), n, 0)
    return decide(votes, Namespace(threshold=threshold, strict=False, min_images=1)).decision


def head_accuracy(features: np.ndarray, labels: np.ndarray, val: tuple[np.ndarray, np.ndarray]) -> float:
    """Validation accuracy of a last layer trained on features and labels; nan where a class has none."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if set(val[1]) - set(labels):
        return float("nan")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=300)).fit(features, labels)
    return model.score(*val)


def judge_rule(train: tuple[np.ndarray, ...], val: tuple[np.ndarray, ...], people: np.ndarray, threshold: float,
               n_classes: int) -> dict:
    """What one rule gives on the made-up people: a row of the table, without its settings."""
    features, said, labels = train
    decision, truth = decide_people(said, people, n_classes, threshold), labels[people[:, 0]]
    kept = decision >= 0
    pictures, given = people[kept].ravel(), np.repeat(decision[kept], people.shape[1])
    of_class = [kept[truth == c].mean() for c in range(n_classes)]
    return {"people": len(people), "kept_people": int(kept.sum()), "kept_least_of_a_class": min(of_class),
            "error_before": (said[people] != labels[people]).mean(),
            "error_after": (decision[kept] != truth[kept]).mean() if kept.any() else float("nan"),
            "accuracy": head_accuracy(features[pictures], given, (val[0], val[2]))}


# -------------------------------------------------------------------------------------------------------- the results
def write_table(rows: list[dict], path: Path) -> None:
    """The rows as CSV, shares with four digits."""
    with atomic_write(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: round(float(value), 4) if isinstance(value, float) else value
                             for key, value in row.items()})


def draw_figure(rows: list[dict], bounds: dict[str, float], path: Path) -> None:
    """Label error and accuracy by threshold, a line for each number of pictures, a column for each correlation."""
    from matplotlib.figure import Figure

    correlations = sorted({row["correlation"] for row in rows})
    figure = Figure(figsize=(4.6 * len(correlations), 7), layout="constrained")
    panels = figure.subplots(2, len(correlations), sharex=True, sharey="row", squeeze=False)
    for column, correlation in enumerate(correlations):
        mine = [row for row in rows if row["correlation"] == correlation]
        upper, lower = panels[:, column]
        for n in sorted({row["images_per_person"] for row in mine}):
            some = [row for row in mine if row["images_per_person"] == n]
            x = [row["threshold"] for row in some]
            upper.plot(x, [100 * row["error_after"] for row in some], "o-", label=f"{n} pictures a person")
            lower.plot(x, [100 * row["accuracy"] for row in some], "o-")
        upper.axhline(100 * mine[0]["error_before"], color="0.5", linestyle=":", label="before the consensus")
        for (name, value), style in zip(bounds.items(), (":", "--", "-."), strict=True):
            lower.axhline(100 * value, color="0.5", linestyle=style, label=name)
        upper.set_title("pictures of a person err independently" if correlation == 0 else
                        f"they err together, correlation {correlation:.2f}")
        lower.set_xlabel("threshold")
    panels[0, 0].set_ylabel("wrong labels of what is kept, %")
    panels[1, 0].set_ylabel("accuracy after training on it, %")
    panels[0, 0].set_ylim(bottom=0)
    for row in panels:
        row[0].legend(fontsize=8)
    with atomic_write(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def measured_correlation(parser: cli.Parser, args, classes: tuple[str, ...]) -> list[float]:
    """That of --people, printed with its interval; none without."""
    if not args.people:
        return []
    try:
        votes = read_votes(args.people, classes)
    except (OSError, ValueError) as error:
        parser.error(f"--people {args.people}: {error}")
    votes = votes[votes.sum(1) >= 2]
    if len(votes) < 2:
        parser.error(f"--people {args.people}: wants at least two people with two labelled pictures")
    correlation = round(vote_correlation(votes), 3)
    low, high = correlation_interval(votes, np.random.default_rng(args.seed))
    n = votes.sum(1)
    same = ((votes * (votes - 1)).sum(1) / (n * (n - 1))).mean()
    print(f"{len(votes)} people: two pictures of one get the same label in {100 * same:.1f} % of cases; "
          f"correlation of a person's votes at least {correlation:.3f} (95 % interval {low:.3f} to {high:.3f})")
    return [correlation]


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    if args.correlation and max(args.correlation) == 1:
        parser.error("--correlation 1: a person's pictures would be one and the same")
    if min(args.per_person) < 2:
        parser.error("--per_person 1: one picture agrees with itself")
    out_dir = cli.output_folder(parser, "--out_dir", args.out_dir)
    checkpoint = open_checkpoint(parser, args)
    n_classes = len(checkpoint.spec.classes)
    correlations = sorted({0.0, *args.correlation, *measured_correlation(parser, args, checkpoint.spec.classes)})
    train, val = (describe_set(parser, args, checkpoint, split) for split in ("train", "val"))
    bounds = {"first classifier": float((val[1] == val[2]).mean()),
              "new last layer, its own labels": head_accuracy(train[0], train[1], (val[0], val[2])),
              "new last layer, true labels": head_accuracy(train[0], train[2], (val[0], val[2]))}
    print(", ".join(f"{name}: {100 * value:.2f} %" for name, value in bounds.items()))
    rows, deals = [], [(correlation, n) for correlation in correlations for n in args.per_person]
    for correlation, n in tqdm(deals, unit="deal", disable=None):
        try:
            people = deal_people(train[1], train[2], n_classes, n, correlation, np.random.default_rng([args.seed, n]))
        except ValueError as error:
            parser.error(f"--per_person {n}: {error}")
        dealt = dealt_correlation(train[1], train[2], people, n_classes)
        rows += [{"correlation": correlation, "dealt_correlation": dealt, "images_per_person": n,
                  "threshold": threshold, **judge_rule(train, val, people, threshold, n_classes)}
                 for threshold in sorted(args.thresholds)]
    write_table(rows, out_dir / "consensus_noise.csv")
    draw_figure(rows, bounds, out_dir / "consensus_noise.png")
    for row in rows:
        print("  ".join(f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                        for key, value in row.items()))


if __name__ == "__main__":
    main()
