"""Group shares of a collection of faces, from a classifier's probabilities and how it erred on validation.

A count of predicted labels is biased by the classifier's own confusions: what it loses of a large group it adds to the
small ones. Four estimates, n faces, C classes, m validation faces:

    raw             counts of predicted labels, nothing corrected
    adjusted        their vector q solved for the shares p: q = A p, column k of A being the mean of the one-hot
                    predictions of the validation faces of class k (black-box shift estimation: Lipton, Wang, Smola,
                    "Detecting and correcting for label shift with black box predictors", 2018)
    probabilistic   the same with the mean probabilities in place of counts (Bella et al., "Quantification via
                    probability estimators", 2010)
    em              the maximum-likelihood shares under calibrated probabilities (Saerens, Latinne, Decaestecker,
                    "Adjusting the outputs of a classifier to new a priori probabilities", 2002)

All but the first assume that faces of one class look here as they did in validation (label shift); `fit` tests that.
"""
import itertools

import numpy as np

METHODS = ("raw", "adjusted", "probabilistic", "em")
# Within the domain em errs twice as much (1.06 against 0.54 points at 1,000 faces, raw 2.53), and it cannot use faces
# that the user labelled: on other people's pictures it stays at 6 points where this one falls to 2.7.
DEFAULT_METHOD = "probabilistic"
CONFIDENCE_BINS = 5         # per predicted label, in the test of the assumption
FIT_LEVEL = 0.01            # p value below which the warning is given
FLOOR = 1e-9                # of probabilities: no face is impossible
# Beside labelled faces of the user's own, validation counts as this many faces per class. On simulated shifts, mean
# error of a share with 50 own faces: 6.5 points by these alone, 5.9 by validation alone, 4.8 with 10; with 300:
# 3.4, 5.9, 3.1. 5 and 20 do about as well. On FairFace by the UTKFace model (benchmarks/shares.py, 1,000 faces): 7.3
# without own faces; 4.7, 4.0 and 2.7 with 50, 100 and 300.
REFERENCE_PRIOR_FACES = 10


def estimate_shares(probs: np.ndarray, val_probs: np.ndarray, val_labels: np.ndarray, *, n_boot: int = 500,
                    seed: int = 0, reference: tuple[np.ndarray, np.ndarray] | None = None) -> dict:
    """Shares of the classes among n faces, by four methods, with 95 % intervals; plain values, ready for JSON.

    probs (n, C) are the calibrated probabilities of the faces, n may be 0; val_probs (m, C) and val_labels (m,) the
    validation faces behind the error model. reference: probabilities (r, C) and labels (r,) of faces like those at
    hand, where the user labelled some; the error model is then theirs, with validation's as ten faces of each class.

        n, n_distinct, n_val, n_reference, default (the method to quote), counts (C,) of predicted labels
        methods[name]: shares (C,), None where n is 0; low, high (C,), the interval of the share among these faces;
                       source_low, source_high (C,), of the share where these faces were randomly drawn from
        fit: p_value, the probability of so poor a fit if these faces look like validation's; None where n is 0
        warning: what to tell the reader where it does not fit, else ""

    Raises ValueError for shapes that do not match, probabilities that are none, and a class without a validation face.

    *Intervals.* A replicate draws a composition near the estimated one, then for each class as many validation faces
    as it says: a collection whose true shares are known. The validation faces are drawn anew too, class by class, and
    the estimator corrects the one by the other. What it misses by makes the interval, laid about the estimate
    *before* it is forced onto the simplex, then cut at 0 and 1. For two reasons. An interval for the *source*, which
    resampling the rows of `probs` would give, is too wide for the faces at hand: it held their shares in 160 of 160
    simulated cases. And an estimate on the simplex piles up at 0 for an absent class, where its percentiles mean
    little; unconstrained, it errs to both sides of the border as it does inside. Coverage of the default over random
    validation and test halves of UTKFace (benchmarks/shares.py): 95.0, 94.6 and 94.9 % at 200, 1,000 and 5,000 faces.

    *Repeated pictures* (rows equal to the last digit) err together, so they count for the estimate as often as they
    are there, and for its uncertainty as the one picture they are. Rows rounded to six decimals or fewer are never
    taken for repeated: among sure faces, equality then means nothing.
    """
    probs, val_probs, val_labels, own_probs, own_labels = check_inputs(probs, val_probs, val_labels, reference)
    n, n_classes = probs.shape
    report = {"n": n, "n_distinct": 0, "n_val": len(val_labels), "n_reference": len(own_labels), "default": DEFAULT_METHOD,
              "counts": np.bincount(probs.argmax(1), minlength=n_classes).tolist()}
    if n == 0:
        nothing = {"shares": None, "low": [0.0] * n_classes, "high": [1.0] * n_classes,
                   "source_low": [0.0] * n_classes, "source_high": [1.0] * n_classes}
        return {**report, "methods": {name: dict(nothing) for name in METHODS},
                "fit": {"p_value": None}, "warning": ""}
    faces, copies = distinct_faces(probs)
    rng = np.random.default_rng(seed)
    model = ErrorModel(val_probs, val_labels, own_probs, own_labels)
    replicates = Replicates(model, faces, copies, n_boot, rng)
    methods = {"raw": raw_shares(report["counts"], n_boot, rng),
               "adjusted": adjusted_shares(one_hot_predictions(faces), copies, one_hot_predictions(model.probs), model,
                                           replicates),
               "probabilistic": adjusted_shares(faces, copies, model.probs, model, replicates),
               "em": em_shares(faces, copies, model, replicates)}
    p_value = fit_test(faces, copies, model, replicates)
    return {**report, "n_distinct": len(faces), "methods": methods, "fit": {"p_value": p_value},
            "warning": warning_text(p_value)}


def check_inputs(probs, val_probs, val_labels, reference) -> tuple[np.ndarray, ...]:
    """Probabilities as float64, labels as int64, no reference as one of no faces; or ValueError with what is wrong."""
    probs, val_probs = np.asarray(probs, dtype=np.float64), np.asarray(val_probs, dtype=np.float64)
    if probs.ndim != 2 or val_probs.ndim != 2 or probs.shape[1] != val_probs.shape[1]:
        raise ValueError(f"shares want probs (n, C) and val_probs (m, C), got {probs.shape} and {val_probs.shape}")
    n_classes = probs.shape[1]
    check_probs("probs", probs)
    val_probs, val_labels = check_labelled("val", val_probs, val_labels, n_classes)
    own_probs, own_labels = check_labelled("reference", *(reference or (np.empty((0, n_classes)), [])), n_classes)
    missing = np.flatnonzero(np.bincount(val_labels, minlength=n_classes) == 0)
    if len(missing):
        raise ValueError(f"shares: class {missing[0]} has no validation face, so how it is mistaken is unknown")
    return probs, val_probs, val_labels, own_probs, own_labels


def check_probs(name: str, probs: np.ndarray) -> None:
    """Raises ValueError unless each row is a distribution, to the two digits that tables are written with."""
    if not np.isfinite(probs).all() or (probs < 0).any() or (abs(probs.sum(1) - 1) > 1e-2).any():
        raise ValueError(f"shares: {name} has rows that are no probabilities")


def check_labelled(name: str, probs, labels, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Labelled faces as arrays, probs (m, C) float64 and labels (m,) int64; or ValueError."""
    probs, labels = np.asarray(probs, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if probs.shape != (len(labels), n_classes):
        raise ValueError(f"shares want {name}_probs ({len(labels)}, {n_classes}) for as many {name}_labels, "
                         f"got {probs.shape}")
    check_probs(f"{name}_probs", probs)
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise ValueError(f"shares: {name}_labels reach from {labels.min()} to {labels.max()}, "
                         f"there are {n_classes} classes")
    return probs, labels


def distinct_faces(probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows (u, C) of probs (n, C), and how often each is there (u,)."""
    rounded = (abs(probs * 1e6 - np.rint(probs * 1e6)) < 1e-4).all(1)
    keys = np.column_stack([probs, np.where(rounded, np.arange(len(probs)), -1)])
    keys, copies = np.unique(keys, axis=0, return_counts=True)
    return keys[:, :-1], copies


# ------------------------------------------------------------------------------------------------------ the estimators
def one_hot_predictions(probs: np.ndarray) -> np.ndarray:
    """probs (n, C) -> (n, C) float64, 1 at each row's largest."""
    return np.eye(probs.shape[1])[probs.argmax(1)]


def simplex_least_squares(A: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The shares p (C,), none negative and summing to 1, for which |A p - q| is least.

    The optimum leaves some classes out and solves the rest under the one equation: all 2^C - 1 choices are tried, and
    the best of those without a negative share is exact. Meant for the handful of classes that faces have.
    """
    n_classes = A.shape[1]
    best, least = None, np.inf
    for size in range(1, n_classes + 1):
        for kept in map(list, itertools.combinations(range(n_classes), size)):
            system = np.ones((size + 1, size + 1))
            system[:size, :size], system[size, size] = A[:, kept].T @ A[:, kept], 0
            solution = np.linalg.lstsq(system, np.append(A[:, kept].T @ q, 1), rcond=None)[0][:size]
            if solution.min() < 0:
                continue
            p = np.zeros(n_classes)
            p[kept] = solution / solution.sum()
            if (error := np.linalg.norm(A @ p - q)) < least:
                best, least = p, error
    return best


def em_estimate(faces: np.ndarray, copies: np.ndarray, prior: np.ndarray, *, tolerance: float = 1e-8,
                max_steps: int = 5000) -> np.ndarray:
    """Maximum-likelihood shares (C,) of faces with probabilities (u, C), each there copies (u,) times.

    prior (C,): the class shares under which the probabilities were calibrated.
    """
    ratio = np.maximum(faces, FLOOR) / prior                    # proportional to p(face | class)
    p = prior.copy()
    for _ in range(max_steps):
        posterior = ratio * p
        posterior /= posterior.sum(1, keepdims=True)
        after = copies @ posterior / copies.sum()
        change = abs(after - p).max()
        p = after
        if change < tolerance:
            break
    return p


# --------------------------------------------------------------------------------------------------------- replicates
class ErrorModel:
    """What the faces of each class look to the classifier: the validation faces, and the user's own, by class.

    probs (m, C) of all of them. rows[k]: those of class k, weights[k] their weights, which sum to 1, and sizes[k] the
    number of faces that these are worth. prior (C,): validation's class shares, under which probs are calibrated.
    """

    def __init__(self, val_probs: np.ndarray, val_labels: np.ndarray, own_probs: np.ndarray, own_labels: np.ndarray):
        self.probs = np.concatenate([val_probs, own_probs])
        self.prior = np.bincount(val_labels) / len(val_labels)
        self.rows, self.weights, self.sizes = [], [], np.zeros(len(self.prior), dtype=np.int64)
        for k in range(len(self.prior)):
            val_rows, own_rows = np.flatnonzero(val_labels == k), np.flatnonzero(own_labels == k)
            worth = min(REFERENCE_PRIOR_FACES, len(val_rows)) if len(own_labels) else len(val_rows)
            weights = np.repeat([worth / len(val_rows), 1.0], [len(val_rows), len(own_rows)])
            self.sizes[k] = worth + len(own_rows)
            self.rows.append(np.append(val_rows, len(val_probs) + own_rows))
            self.weights.append(weights / weights.sum())

    def class_means(self, features: np.ndarray) -> np.ndarray:
        """features (m, F) of the model's faces -> their mean per class, (F, C)."""
        return np.stack([weights @ features[rows] for rows, weights in zip(self.rows, self.weights, strict=True)], 1)


class Replicates:
    """B collections of known shares made of validation faces, each beside a validation set drawn anew.

    centre (C,): the shares of the source; shares (B, C): those of each collection. faces_per_class (C,): how many
    distinct faces the collection at hand has of each class. drawn[k] and again[k] (B, m_k): the weight of each
    validation face of class k in the class's part of the collection, and in the validation set.
    """

    def __init__(self, model: ErrorModel, faces: np.ndarray, copies: np.ndarray, n_boot: int,
                 rng: np.random.Generator):
        n = copies.sum()
        estimate = simplex_least_squares(model.class_means(model.probs), copies @ faces / n)
        # Half a face more of each class: one that seems absent is still there in some of the collections.
        self.centre = (n * estimate + 0.5) / (n + 0.5 * len(estimate))
        posterior = np.maximum(faces, FLOOR) / model.prior * self.centre
        posterior /= posterior.sum(1, keepdims=True)
        distinct = (copies @ posterior) / (copies ** 2 @ posterior)             # (C,), 1 where no picture repeats
        self.faces_per_class = n * self.centre * distinct
        n_distinct = max(1, round(n ** 2 / (copies ** 2).sum()))
        self.shares = rng.multinomial(n_distinct, self.centre, n_boot) / n_distinct
        sizes = np.maximum(1, np.rint(n * self.shares * distinct)).astype(np.int64)
        self.drawn = [draw_weights(sizes[:, k], weights, rng) for k, weights in enumerate(model.weights)]
        self.again = [draw_weights(np.full(n_boot, size), weights, rng)
                      for size, weights in zip(model.sizes, model.weights, strict=True)]

    def collection_means(self, features: np.ndarray, model: ErrorModel) -> np.ndarray:
        """features (m, F) of the model's faces -> their mean in each collection, (B, F)."""
        return sum(self.shares[:, [k]] * (self.drawn[k] @ features[rows]) for k, rows in enumerate(model.rows))

    def class_means(self, features: np.ndarray, model: ErrorModel) -> np.ndarray:
        """features (m, F) of the model's faces -> their mean per class in each validation set, (B, F, C)."""
        return np.stack([self.again[k] @ features[rows] for k, rows in enumerate(model.rows)], 2)


def draw_weights(sizes: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws by weights (m,), with replacement, as many in each row as sizes (B,) says; as weights again, (B, m)."""
    m = len(weights)
    if sizes.sum() > 4 * len(sizes) * m:                # one by one, draws from so few things would take memory
        counts = rng.multinomial(sizes, weights)
    else:                                               # several times as fast as the multinomial
        uniform = (weights == weights[0]).all()
        drawn = rng.integers(m, size=sizes.sum()) if uniform else rng.choice(m, sizes.sum(), p=weights)
        counts = np.bincount(np.repeat(np.arange(len(sizes)) * m, sizes) + drawn, minlength=len(sizes) * m)
    return counts.reshape(-1, m) / sizes[:, None]


def with_intervals(shares: np.ndarray, free: np.ndarray, errors: np.ndarray, source_errors: np.ndarray) -> dict:
    """A method's entry in the report: shares (C,) on the simplex, intervals about the unconstrained `free` (C,).

    errors, source_errors (B, C): by what the unconstrained estimates of the replicates missed.
    """
    entry = {"shares": shares.tolist()}
    for prefix, missed in (("", errors), ("source_", source_errors)):
        upper, lower = np.quantile(missed, [0.975, 0.025], axis=0)
        # An estimate pushed back onto the simplex may leave the interval by a hair; it is never shown outside.
        entry[f"{prefix}low"] = np.minimum(np.clip(free - upper, 0, 1), shares).tolist()
        entry[f"{prefix}high"] = np.maximum(np.clip(free - lower, 0, 1), shares).tolist()
    return entry


# ------------------------------------------------------------------------------------------------- methods of a report
def raw_shares(counts: list[int], n_boot: int, rng: np.random.Generator) -> dict:
    """The raw count's entry; its interval knows the luck of the draw alone, not that the classifier errs."""
    shares = np.array(counts) / sum(counts)
    errors = rng.multinomial(sum(counts), shares, n_boot) / sum(counts) - shares
    return with_intervals(shares, shares, errors, errors)


def adjusted_shares(features: np.ndarray, copies: np.ndarray, val_features: np.ndarray, model: ErrorModel,
                    replicates: Replicates) -> dict:
    """The entry of an adjusted count: features (u, F) of the faces, a mixture of the validation faces' (m, F)."""
    A, q = model.class_means(val_features), copies @ features / copies.sum()
    free = np.linalg.pinv(A) @ q
    redone = np.linalg.pinv(replicates.class_means(val_features, model)) \
        @ replicates.collection_means(val_features, model)[:, :, None]
    redone = redone[:, :, 0]
    return with_intervals(simplex_least_squares(A, q), free, redone - replicates.shares, redone - replicates.centre)


def em_shares(faces: np.ndarray, copies: np.ndarray, model: ErrorModel, replicates: Replicates) -> dict:
    """The maximum-likelihood entry. Its replicates are one Newton step each, of shares and calibration alike.

    The score of face x for class j is g_j = ratio_j / (ratio . p), its mean over the faces 1 at the optimum.
    """
    p = em_estimate(faces, copies, model.prior)
    centre = replicates.centre
    scores, val_scores = (likelihood_scores(x, model.prior, centre) for x in (faces, model.probs))
    # The expected curvature, from validation: that of the faces at hand has no inverse where they are few.
    curvature = (model.class_means(outer_products(val_scores)) @ centre).reshape(len(p), len(p))
    inverse = np.linalg.pinv(curvature)
    inverse -= np.outer(inverse.sum(1), inverse.sum(0)) / inverse.sum()            # steps keep the sum of shares
    free = centre + inverse @ (copies @ scores / copies.sum())
    noise = replicates.collection_means(val_scores, model) - replicates.shares @ model.class_means(val_scores).T
    noise += calibration_noise(model, replicates) @ score_slopes(faces, copies, model.prior, centre).T
    errors = noise @ inverse
    return with_intervals(p, free, errors, errors + replicates.shares - centre)


def likelihood_scores(probs: np.ndarray, prior: np.ndarray, p: np.ndarray) -> np.ndarray:
    """d log-likelihood / d p of faces with calibrated probs (n, C): (n, C)."""
    ratio = np.maximum(probs, FLOOR) / prior
    return ratio / (ratio @ p)[:, None]


def outer_products(rows: np.ndarray) -> np.ndarray:
    """(n, F) -> (n, F * F): each row's outer product with itself."""
    return (rows[:, :, None] * rows[:, None]).reshape(len(rows), -1)


def score_slopes(faces: np.ndarray, copies: np.ndarray, prior: np.ndarray, p: np.ndarray) -> np.ndarray:
    """d mean score / d (slope, biases) of the calibration: (C, 1 + C)."""
    z, g = np.log(np.maximum(faces, FLOOR)), likelihood_scores(faces, prior, p)
    weight, posterior = copies / copies.sum(), g * p
    by_slope = weight @ (g * (z - (posterior * z).sum(1, keepdims=True)))
    by_bias = np.diag(weight @ g) - (g * weight[:, None]).T @ posterior
    return np.column_stack([by_slope, by_bias])


def calibration_noise(model: ErrorModel, replicates: Replicates) -> np.ndarray:
    """By what slope and biases of a calibration refitted to each replicate's validation set differ: (B, 1 + C)."""
    probs = np.maximum(model.probs, FLOOR)
    m, n_classes = probs.shape
    design = np.concatenate([np.log(probs)[:, :, None], np.broadcast_to(np.eye(n_classes), (m, n_classes, n_classes))],
                            2)
    mean = (design * probs[:, :, None]).sum(1)                                     # (m, 1 + C)
    spread = np.einsum("nck,nc,ncl->nkl", design, probs, design).reshape(m, -1) - outer_products(mean)
    fisher = (model.class_means(spread) @ model.sizes).reshape(n_classes + 1, n_classes + 1)
    labels = np.empty(m, dtype=np.int64)
    for k, rows in enumerate(model.rows):
        labels[rows] = k
    gradient = design[np.arange(m), labels] - mean
    moved = (replicates.class_means(gradient, model) - model.class_means(gradient)) @ model.sizes      # (B, 1 + C)
    return moved @ np.linalg.pinv(fisher, hermitian=True)


# ---------------------------------------------------------------------------------------- the test of the assumption
def fit_test(faces: np.ndarray, copies: np.ndarray, model: ErrorModel, replicates: Replicates) -> float:
    """p value of the hypothesis that the faces of each class look to the classifier as they did on validation.

    The faces are counted in cells of predicted label and confidence. Under the hypothesis the counts are a mixture,
    in any shares, of those of the validation classes; the statistic is the squared distance to the nearest mixture, in
    units of its sampling noise (a minimum chi-square), and the replicates say how large it gets by chance.
    """
    cells, val_cells = confidence_cells(faces, model.probs), confidence_cells(model.probs, model.probs)
    H, h = model.class_means(val_cells), copies @ cells / copies.sum()
    noise = np.zeros((len(H), len(H)))
    for k, share in enumerate(replicates.centre):
        variance = share ** 2 * (1 / replicates.faces_per_class[k] + 1 / model.sizes[k])
        noise += variance * (np.diag(H[:, k]) - np.outer(H[:, k], H[:, k]))
    values, vectors = np.linalg.eigh(noise)
    kept = values > 1e-6 * values[-1]
    whiten = (vectors[:, kept] / np.sqrt(values[kept])).T
    observed = mixture_distance((whiten @ H)[None], (whiten @ h)[None])[0]
    by_chance = mixture_distance(whiten @ replicates.class_means(val_cells, model),
                                 replicates.collection_means(val_cells, model) @ whiten.T)
    return float((1 + (by_chance >= observed * (1 - 1e-9)).sum()) / (1 + len(by_chance)))


def confidence_cells(probs: np.ndarray, val_probs: np.ndarray) -> np.ndarray:
    """probs (n, C) -> (n, cells) one-hot: predicted label and, within it, fifth of the validation confidences."""
    parts = []
    for k in range(probs.shape[1]):
        reference = val_probs[val_probs.argmax(1) == k, k]
        n_bins = int(np.clip(len(reference) // 10, 1, CONFIDENCE_BINS))
        edges = np.quantile(reference, np.arange(1, n_bins) / n_bins) if len(reference) else []
        cell = np.searchsorted(edges, probs[:, k], side="right")
        parts.append(np.eye(n_bins)[cell] * (probs.argmax(1) == k)[:, None])
    return np.concatenate(parts, 1)


def mixture_distance(H: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Squared distance (B,) of h (B, F) to the nearest mixture, weights summing to 1, of the columns of H (B, F, C)."""
    base, directions = h - H[:, :, 0], H[:, :, 1:] - H[:, :, :1]
    nearest = directions @ (np.linalg.pinv(directions) @ base[:, :, None])
    return np.square(base - nearest[:, :, 0]).sum(1)


def warning_text(p_value: float) -> str:
    """What to tell the reader of shares whose assumption does not hold; "" where nothing speaks against it."""
    if p_value >= FIT_LEVEL:
        return ""
    return (f"These pictures do not look like the validation pictures to the classifier (p = {p_value:.3g}). Treat the "
            "shares as rough: their intervals do not cover errors that differ from validation's. Labelling some of "
            "these pictures and correcting by those helps.")


# ---------------------------------------------------------------------------------------------------- for the reader
def format_shares(report: dict, classes) -> str:
    """The report as a table: per class the raw count and share, and the default method's share and interval."""
    entry, raw = report["methods"][report["default"]], report["methods"]["raw"]
    if entry["shares"] is None:
        return "no faces, no shares"
    width = max(5, *(len(name) for name in classes))
    lines = [f"{'class':<{width}} {'counted':>8} {'raw':>7} {'estimate':>9}   95 % interval"]
    for k, name in enumerate(classes):
        lines.append(f"{name:<{width}} {report['counts'][k]:>8} {raw['shares'][k]:>7.1%} {entry['shares'][k]:>9.1%}   "
                     f"{entry['low'][k]:.1%} to {entry['high'][k]:.1%}")
    own = f"{report['n_reference']} labelled faces of your own and " if report["n_reference"] else ""
    lines.append(f"{report['n']} faces; estimate: {report['default']} count, corrected by how the classifier erred on "
                 f"{own}{report['n_val']} validation faces")
    if report["warning"]:
        lines.append(f"warning: {report['warning']}")
    return "\n".join(lines)


def draw_shares(reports: dict[str, dict], classes, path) -> None:
    """A figure of one or more reports by name: per class the default estimate, its interval and the raw share."""
    from matplotlib.figure import Figure

    names = [name for name, report in reports.items() if report["n"]]
    figure = Figure(figsize=(1.6 + 1.5 * len(classes), 1.4 + 0.28 * len(classes) * max(1, len(names))),
                    layout="constrained")
    axes = figure.subplots(1, len(classes), sharey=True, squeeze=False)[0]
    for k, (axis, label) in enumerate(zip(axes, classes, strict=True)):
        for row, name in enumerate(names):
            report = reports[name]
            entry = report["methods"][report["default"]]
            colour = "tab:red" if report["warning"] else "tab:blue"
            axis.plot([100 * entry["low"][k], 100 * entry["high"][k]], [row, row], color=colour, linewidth=2)
            axis.plot(100 * entry["shares"][k], row, "o", color=colour,
                      label="estimate, 95 % interval; red where the faces do not fit validation's")
            axis.plot(100 * report["methods"]["raw"]["shares"][k], row, "x", color="0.35", label="raw count")
        axis.set_title(label, parse_math=False)             # a name may hold a $
        axis.set(xlim=(-3, 103), xticks=(0, 50, 100), xlabel="%")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [f"{name} (n = {reports[name]['n']})" for name in names], parse_math=False)
    axes[0].set_ylim(max(1, len(names)) - 0.5, -0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=120)
