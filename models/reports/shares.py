"""Quantification: group shares of a collection of faces, with 95 % intervals.

A count of predicted labels is biased by the classifier's confusions: what it misses of a large
group it adds to the small groups. Three estimates, for n faces, C classes and m validation faces:

    raw             classify and count: counts of the predicted labels
    adjusted        adjusted classify and count (ACC): the counts q are solved for the shares p in
                    q = A p, where column k of A is the mean of the one-hot predictions of the
                    validation faces of class k (Lipton, Wang, Smola, "Detecting and correcting for
                    label shift with black box predictors", 2018)
    probabilistic   probabilistic ACC (PACC): the same with mean probabilities in place of counts
                    (Bella et al., "Quantification via probability estimators", 2010)

ACC and PACC assume label shift: faces of one class look as they did in validation. `fit_test`
tests that.

*Intervals.* A replicate draws a composition near the estimated one, then as many validation faces
of each class: a collection of known shares. The validation faces are resampled as well, class by
class, and the estimator corrects the collection by them. The replicates' errors give the interval,
centred on the estimate *before* its projection onto the simplex, then clipped to 0..1. There are
two reasons. An interval for the *source*, which resampling the rows of `probs` would give, is too
wide for the faces at hand: it held their shares in 160 of 160 simulated cases. And estimates on the
simplex pile up at 0 for an absent class, where their percentiles mean little; the unconstrained
estimate errs to both sides there as elsewhere. Coverage of the default method over random
validation and test halves of UTKFace (benchmarks/shares.py): 95.0, 94.6 and 94.9 % at 200, 1,000
and 5,000 faces.

*Repeated pictures* (rows equal to the last digit) share their error. They count in the estimate as
often as they occur, and in its uncertainty as one picture. Rows rounded to six decimals or fewer
are never taken as repeated: among confident faces, such rows are often equal by chance.
"""
import itertools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.faces.calibration import Calibration
from models.reports.tally import Tally
from models.running.files import atomic_write

# benchmarks/shares.py, 1,000 faces: a mean error of 0.54 points (raw 2.53, EM 1.06) within the
# domain, and of 2.7 out of domain with 300 labelled faces of that domain, which EM cannot use (6
# points).
DEFAULT_METHOD = "probabilistic"
MIN_FACES = 20              # below, intervals are too wide to say anything
CONFIDENCE_BINS = 5         # per predicted label, in the test of the assumption
FIT_LEVEL = 0.01            # p value below which the warning is given
MIN_PROB = 1e-9             # probabilities are raised to it: no face is impossible
# With labelled faces of the user (the reference), validation counts as this many faces per class.
# On simulated shifts, the mean error of a share with 50 reference faces is 6.5 points by these
# alone, 5.9 by validation alone and 4.8 with a prior of 10; with 300 faces 3.4, 5.9 and 3.1. Priors
# of 5 and 20 do about as well. On FairFace by the UTKFace model (benchmarks/shares.py, 1,000
# faces): 7.3 points without a reference; 4.7, 4.0 and 2.7 with 50, 100 and 300 faces.
REFERENCE_PRIOR_FACES = 10

Labelled = tuple[np.ndarray, np.ndarray]        # probabilities (m, C) and labels (m,)


def estimate_shares(probs: np.ndarray, val_probs: np.ndarray, val_labels: np.ndarray, *,
                    n_boot: int = 500, seed: int = 0, reference: Labelled | None = None,
                    methods: Mapping[str, Callable] | None = None) -> dict:
    """Shares of the classes among n faces, with 95 % intervals; plain values, ready for JSON.

    probs (n, C) are the calibrated probabilities of the faces, n may be 0; val_probs (m, C) and
    val_labels (m,) the validation faces of the error model. reference: probabilities (r, C) and
    labels (r,) of labelled faces of the same kind; the error model is then estimated from them,
    with the validation faces as a prior of REFERENCE_PRIOR_FACES faces of each class. methods:
    estimators by name, each a function of Evidence; METHODS by default.

        n, n_distinct, n_val, n_reference, default (the method to quote),
        counts (C,) of predicted labels
        methods[name]: shares (C,), None if n is 0; low, high (C,), the interval of the share among
                       these faces; source_low, source_high (C,), of the share in the population
                       from which these faces were drawn at random
        fit: p_value, the probability of so poor a fit if these faces look like the validation
             faces; None if n is 0
        warning: a sentence for the reader if they do not fit, else ""

    Raises ValueError for shapes that do not match, rows that are not probabilities, and a class
    without a validation face.
    """
    methods = METHODS if methods is None else methods
    probs, val, own = check_inputs(probs, val_probs, val_labels, reference)
    n, n_classes = probs.shape
    report = {"n": n, "n_distinct": 0, "n_val": len(val[1]), "n_reference": len(own[1]),
              "default": DEFAULT_METHOD,
              "counts": np.bincount(probs.argmax(1), minlength=n_classes).tolist()}
    if n == 0:
        nothing = {"shares": None, "low": [0.0] * n_classes, "high": [1.0] * n_classes,
                   "source_low": [0.0] * n_classes, "source_high": [1.0] * n_classes}
        return {**report, "methods": {name: dict(nothing) for name in methods},
                "fit": {"p_value": None}, "warning": ""}
    faces, copies = distinct_faces(probs)
    rng = np.random.default_rng(seed)
    model = ErrorModel(*val, *own)
    evidence = Evidence(faces, copies, model, Replicates(model, faces, copies, n_boot, rng), rng)
    entries = {name: estimate(evidence) for name, estimate in methods.items()}
    p_value = fit_test(evidence)
    return {**report, "n_distinct": len(faces), "methods": entries, "fit": {"p_value": p_value},
            "warning": warning_text(p_value)}


def check_inputs(probs: np.ndarray, val_probs: np.ndarray, val_labels: np.ndarray,
                 reference: Labelled | None) -> tuple[np.ndarray, Labelled, Labelled]:
    """Inputs as float64 and int64 arrays; no reference as an empty one. Raises ValueError."""
    probs = np.asarray(probs, dtype=np.float64)
    val_probs = np.asarray(val_probs, dtype=np.float64)
    if probs.ndim != 2 or val_probs.ndim != 2 or probs.shape[1] != val_probs.shape[1]:
        raise ValueError("shares expect probs (n, C) and val_probs (m, C), "
                         f"got {probs.shape} and {val_probs.shape}")
    n_classes = probs.shape[1]
    check_probs("probs", probs)
    val = check_labelled("val", val_probs, val_labels, n_classes)
    own_probs, own_labels = reference or (np.empty((0, n_classes)), np.empty(0))
    own = check_labelled("reference", own_probs, own_labels, n_classes)
    missing = np.flatnonzero(np.bincount(val[1], minlength=n_classes) == 0)
    if len(missing):
        raise ValueError(f"shares: class {missing[0]} has no validation face, so its error rates "
                         "are unknown")
    return probs, val, own


def check_probs(name: str, probs: np.ndarray) -> None:
    """Raises ValueError unless each row sums to 1, within the precision of two written digits."""
    is_finite = np.isfinite(probs).all()
    if not is_finite or (probs < 0).any() or (abs(probs.sum(1) - 1) > 1e-2).any():
        raise ValueError(f"shares: {name} has rows that are not probabilities")


def check_labelled(name: str, probs: np.ndarray, labels: np.ndarray,
                   n_classes: int) -> Labelled:
    """Labelled faces: probs (m, C) float64 and labels (m,) int64. Raises ValueError."""
    probs, labels = np.asarray(probs, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if probs.shape != (len(labels), n_classes):
        raise ValueError(f"shares expect {name}_probs ({len(labels)}, {n_classes}) for as many "
                         f"{name}_labels, got {probs.shape}")
    check_probs(f"{name}_probs", probs)
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise ValueError(f"shares: {name}_labels reach from {labels.min()} to {labels.max()}, "
                         f"there are {n_classes} classes")
    return probs, labels


def distinct_faces(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows (u, C) of probs (n, C), and the number of copies of each (u,)."""
    is_rounded = (abs(probs * 1e6 - np.rint(probs * 1e6)) < 1e-4).all(1)
    keys = np.column_stack([probs, np.where(is_rounded, np.arange(len(probs)), -1)])
    keys, copies = np.unique(keys, axis=0, return_counts=True)
    return keys[:, :-1], copies


# ------------------------------------------------------------------------------ error model
class ErrorModel:
    """The classifier's outputs on faces of each class: validation faces and the user's reference.

    probs (m, C) of all of them. rows[k]: those of class k; weights[k]: their weights, which sum to
    1; sizes[k]: the number of faces that they count as. prior (C,): the class shares of validation,
    under which probs are calibrated.
    """

    def __init__(self, val_probs: np.ndarray, val_labels: np.ndarray, own_probs: np.ndarray,
                 own_labels: np.ndarray):
        self.probs = np.concatenate([val_probs, own_probs])
        self.prior = np.bincount(val_labels) / len(val_labels)
        self.sizes = np.zeros(len(self.prior), dtype=np.int64)
        self.rows, self.weights = [], []
        for k in range(len(self.prior)):
            val_rows, own_rows = np.flatnonzero(val_labels == k), np.flatnonzero(own_labels == k)
            n_val = len(val_rows)
            val_size = min(REFERENCE_PRIOR_FACES, n_val) if len(own_labels) else n_val
            weights = np.repeat([val_size / n_val, 1.0], [n_val, len(own_rows)])
            self.sizes[k] = val_size + len(own_rows)
            self.rows.append(np.append(val_rows, len(val_probs) + own_rows))
            self.weights.append(weights / weights.sum())

    def class_means(self, features: np.ndarray) -> np.ndarray:
        """features (m, F) of the model's faces -> their mean per class, (F, C)."""
        means = [weights @ features[rows]
                 for rows, weights in zip(self.rows, self.weights, strict=True)]
        return np.stack(means, 1)


class Replicates:
    """B collections of known shares, made of validation faces, each with its own validation set.

    centre (C,): the shares of the source; shares (B, C): those of each collection.
    faces_per_class (C,): how many distinct faces the collection at hand has of each class. drawn[k]
    and resampled[k] (B, m_k): the weight of each validation face of class k in the collection's
    part of that class, and in the validation set.
    """

    def __init__(self, model: ErrorModel, faces: np.ndarray, copies: np.ndarray, n_boot: int,
                 rng: np.random.Generator):
        n = copies.sum()
        estimate = simplex_least_squares(model.class_means(model.probs), copies @ faces / n)
        # Half a face more of each class: a class that seems absent occurs in part of the
        # collections.
        self.centre = (n * estimate + 0.5) / (n + 0.5 * len(estimate))
        posterior = np.maximum(faces, MIN_PROB) / model.prior * self.centre
        posterior /= posterior.sum(1, keepdims=True)
        distinct = (copies @ posterior) / (copies ** 2 @ posterior)     # (C,), 1 without repetition
        self.faces_per_class = n * self.centre * distinct
        n_distinct = max(1, round(n ** 2 / (copies ** 2).sum()))
        self.shares = rng.multinomial(n_distinct, self.centre, n_boot) / n_distinct
        sizes = np.maximum(1, np.rint(n * self.shares * distinct)).astype(np.int64)
        self.drawn = [draw_weights(sizes[:, k], weights, rng)
                      for k, weights in enumerate(model.weights)]
        self.resampled = [draw_weights(np.full(n_boot, size), weights, rng)
                          for size, weights in zip(model.sizes, model.weights, strict=True)]

    def collection_means(self, features: np.ndarray, model: ErrorModel) -> np.ndarray:
        """features (m, F) of the model's faces -> their mean in each collection, (B, F)."""
        return sum(self.shares[:, [k]] * (self.drawn[k] @ features[rows])
                   for k, rows in enumerate(model.rows))

    def class_means(self, features: np.ndarray, model: ErrorModel) -> np.ndarray:
        """features (m, F) of the model's faces -> mean per class and validation set, (B, F, C)."""
        means = [self.resampled[k] @ features[rows] for k, rows in enumerate(model.rows)]
        return np.stack(means, 2)


@dataclass
class Evidence:
    """What an estimator uses: faces (u, C), each copies (u,) times; error model; replicates."""
    faces: np.ndarray
    copies: np.ndarray
    model: ErrorModel
    replicates: Replicates
    rng: np.random.Generator


def draw_weights(sizes: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """sizes (B,) draws with replacement by weights (m,), as relative frequencies (B, m)."""
    m = len(weights)
    if sizes.sum() > 4 * len(sizes) * m:        # single draws would take much memory
        counts = rng.multinomial(sizes, weights)
    else:                                       # several times as fast as the multinomial
        n_draws, is_uniform = sizes.sum(), (weights == weights[0]).all()
        drawn = rng.integers(m, size=n_draws) if is_uniform else rng.choice(m, n_draws, p=weights)
        cells = np.repeat(np.arange(len(sizes)) * m, sizes) + drawn
        counts = np.bincount(cells, minlength=len(sizes) * m)
    return counts.reshape(-1, m) / sizes[:, None]


# ------------------------------------------------------------------------------- estimators
def one_hot_predictions(probs: np.ndarray) -> np.ndarray:
    """probs (n, C) -> (n, C) float64, 1 at the largest of each row."""
    return np.eye(probs.shape[1])[probs.argmax(1)]


def simplex_least_squares(A: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The shares p (C,), non-negative and summing to 1, that minimise |A p - q|.

    The optimum is 0 for a subset of the classes and solves the rest under the one equation. All
    2^C - 1 subsets are tried, and the best without a negative share is exact. For few classes only.
    """
    n_classes = A.shape[1]
    best, least = np.full(n_classes, 1 / n_classes), np.inf
    for size in range(1, n_classes + 1):
        for support in map(list, itertools.combinations(range(n_classes), size)):
            B = A[:, support]
            system = np.ones((size + 1, size + 1))
            system[:size, :size], system[size, size] = B.T @ B, 0
            solution = np.linalg.lstsq(system, np.append(B.T @ q, 1), rcond=None)[0][:size]
            if solution.min() < 0:
                continue
            p = np.zeros(n_classes)
            p[support] = solution / solution.sum()
            if (error := float(np.linalg.norm(A @ p - q))) < least:
                best, least = p, error
    return best


def with_intervals(shares: np.ndarray, free: np.ndarray, errors: np.ndarray,
                   source_errors: np.ndarray) -> dict:
    """A method's entry in the report.

    shares (C,) lie on the simplex; intervals are centred on the unconstrained estimate `free` (C,).
    errors, source_errors (B, C): of the replicates' unconstrained estimates.
    """
    entry = {"shares": shares.tolist()}
    for prefix, sample in (("", errors), ("source_", source_errors)):
        upper, lower = np.quantile(sample, [0.975, 0.025], axis=0)
        # The projection onto the simplex may move an estimate just out of its interval.
        entry[f"{prefix}low"] = np.minimum(np.clip(free - upper, 0, 1), shares).tolist()
        entry[f"{prefix}high"] = np.maximum(np.clip(free - lower, 0, 1), shares).tolist()
    return entry


def raw_shares(evidence: Evidence) -> dict:
    """Classify and count; the interval covers the sampling error, not misclassification."""
    counts = (evidence.copies @ one_hot_predictions(evidence.faces)).astype(np.int64)
    shares, n_boot = counts / counts.sum(), len(evidence.replicates.shares)
    errors = evidence.rng.multinomial(counts.sum(), shares, n_boot) / counts.sum() - shares
    return with_intervals(shares, shares, errors, errors)


def adjusted_shares(evidence: Evidence) -> dict:
    """Adjusted classify and count (ACC)."""
    return solve_mixture(evidence, one_hot_predictions(evidence.faces),
                         one_hot_predictions(evidence.model.probs))


def probabilistic_shares(evidence: Evidence) -> dict:
    """Probabilistic adjusted classify and count (PACC)."""
    return solve_mixture(evidence, evidence.faces, evidence.model.probs)


def solve_mixture(evidence: Evidence, features: np.ndarray, val_features: np.ndarray) -> dict:
    """Shares by which the mean of features (u, F) mixes the class means of val_features (m, F)."""
    model, replicates, copies = evidence.model, evidence.replicates, evidence.copies
    A, q = model.class_means(val_features), copies @ features / copies.sum()
    free = np.linalg.pinv(A) @ q
    estimates = np.linalg.pinv(replicates.class_means(val_features, model)) \
        @ replicates.collection_means(val_features, model)[:, :, None]
    estimates = estimates[:, :, 0]
    return with_intervals(simplex_least_squares(A, q), free, estimates - replicates.shares,
                          estimates - replicates.centre)


METHODS = {"raw": raw_shares, "adjusted": adjusted_shares, "probabilistic": probabilistic_shares}


# --------------------------------------------------------------- the test of the assumption
def fit_test(evidence: Evidence) -> float:
    """p value of the hypothesis of label shift: faces of each class look as in validation.

    The faces are counted in cells of predicted label and confidence. Under the hypothesis the
    counts are a mixture of those of the validation classes. The statistic is the squared distance
    to the nearest mixture in units of its sampling noise (a minimum chi-square); the replicates
    give its distribution.
    """
    faces, model, replicates = evidence.faces, evidence.model, evidence.replicates
    cells = confidence_cells(faces, model.probs)
    val_cells = confidence_cells(model.probs, model.probs)
    H, h = model.class_means(val_cells), evidence.copies @ cells / evidence.copies.sum()
    noise = np.zeros((len(H), len(H)))
    for k, share in enumerate(replicates.centre):
        variance = share ** 2 * (1 / replicates.faces_per_class[k] + 1 / model.sizes[k])
        noise += variance * (np.diag(H[:, k]) - np.outer(H[:, k], H[:, k]))
    values, vectors = np.linalg.eigh(noise)
    is_positive = values > 1e-6 * values[-1]
    whiten = (vectors[:, is_positive] / np.sqrt(values[is_positive])).T
    observed = mixture_distance((whiten @ H)[None], (whiten @ h)[None])[0]
    simulated = mixture_distance(whiten @ replicates.class_means(val_cells, model),
                                 replicates.collection_means(val_cells, model) @ whiten.T)
    n_as_large = (simulated >= observed * (1 - 1e-9)).sum()
    return float((1 + n_as_large) / (1 + len(simulated)))


def confidence_cells(probs: np.ndarray, val_probs: np.ndarray) -> np.ndarray:
    """probs (n, C) -> (n, cells) one-hot: predicted label x quantile of validation confidence."""
    parts = []
    for k in range(probs.shape[1]):
        confidence = val_probs[val_probs.argmax(1) == k, k]
        n_bins = int(np.clip(len(confidence) // 10, 1, CONFIDENCE_BINS))
        levels = np.arange(1, n_bins) / n_bins
        edges = np.quantile(confidence, levels) if len(confidence) else []
        cell = np.searchsorted(edges, probs[:, k], side="right")
        parts.append(np.eye(n_bins)[cell] * (probs.argmax(1) == k)[:, None])
    return np.concatenate(parts, 1)


def mixture_distance(H: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Squared distance (B,) of h (B, F) to the affine hull of the columns of H (B, F, C)."""
    base, directions = h - H[:, :, 0], H[:, :, 1:] - H[:, :, :1]
    nearest = directions @ (np.linalg.pinv(directions) @ base[:, :, None])
    return np.square(base - nearest[:, :, 0]).sum(1)


def warning_text(p_value: float) -> str:
    """A sentence for the reader if the assumption does not hold, else ""."""
    if p_value >= FIT_LEVEL:
        return ""
    return ("These pictures do not look like the validation pictures to the classifier "
            f"(p = {p_value:.3g}). Treat the shares as rough: their intervals do not cover errors "
            "that differ from validation's. Labelling some of these pictures and correcting by "
            "those helps.")


# ------------------------------------------------------------------------------- the report
def report_shares(tally: Tally, calibration: Calibration | None, classes: tuple[str, ...],
                  output_dir: Path, *, with_groups: bool = False,
                  reference: Labelled | None = None) -> None:
    """Prints the estimated shares and writes them to shares.json and shares.png in output_dir.

    tally: of the predictions.csv; with_groups: also report each of its groups. calibration: of the
    checkpoint that made the predictions. reference: probabilities and labels of labelled faces of
    the same kind. If no estimate is possible, the reason is printed and the files of an earlier run
    are removed. Raises ValueError as estimate_shares does.
    """
    for name in ("shares.json", "shares.png"):
        (output_dir / name).unlink(missing_ok=True)
    if calibration is None or len(tally.probs) < MIN_FACES:
        print(f"shares: {no_shares_reason(len(tally.probs))}")
        return
    if reference and not len(reference[1]):
        print("--reference: no face was found, so the shares rest on validation faces alone")

    def estimate(probs: np.ndarray) -> dict:
        return estimate_shares(probs, calibration.val_probs.numpy(),
                               calibration.val_labels.numpy(), reference=reference)

    report, groups = estimate(tally.probs), {}
    for i, name in enumerate(tally.group_names):
        if (tally.groups == i).sum() >= MIN_FACES:
            groups[name] = estimate(tally.probs[tally.groups == i])
    reports = {f"group {printable(name)}": group for name, group in groups.items()}
    reports = {"all": report} | reports
    for name, group in reports.items():
        title = f"\n{name}\n" if with_groups else "\n"
        print(title + format_shares(group, classes))
    if n_small := len(tally.group_names) - len(groups):
        print(f"{n_small} groups with fewer than {MIN_FACES} faces have no estimate of their own")
    content = {"classes": classes, "all": report} | ({"groups": groups} if with_groups else {})
    with atomic_write(output_dir / "shares.json") as temporary_path:
        temporary_path.write_text(json.dumps(content, indent=1))
    from models.reports.plots import draw_shares  # matplotlib is slow to import

    draw_shares(reports, classes, output_dir / "shares.png")


def no_shares_reason(n_faces: int) -> str:
    """Why no shares are estimated: too few faces, else a checkpoint without calibration."""
    if n_faces < MIN_FACES:
        return (f"{n_faces} {'face is' if n_faces == 1 else 'faces are'} too few for an estimate "
                f"(at least {MIN_FACES})")
    return ("the checkpoint is not calibrated, so its errors are unknown "
            "(evaluate.py --calibrate)")


def printable(name: str) -> str:
    """A name with the bytes that are not valid UTF-8 written as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def format_shares(report: dict, classes: tuple[str, ...]) -> str:
    """The report as a table: raw count and share, default estimate and interval of each class."""
    entry, raw = report["methods"][report["default"]], report["methods"]["raw"]
    if entry["shares"] is None:
        return "no faces, no shares"
    width = max(5, *(len(name) for name in classes))
    lines = [f"{'class':<{width}} {'counted':>8} {'raw':>7} {'estimate':>9}   95 % interval"]
    for k, name in enumerate(classes):
        interval = f"{entry['low'][k]:.1%} to {entry['high'][k]:.1%}"
        lines.append(f"{name:<{width}} {report['counts'][k]:>8} {raw['shares'][k]:>7.1%} "
                     f"{entry['shares'][k]:>9.1%}   {interval}")
    own = report["n_reference"]
    own_text = f"{own} labelled faces of your own and " if own else ""
    lines.append(f"{report['n']} faces; estimate: {report['default']} count, corrected by the "
                 f"error rates on {own_text}{report['n_val']} validation faces")
    if report["warning"]:
        lines.append(f"warning: {report['warning']}")
    return "\n".join(lines)
