"""How far group shares of a collection are off, and how often their 95 % intervals hold the truth.

Draws collections of known composition from labelled faces that a classifier has answered, and estimates their shares:
  test       from the test split, as it stands, by the error model of the checkpoint
  resplit    the same, validation and test faces dealt anew within each class for every collection: what "95 %" says is
             a rate over validation sets too, and one split shows one of them
  other      from another set, where the error model is wrong
  other+50   the same, with 50 (100, 300) faces of that set labelled and given as the reference
Compositions are uniform on the simplex, every fourth without one of its classes; classes too small for a collection
are drawn from with replacement.

Reads   --ckpt, and <name>_probs.npz files that evaluate.py --save_probs wrote.
Writes  <out_dir>/shares_benchmark.csv, a row per source, size, method and class, and shares_benchmark.png.

    python evaluate.py --data data/utk_published --save_probs
    python evaluate.py --data data/FairFace_val --name fairface_val --save_probs \\
        --class_map East_Asian=Asian,Southeast_Asian=Asian
    python benchmarks/shares.py --test visualizations/test_probs.npz --other visualizations/fairface_val_probs.npz
"""
import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")             # one process per core, each with small matrices
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from models.faces.checkpoint import CheckpointError, load_checkpoint
from models.reports.shares import DEFAULT_METHOD, METHODS, estimate_shares
from models.running import cli

COLUMNS = ("source", "n", "method", "class", "collections", "mae", "coverage", "coverage_of_source_interval", "width",
           "warned")
COLOURS = {"raw": "0.45", "adjusted": "tab:orange", "probabilistic": "tab:blue", "em": "tab:green"}


def parse_args(argv: list[str] | None = None):
    """The parser and the checked command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--ckpt", default="checkpoints/resnet18_utk.pt", help="whose calibration is the error model (%(default)s)")
    add("--test", default="visualizations/test_probs.npz", help="answers on the test split (%(default)s)")
    add("--other", help="answers on another set, e.g. visualizations/fairface_val_probs.npz")
    add("--sizes", type=cli.positive_int, nargs="+", default=[200, 1000, 5000], help="faces in a collection")
    add("--compositions", type=cli.positive_int, default=100, help="true compositions per size (%(default)s)")
    add("--repeats", type=cli.positive_int, default=4, help="collections per composition (%(default)s)")
    add("--reference", type=cli.non_negative_int, nargs="*", default=[50, 100, 300], help="faces of --other labelled")
    add("--n_boot", type=cli.positive_int, default=500, help="replicates behind an interval (%(default)s)")
    add("--workers", type=cli.positive_int, default=cli.worker_count(), help="processes (%(default)s)")
    add("--quapy", action="store_true", help="also print how far QuaPy's estimates are from these (pip install quapy)")
    add("--out_dir", default="visualizations", help="where the table and the figure go (%(default)s)")
    add("--seed", type=cli.non_negative_int, default=0, help="of compositions, draws and replicates (%(default)s)")
    return parser, parser.parse_args(argv)


def read_answers(parser: cli.Parser, flag: str, path: str, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """probs (n, C) and labels (n,) of a file of answers, or the one-line error."""
    try:
        with np.load(path, allow_pickle=False) as file:
            probs, labels = file["probs"], file["labels"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{flag} {path}: no answers of evaluate.py --save_probs ({error})")
    if probs.ndim != 2 or probs.shape != (len(labels), n_classes):
        parser.error(f"{flag} {path}: probs are {probs.shape} for {len(labels)} labels, the checkpoint has "
                     f"{n_classes} classes")
    return probs, labels


# ---------------------------------------------------------------------------------------------------------- the draws
def draw_composition(number: int, n_classes: int, rng: np.random.Generator) -> np.ndarray:
    """True shares (C,), uniform on the simplex; of every fourth composition one class is absent."""
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
    """Rows of a collection with counts (C,) of each class; with replacement where a class has too few."""
    rows = [np.flatnonzero(labels == k) for k in range(len(counts))]
    return np.concatenate([rng.choice(mine, count, replace=count > len(mine))
                           for mine, count in zip(rows, counts, strict=True)])


def redeal(a: tuple, b: tuple, rng: np.random.Generator) -> tuple[tuple, tuple]:
    """Two labelled sets (probs, labels) mixed and dealt out again, as many of each class to each as before."""
    probs, labels = (np.concatenate(parts) for parts in zip(a, b, strict=True))
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    n_first, n_class = np.bincount(a[1]), np.bincount(labels)
    place = np.arange(len(labels)) - np.repeat(n_class.cumsum() - n_class, n_class)
    first = place < np.repeat(n_first, n_class)
    return tuple((probs[rows], labels[rows]) for rows in (order[first], order[~first]))


def one_collection(job: tuple, sets: dict, seed: int, n_boot: int) -> dict:
    """One collection drawn and estimated; job is (source, own labelled faces, n, composition, repeat)."""
    source, n_own, n, composition, repeat = job
    shares = draw_composition(composition, sets["val"][0].shape[1], np.random.default_rng([seed, composition]))
    rng = np.random.default_rng([seed, composition, repeat, n, n_own, *source.encode()])
    val, pool, own = sets["val"], sets["other" if source.startswith("other") else "test"], None
    if source == "resplit":
        val, pool = redeal(val, pool, rng)
    if n_own:
        order = rng.permutation(len(pool[1]))
        own, pool = (tuple(part[rows] for part in pool) for rows in (order[:n_own], order[n_own:]))
    counts = whole_counts(shares, n)
    probs = pool[0][draw_rows(pool[1], counts, rng)]
    report = estimate_shares(probs, *val, n_boot=n_boot, seed=repeat, reference=own)
    return {"source": source, "n": n, "truth": counts / n, "report": report}


# --------------------------------------------------------------------------------------------------------- the figures
def summarise(results: list[dict], classes) -> list[dict]:
    """Rows of the table, in points of a share: per source, size and method, for each class and for all together."""
    rows = []
    for source, n in dict.fromkeys((result["source"], result["n"]) for result in results):
        mine = [result for result in results if (result["source"], result["n"]) == (source, n)]
        truth = np.stack([result["truth"] for result in mine])                                  # (collections, C)
        warned = np.mean([bool(result["report"]["warning"]) for result in mine])
        for method in METHODS:
            entries = [result["report"]["methods"][method] for result in mine]
            shares, low, high, source_low, source_high = (
                np.array([entry[key] for entry in entries])
                for key in ("shares", "low", "high", "source_low", "source_high"))
            figures = {"mae": 100 * abs(shares - truth), "width": 100 * (high - low),
                       "coverage": 100 * holds(low, truth, high),
                       "coverage_of_source_interval": 100 * holds(source_low, truth, source_high)}
            for k, name in [*enumerate(classes), (slice(None), "all")]:
                rows.append({"source": source, "n": n, "method": method, "class": name, "collections": len(mine),
                             **{key: round(float(values[:, k].mean()), 2) for key, values in figures.items()},
                             "warned": round(float(100 * warned), 1)})
    return rows


def holds(low: np.ndarray, truth: np.ndarray, high: np.ndarray) -> np.ndarray:
    """1.0 where low <= truth <= high, to rounding."""
    return ((low <= truth + 1e-9) & (truth <= high + 1e-9)).astype(np.float64)


def write_table(rows: list[dict], path: Path) -> None:
    """The rows as CSV."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def draw_figure(rows: list[dict], classes, path: Path) -> None:
    """Per source: mean absolute error of each method by size, and below it the coverage of the default per class."""
    from matplotlib.figure import Figure

    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure = Figure(figsize=(2.9 * len(sources), 6), layout="constrained")
    axes = figure.subplots(2, len(sources), sharex=True, sharey="row", squeeze=False)
    for column, source in enumerate(sources):
        mine = [row for row in rows if row["source"] == source]
        for method in METHODS:
            some = [row for row in mine if row["method"] == method and row["class"] == "all"]
            axes[0, column].plot([row["n"] for row in some], [row["mae"] for row in some], "o-", label=method,
                                 color=COLOURS[method])
        for name in classes:
            some = [row for row in mine if row["method"] == DEFAULT_METHOD and row["class"] == name]
            axes[1, column].plot([row["n"] for row in some], [row["coverage"] for row in some], "o-", label=name)
        axes[1, column].axhspan(93, 97, color="0.9", zorder=0)
        axes[0, column].set(title=source, xscale="log")
        sizes = sorted({row["n"] for row in mine})
        axes[1, column].set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes[1, column].minorticks_off()
        axes[1, column].set(xlabel="faces in the collection", ylim=(0, 101))
    axes[0, 0].set_ylim(bottom=0)                       # shared by the row, so set when all is drawn
    axes[0, 0].set_ylabel("mean absolute error, points")
    axes[1, 0].set_ylabel(f"95 % interval, {DEFAULT_METHOD}:\ncoverage, %")
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def print_table(rows: list[dict]) -> None:
    """The lines about all classes together, and the default's least and greatest coverage of a class."""
    print(f"{'source':<10} {'n':>6} {'method':<14} {'MAE':>6} {'coverage':>9} {'of a class':>14} {'width':>6} "
          f"{'warned':>7}")
    for row in rows:
        if row["class"] != "all":
            continue
        of_class = [other["coverage"] for other in rows if other["class"] != "all"
                    and all(other[key] == row[key] for key in ("source", "n", "method"))]
        print(f"{row['source']:<10} {row['n']:>6} {row['method']:<14} {row['mae']:>6.2f} {row['coverage']:>8.1f}% "
              f"{min(of_class):>6.1f}-{max(of_class):>5.1f}% {row['width']:>6.1f} {row['warned']:>6.1f}%")


# ---------------------------------------------------------------------------------------------------------- with QuaPy
def quapy_shares(probs: np.ndarray, val_probs: np.ndarray, val_labels: np.ndarray) -> dict[str, np.ndarray]:
    """QuaPy's estimates (C,) of the methods that both know, from the same probabilities.

    Moreo, Esuli, Sebastiani, "QuaPy: a Python-based framework for quantification", 2021.
    """
    from quapy.method.aggregative import ACC, EMQ, PACC

    probs, val_probs = probs.astype(np.float64), val_probs.astype(np.float64)
    classes = np.arange(probs.shape[1])
    counted = np.bincount(probs.argmax(1), minlength=len(classes)) / len(probs)
    matrices = {"adjusted": (ACC.getPteCondEstim(classes, val_labels, val_probs.argmax(1)), counted),
                "probabilistic": (PACC.getPteCondEstim(classes, val_labels, val_probs), probs.mean(0))}
    shares = {name: ACC.solve_adjustment(matrix, counts, method="inversion", solver="minimize")
              for name, (matrix, counts) in matrices.items()}
    prior = np.bincount(val_labels) / len(val_labels)
    return {**shares, "em": EMQ.EM(prior, probs, epsilon=1e-8)[0]}


def print_quapy(sets: dict, args) -> None:
    """The largest difference of a share between QuaPy and this project, over one collection per composition."""
    largest = {}
    for composition in range(args.compositions):
        rng = np.random.default_rng([args.seed, composition])
        counts = whole_counts(draw_composition(composition, sets["val"][0].shape[1], rng), min(args.sizes))
        probs = sets["test"][0][draw_rows(sets["test"][1], counts, rng)]
        ours = estimate_shares(probs, *sets["val"], n_boot=2)["methods"]
        for name, shares in quapy_shares(probs, *sets["val"]).items():
            largest[name] = max(largest.get(name, 0), abs(shares - ours[name]["shares"]).max())
    print("largest difference from QuaPy, points:", ", ".join(f"{k} {100 * v:.1g}" for k, v in largest.items()))


def main(argv: list[str] | None = None) -> None:
    parser, args = parse_args(argv)
    try:
        checkpoint = load_checkpoint(args.ckpt)
    except CheckpointError as error:
        parser.error(f"--ckpt {args.ckpt}: {error}")
    if checkpoint.calibration is None:
        parser.error(f"--ckpt {args.ckpt}: it has no calibration; evaluate.py --calibrate makes it")
    if args.quapy and find_spec("quapy") is None:
        parser.error("--quapy: it is not installed (pip install quapy)")
    classes, calibration = checkpoint.spec.classes, checkpoint.calibration
    out_dir = cli.output_folder(parser, "--out_dir", args.out_dir)
    sets = {"val": (calibration.val_probs.numpy(), calibration.val_labels.numpy()),
            "test": read_answers(parser, "--test", args.test, len(classes))}
    sources = [("test", 0), ("resplit", 0)]
    if args.other:
        sets["other"] = read_answers(parser, "--other", args.other, len(classes))
        sources += [("other", 0), *((f"other+{n_own}", n_own) for n_own in args.reference if n_own)]
    jobs = [(*source, n, composition, repeat) for source in sources for n in args.sizes
            for composition in range(args.compositions) for repeat in range(args.repeats)]
    work = partial(one_collection, sets=sets, seed=args.seed, n_boot=args.n_boot)
    with ProcessPoolExecutor(args.workers) if args.workers > 1 else nullcontext() as pool:
        done = pool.map(work, jobs, chunksize=20) if pool else map(work, jobs)
        results = list(tqdm(done, total=len(jobs), unit="collection", disable=None))
    rows = summarise(results, classes)
    write_table(rows, out_dir / "shares_benchmark.csv")
    draw_figure(rows, classes, out_dir / "shares_benchmark.png")
    print_table(rows)
    if args.quapy:
        print_quapy(sets, args)
    print(f"wrote {out_dir / 'shares_benchmark.csv'} and shares_benchmark.png")


if __name__ == "__main__":
    main()
