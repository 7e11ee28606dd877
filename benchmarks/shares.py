"""Error of estimated group shares, and coverage of their 95 % intervals.

Draws collections of known composition from labelled faces with predictions, and estimates their
shares by the methods of models/reports/shares.py and by EM (SLD: Saerens, Latinne, Decaestecker,
"Adjusting the outputs of a classifier to new a priori probabilities", 2002). Sources:

  test       the test split, with the error model of the checkpoint
  resplit    the same, with validation and test faces redistributed within each class for every
             collection: "95 %" is a rate over validation sets too, and one split shows only one
  other      another data set, for which the error model is wrong
  other+50   the same, with 50 (100, 300) labelled faces of that set as the reference

Compositions are uniform on the simplex; in every fourth one class is absent. Classes with too few
faces for a collection are drawn from with replacement.

Reads   --ckpt, and <name>_probs.npz files of evaluate.py --save_probs.
Writes  <output_dir>/shares_benchmark.csv, a row per source, size, method and class, and
        shares_benchmark.png.

    python evaluate.py --ckpt checkpoints/resnet18_utk.pt --data data/utk_published --save_probs
    python evaluate.py --ckpt checkpoints/resnet18_utk.pt --data data/FairFace_val --save_probs \\
        --name fairface_val --class_map East_Asian=Asian,Southeast_Asian=Asian
    python benchmarks/shares.py --ckpt checkpoints/resnet18_utk.pt \\
        --other out/evaluation/fairface_val_probs.npz
"""
import argparse
import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # one process per core, each with small matrices
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from models.faces.checkpoint import CheckpointError, load_checkpoint
from models.reports import shares
from models.reports.plots import Figure, save_figure
from models.reports.shares import (
    DEFAULT_METHOD,
    MIN_PROB,
    ErrorModel,
    Evidence,
    Replicates,
    estimate_shares,
    with_intervals,
)
from models.running import cli

COLUMNS = ("source", "n", "method", "class", "collections", "mae", "coverage",
           "coverage_of_source_interval", "width", "warned")
COLOURS = {"raw": "0.45", "adjusted": "tab:orange", "probabilistic": "tab:blue", "em": "tab:green"}


def parse_args(argv: list[str] | None = None) -> tuple[cli.Parser, argparse.Namespace]:
    """The parser and the command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_ckpt(parser, help="checkpoint whose calibration is the error model")
    add("--test", default="out/evaluation/test_probs.npz", metavar="FILE",
        help="predictions on the test split (%(default)s)")
    add("--other", metavar="FILE", help="predictions on another data set")
    add("--sizes", type=cli.positive_int, nargs="+", default=[200, 1000, 5000],
        help="faces per collection (%(default)s)")
    add("--compositions", type=cli.positive_int, default=100,
        help="true compositions per size (%(default)s)")
    add("--repeats", type=cli.positive_int, default=4,
        help="collections per composition (%(default)s)")
    add("--reference", type=cli.non_negative_int, nargs="*", default=[50, 100, 300],
        help="labelled faces of --other (%(default)s)")
    add("--n_boot", type=cli.positive_int, default=500,
        help="bootstrap replicates per interval (%(default)s)")
    cli.add_num_workers(parser, "number of processes (%(default)s)", default=cli.worker_count())
    add("--quapy", action="store_true",
        help="also print the largest difference from QuaPy's estimates (pip install quapy)")
    cli.add_output_dir(parser, "folder for the table and the figure", default="out/shares")
    cli.add_seed(parser, 0, "seed of compositions, draws and replicates")
    return parser, parser.parse_args(argv)


def read_predictions(parser: cli.Parser, flag: str, path: str,
                     n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """probs (n, C) and labels (n,) of a file of evaluate.py --save_probs, or the one-line error."""
    try:
        with np.load(path, allow_pickle=False) as file:
            probs, labels = file["probs"], file["labels"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{flag} {path}: not a file of evaluate.py --save_probs ({error})")
    if probs.ndim != 2 or probs.shape != (len(labels), n_classes):
        parser.error(f"{flag} {path}: probs are {probs.shape} for {len(labels)} labels, the "
                     f"checkpoint has {n_classes} classes")
    return probs, labels


# ------------------------------------------------------------------------------------------ EM
def em_shares(evidence: Evidence) -> dict:
    """Maximum-likelihood shares under calibrated probabilities (EM), as an entry of the report.

    Each replicate takes one Newton step in shares and calibration. The score of face x for class j
    is g_j = ratio_j / (ratio . p); its mean over the faces is 1 at the optimum.
    """
    faces, copies, model = evidence.faces, evidence.copies, evidence.model
    replicates, centre = evidence.replicates, evidence.replicates.centre
    p = em_estimate(faces, copies, model.prior)
    scores, val_scores = (likelihood_scores(probs, model.prior, centre)
                          for probs in (faces, model.probs))
    # The expected curvature, from validation: that of few faces may not be invertible.
    curvature = (model.class_means(outer_products(val_scores)) @ centre).reshape(len(p), len(p))
    inverse = np.linalg.pinv(curvature)
    # Steps keep the sum of the shares.
    inverse -= np.outer(inverse.sum(1), inverse.sum(0)) / inverse.sum()
    free = centre + inverse @ (copies @ scores / copies.sum())
    expected = replicates.shares @ model.class_means(val_scores).T
    noise = replicates.collection_means(val_scores, model) - expected
    slopes = score_slopes(faces, copies, model.prior, centre)
    noise += calibration_noise(model, replicates) @ slopes.T
    errors = noise @ inverse
    return with_intervals(p, free, errors, errors + replicates.shares - centre)


def em_estimate(faces: np.ndarray, copies: np.ndarray, prior: np.ndarray, *,
                tolerance: float = 1e-8, max_steps: int = 5000) -> np.ndarray:
    """Maximum-likelihood shares (C,) of faces with probabilities (u, C), each copies (u,) times.

    prior (C,): the class shares under which the probabilities were calibrated.
    """
    ratio = np.maximum(faces, MIN_PROB) / prior                 # proportional to p(face | class)
    p = prior.copy()
    for _ in range(max_steps):
        posterior = ratio * p
        posterior /= posterior.sum(1, keepdims=True)
        updated = copies @ posterior / copies.sum()
        change = abs(updated - p).max()
        p = updated
        if change < tolerance:
            break
    return p


def likelihood_scores(probs: np.ndarray, prior: np.ndarray, p: np.ndarray) -> np.ndarray:
    """d log-likelihood / d p of faces with calibrated probs (n, C): (n, C)."""
    ratio = np.maximum(probs, MIN_PROB) / prior
    return ratio / (ratio @ p)[:, None]


def outer_products(rows: np.ndarray) -> np.ndarray:
    """(n, F) -> (n, F * F): the outer product of each row with itself."""
    return (rows[:, :, None] * rows[:, None]).reshape(len(rows), -1)


def score_slopes(faces: np.ndarray, copies: np.ndarray, prior: np.ndarray,
                 p: np.ndarray) -> np.ndarray:
    """d mean score / d (slope, biases) of the calibration: (C, 1 + C)."""
    z, g = np.log(np.maximum(faces, MIN_PROB)), likelihood_scores(faces, prior, p)
    weight, posterior = copies / copies.sum(), g * p
    by_slope = weight @ (g * (z - (posterior * z).sum(1, keepdims=True)))
    by_bias = np.diag(weight @ g) - (g * weight[:, None]).T @ posterior
    return np.column_stack([by_slope, by_bias])


def calibration_noise(model: ErrorModel, replicates: Replicates) -> np.ndarray:
    """Change (B, 1 + C) of slope and biases, refitted to the validation set of each replicate."""
    probs = np.maximum(model.probs, MIN_PROB)
    m, n_classes = probs.shape
    biases = np.broadcast_to(np.eye(n_classes), (m, n_classes, n_classes))
    design = np.concatenate([np.log(probs)[:, :, None], biases], 2)
    mean = (design * probs[:, :, None]).sum(1)                                  # (m, 1 + C)
    second_moment = np.einsum("nck,nc,ncl->nkl", design, probs, design).reshape(m, -1)
    covariance = second_moment - outer_products(mean)
    fisher = model.class_means(covariance) @ model.sizes
    fisher = fisher.reshape(n_classes + 1, n_classes + 1)
    labels = np.empty(m, dtype=np.int64)
    for k, rows in enumerate(model.rows):
        labels[rows] = k
    gradient = design[np.arange(m), labels] - mean
    difference = replicates.class_means(gradient, model) - model.class_means(gradient)
    return (difference @ model.sizes) @ np.linalg.pinv(fisher, hermitian=True)  # (B, 1 + C)


METHODS = {**shares.METHODS, "em": em_shares}


# ----------------------------------------------------------------------------------- the draws
def draw_composition(number: int, n_classes: int, rng: np.random.Generator) -> np.ndarray:
    """True shares (C,), uniform on the simplex; every fourth composition lacks one class."""
    shares = rng.dirichlet(np.ones(n_classes))
    if number % 4 == 3:
        shares[rng.integers(n_classes)] = 0
    return shares / shares.sum()


def whole_counts(shares: np.ndarray, n: int) -> np.ndarray:
    """Counts (C,) that sum to n and are nearest to the shares, by largest remainder."""
    counts = np.floor(shares * n).astype(np.int64)
    rest = np.argsort(counts - shares * n, kind="stable")[:n - counts.sum()]
    counts[rest] += 1
    return counts


def draw_rows(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of a collection with counts (C,) per class; with replacement if a class has too few."""
    rows = [np.flatnonzero(labels == k) for k in range(len(counts))]
    return np.concatenate([rng.choice(members, count, replace=count > len(members))
                           for members, count in zip(rows, counts, strict=True)])


def resplit(a: tuple, b: tuple, rng: np.random.Generator) -> tuple[tuple, tuple]:
    """Two labelled sets (probs, labels), mixed and split again with the same counts per class."""
    probs, labels = (np.concatenate(parts) for parts in zip(a, b, strict=True))
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    n_first, n_class = np.bincount(a[1]), np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(n_class.cumsum() - n_class, n_class)
    first = place < np.repeat(n_first, n_class)
    return tuple((probs[rows], labels[rows]) for rows in (order[first], order[~first]))


def one_collection(job: tuple, sets: dict, seed: int, n_boot: int) -> dict:
    """Draws and estimates one collection; job: an entry of list_jobs."""
    source, n_reference, n, composition, repeat = job
    truth = draw_composition(composition, sets["val"][0].shape[1],
                             np.random.default_rng([seed, composition]))
    rng = np.random.default_rng([seed, composition, repeat, n, n_reference, *source.encode()])
    val, reference = sets["val"], None
    pool = sets["other" if source.startswith("other") else "test"]
    if source == "resplit":
        val, pool = resplit(val, pool, rng)
    if n_reference:
        order = rng.permutation(len(pool[1]))
        reference, pool = (tuple(part[rows] for part in pool)
                           for rows in (order[:n_reference], order[n_reference:]))
    counts = whole_counts(truth, n)
    probs = pool[0][draw_rows(pool[1], counts, rng)]
    report = estimate_shares(probs, *val, n_boot=n_boot, seed=repeat, reference=reference,
                             methods=METHODS)
    return {"source": source, "n": n, "truth": counts / n, "report": report}


# --------------------------------------------------------------------------------- the figures
def summarise(results: list[dict], classes) -> list[dict]:
    """Rows of the table, in percentage points: per source, size and method, each class and all."""
    rows = []
    for source, n in dict.fromkeys((result["source"], result["n"]) for result in results):
        cell = [result for result in results if (result["source"], result["n"]) == (source, n)]
        truth = np.stack([result["truth"] for result in cell])                  # (collections, C)
        warned = np.mean([bool(result["report"]["warning"]) for result in cell])
        for method in METHODS:
            figures = method_figures([result["report"]["methods"][method] for result in cell],
                                     truth)
            for k, name in [*enumerate(classes), (slice(None), "all")]:
                means = {key: round(float(values[:, k].mean()), 2)
                         for key, values in figures.items()}
                rows.append({"source": source, "n": n, "method": method, "class": name,
                             "collections": len(cell), **means,
                             "warned": round(float(100 * warned), 1)})
    return rows


def method_figures(entries: list[dict], truth: np.ndarray) -> dict[str, np.ndarray]:
    """Error, width and coverage (collections, C) of a method's entries; truth (collections, C)."""
    estimate, low, high, source_low, source_high = (
        np.array([entry[key] for entry in entries])
        for key in ("shares", "low", "high", "source_low", "source_high"))
    return {"mae": 100 * abs(estimate - truth), "width": 100 * (high - low),
            "coverage": 100 * contains(low, truth, high),
            "coverage_of_source_interval": 100 * contains(source_low, truth, source_high)}


def contains(low: np.ndarray, truth: np.ndarray, high: np.ndarray) -> np.ndarray:
    """1.0 where low <= truth <= high, up to rounding, else 0.0."""
    return ((low <= truth + 1e-9) & (truth <= high + 1e-9)).astype(np.float64)


def write_table(rows: list[dict], path: Path) -> None:
    """The rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def draw_figure(rows: list[dict], classes, path: Path) -> None:
    """Per source: mean absolute error of each method by size; coverage of the default by class."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure = Figure(figsize=(2.9 * len(sources), 6), layout="constrained")
    panels = figure.subplots(2, len(sources), sharex=True, sharey="row", squeeze=False)
    for source, top, bottom in zip(sources, *panels, strict=True):
        source_rows = [row for row in rows if row["source"] == source]
        for method in METHODS:
            draw_line(top, source_rows, "mae", method, "all", label=method, color=COLOURS[method])
        for name in classes:
            draw_line(bottom, source_rows, "coverage", DEFAULT_METHOD, name, label=name)
        bottom.axhspan(93, 97, color="0.9", zorder=0)
        top.set(title=source, xscale="log")
        sizes = sorted({row["n"] for row in source_rows})
        bottom.set_xticks(sizes, [f"{size:,}" for size in sizes])
        bottom.minorticks_off()
        bottom.set(xlabel="faces in the collection", ylim=(0, 101))
    panels[0, 0].set_ylim(bottom=0)                 # shared by the row, so set after all lines
    panels[0, 0].set_ylabel("mean absolute error, points")
    panels[1, 0].set_ylabel(f"95 % interval, {DEFAULT_METHOD}:\ncoverage, %")
    for axes in panels[:, 0]:
        axes.legend(fontsize=8)
    save_figure(figure, path, dpi=120)


def draw_line(axes, rows: list[dict], key: str, method: str, class_name: str, **style) -> None:
    """A figure of a method and class over the size of the collection."""
    points = [(row["n"], row[key]) for row in rows
              if row["method"] == method and row["class"] == class_name]
    axes.plot(*zip(*points, strict=True), "o-", **style)


def print_table(rows: list[dict]) -> None:
    """The rows of all classes together, with the least and greatest coverage of a class."""
    print(f"{'source':<10} {'n':>6} {'method':<14} {'MAE':>6} {'coverage':>9} {'by class':>14} "
          f"{'width':>6} {'warned':>7}")
    for row in rows:
        if row["class"] != "all":
            continue
        by_class = [other["coverage"] for other in rows if other["class"] != "all"
                    and all(other[key] == row[key] for key in ("source", "n", "method"))]
        print(f"{row['source']:<10} {row['n']:>6} {row['method']:<14} {row['mae']:>6.2f} "
              f"{row['coverage']:>8.1f}% {min(by_class):>6.1f}-{max(by_class):>5.1f}% "
              f"{row['width']:>6.1f} {row['warned']:>6.1f}%")


# ---------------------------------------------------------------------------------- with QuaPy
def quapy_shares(probs: np.ndarray, val_probs: np.ndarray,
                 val_labels: np.ndarray) -> dict[str, np.ndarray]:
    """QuaPy's estimates (C,) by the methods of both projects, from the same probabilities.

    Moreo, Esuli, Sebastiani, "QuaPy: a Python-based framework for quantification", 2021.
    """
    from quapy.method.aggregative import ACC, EMQ, PACC

    probs, val_probs = probs.astype(np.float64), val_probs.astype(np.float64)
    classes = np.arange(probs.shape[1])
    counted = np.bincount(probs.argmax(1), minlength=len(classes)) / len(probs)
    hard = ACC.getPteCondEstim(classes, val_labels, val_probs.argmax(1))
    soft = PACC.getPteCondEstim(classes, val_labels, val_probs)
    estimates = {name: ACC.solve_adjustment(matrix, means, method="inversion", solver="minimize")
                 for name, matrix, means in (("adjusted", hard, counted),
                                             ("probabilistic", soft, probs.mean(0)))}
    prior = np.bincount(val_labels) / len(val_labels)
    return {**estimates, "em": EMQ.EM(prior, probs, epsilon=1e-8)[0]}


def print_quapy(sets: dict, compositions: int, n: int, seed: int) -> None:
    """Largest difference of a share from QuaPy's, over a collection of n faces per composition."""
    largest: dict[str, float] = {}
    for composition in range(compositions):
        rng = np.random.default_rng([seed, composition])
        counts = whole_counts(draw_composition(composition, sets["val"][0].shape[1], rng), n)
        probs = sets["test"][0][draw_rows(sets["test"][1], counts, rng)]
        entries = estimate_shares(probs, *sets["val"], n_boot=2, methods=METHODS)["methods"]
        for name, estimate in quapy_shares(probs, *sets["val"]).items():
            difference = abs(estimate - entries[name]["shares"]).max()
            largest[name] = max(largest.get(name, 0), difference)
    print("largest difference from QuaPy, points:",
          ", ".join(f"{name} {100 * value:.1g}" for name, value in largest.items()))


def list_jobs(args: argparse.Namespace) -> list[tuple]:
    """(source, reference faces, n, composition, repeat) of every collection."""
    sources = [("test", 0), ("resplit", 0)]
    if args.other:
        sources += [("other", 0), *((f"other+{n}", n) for n in args.reference if n)]
    return [(*source, n, composition, repeat) for source in sources for n in args.sizes
            for composition in range(args.compositions) for repeat in range(args.repeats)]


def main(argv: list[str] | None = None) -> None:
    """Reads the predictions, estimates the shares of every collection, writes table and figure."""
    parser, args = parse_args(argv)
    try:
        checkpoint = load_checkpoint(args.ckpt)
    except CheckpointError as error:
        parser.error(f"--ckpt {args.ckpt}: {error}")
    if checkpoint.calibration is None:
        parser.error(f"--ckpt {args.ckpt}: has no calibration; evaluate.py --calibrate fits one")
    if args.quapy and find_spec("quapy") is None:
        parser.error("--quapy: QuaPy is not installed (pip install quapy)")
    classes, calibration = checkpoint.spec.classes, checkpoint.calibration
    output_dir = cli.output_folder(parser, "--output_dir", args.output_dir)
    sets = {"val": (calibration.val_probs.numpy(), calibration.val_labels.numpy()),
            "test": read_predictions(parser, "--test", args.test, len(classes))}
    if args.other:
        sets["other"] = read_predictions(parser, "--other", args.other, len(classes))
    jobs = list_jobs(args)
    work = partial(one_collection, sets=sets, seed=args.seed, n_boot=args.n_boot)
    with ProcessPoolExecutor(args.num_workers) if args.num_workers > 1 else nullcontext() as pool:
        done = pool.map(work, jobs, chunksize=20) if pool else map(work, jobs)
        results = list(tqdm(done, total=len(jobs), unit="collection", disable=None))
    rows = summarise(results, classes)
    write_table(rows, output_dir / "shares_benchmark.csv")
    draw_figure(rows, classes, output_dir / "shares_benchmark.png")
    print_table(rows)
    if args.quapy:
        print_quapy(sets, args.compositions, min(args.sizes), args.seed)
    print(f"wrote {output_dir / 'shares_benchmark.csv'} and shares_benchmark.png")


if __name__ == "__main__":
    main()
