"""Confusion matrix and what is computed from it: accuracy with its interval, per-class figures, a paired test."""
import math

import numpy as np
import torch
from torch import Tensor

Z95 = 1.959963984540054             # 97.5 % quantile of the normal distribution


def confusion_matrix(labels: Tensor, predictions: Tensor, n_classes: int) -> Tensor:
    """Counts (C, C) int64: row = true class, column = predicted class. labels and predictions (n,) int64; n may be 0.

    Matrices of parts of a set add up to that of the whole.
    """
    return torch.bincount(labels * n_classes + predictions, minlength=n_classes ** 2).view(n_classes, n_classes)


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of a proportion of which k of n were seen; (0, 1) where n is 0.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, Z95 ** 2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n ** 2)) / (1 + z2 / n)
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def class_figures(confusion: Tensor) -> dict:
    """accuracy, balanced_accuracy, macro_f1, n; per_class: a list of {precision, recall, f1, n} in class order.

    All but n are fractions in 0..1. A ratio of nothing to nothing is 0: the precision of a class never predicted, the
    recall of a class without a picture, every figure of an empty matrix. Balanced accuracy (the mean recall) and
    macro-F1 are means over the classes that have pictures.
    """
    counts = confusion.double().cpu()
    right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    precision, recall = right / predicted.clamp(min=1), right / true.clamp(min=1)
    f1 = 2 * right / (true + predicted).clamp(min=1)
    present = true > 0
    n_present = present.sum().clamp(min=1)
    columns = zip(precision.tolist(), recall.tolist(), f1.tolist(), true.long().tolist(), strict=True)
    return {"accuracy": (right.sum() / counts.sum().clamp(min=1)).item(),
            "balanced_accuracy": (recall[present].sum() / n_present).item(),
            "macro_f1": (f1[present].sum() / n_present).item(),
            "n": int(counts.sum()),
            "per_class": [dict(zip(("precision", "recall", "f1", "n"), row, strict=True)) for row in columns]}


def mcnemar_exact(correct_a: Tensor, correct_b: Tensor) -> float:
    """Two-sided p that two classifiers err equally often, from (n,) bool: which of the same pictures each got right.

    Only pictures on which they differ count; under equality each of these falls to either side like a fair coin.
    McNemar, "Note on the sampling error of the difference between correlated proportions", 1947, in exact form.
    """
    only_a, only_b = int((correct_a & ~correct_b).sum()), int((correct_b & ~correct_a).sum())
    differing = only_a + only_b
    ways, term = 0, 1                                   # whole numbers throughout: exact for any count
    for i in range(min(only_a, only_b) + 1):
        ways += term
        term = term * (differing - i) // (i + 1)
    return min(1.0, 2 * ways / 2 ** differing)


def reliability_bins(scores: Tensor, hits: Tensor, n_bins: int = 15) -> Tensor:
    """Pictures by ascending score in bins of equal mass: (n_bins, 3) float64 mean score, share of hits, count.

    scores (n,) are stated probabilities, hits (n,) bool what came true; fewer bins where n is below n_bins.
    """
    order = scores.argsort(stable=True)
    columns = torch.stack([scores.double(), hits.double(), torch.ones(len(scores), dtype=torch.float64)], 1)[order]
    parts = [part for part in columns.tensor_split(n_bins) if len(part)]
    sums = torch.stack([part.sum(0) for part in parts]) if parts else torch.zeros(0, 3, dtype=torch.float64)
    return torch.cat([sums[:, :2] / sums[:, 2:], sums[:, 2:]], 1)


def calibration_error(bins: Tensor) -> tuple[float, float]:
    """Expected calibration error of reliability_bins, as it is and debiased.

    A bin of n pictures shows a gap even of a perfect forecast, by chance. The second figure takes off how much a
    normal error of the bin's own spread adds to its gap, as in Kumar, Liang, Ma, "Verified Uncertainty Calibration",
    2019, here in closed form (the mean of a folded normal); it is at least 0.
    """
    weight = bins[:, 2] / bins[:, 2].sum().clamp(min=1)
    gap = (bins[:, 1] - bins[:, 0]).abs()
    spread = (bins[:, 1] * (1 - bins[:, 1]) / bins[:, 2]).sqrt().clamp(min=1e-12)
    folded = spread * math.sqrt(2 / math.pi) * (-(gap / spread).square() / 2).exp() \
        + gap * torch.erf(gap / spread / math.sqrt(2))
    ece = (weight * gap).sum().item()
    return ece, max(0.0, ece - (weight * (folded - gap)).sum().item())


def ece_interval(scores: Tensor, hits: Tensor, n_bins: int = 15, n_resamples: int = 1000,
                 seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the expected calibration error of scores (n,) and hits (n,) bool; (0, 1) of none.

    A resample's error exceeds the sample's by chance as the sample's exceeds the true one, so the quantiles are
    mirrored at the sample's error (the basic bootstrap; Davison, Hinkley, "Bootstrap Methods and their Application",
    1997, 5.2). That takes off too little where hardly any error is there, so the interval begins at 0 where hits drawn
    by the scores themselves come to an error as large in more than 2.5 % of as many draws (Broecker, Smith,
    "Increasing the Reliability of Reliability Diagrams", 2007). It is approximate: of 100 simulated sets of 2,000 with
    true errors of 0, 0.01 and 0.03 it held the true one in 99, 94 and 80.
    """
    n = len(scores)
    if n == 0:
        return 0.0, 1.0
    stated, order = scores.double().sort(stable=True)
    stated, came = stated.cpu().numpy(), hits[order].double().cpu().numpy()
    starts = np.array([part[0] for part in np.array_split(np.arange(n), n_bins) if len(part)])
    rng = np.random.default_rng(seed)

    def error(excess: np.ndarray) -> float:
        return np.abs(np.add.reduceat(excess, starts)).sum() / n

    seen = error(came - stated)
    again = [error((came - stated)[np.sort(rng.integers(n, size=n, dtype=np.int32))]) for _ in range(n_resamples)]
    calibrated = [error((rng.random(n) < stated) - stated) for _ in range(n_resamples)]
    top, bottom = np.quantile(again, (0.975, 0.025))
    low = 0.0 if seen <= np.quantile(calibrated, 0.975) else max(0.0, 2 * seen - top)
    return float(low), float(max(0.0, 2 * seen - bottom))


def proper_scores(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log likelihood (n,) and Brier score (n,), summed over the classes, of each picture."""
    truth = torch.nn.functional.one_hot(labels, probs.shape[1])
    nll = -probs.gather(1, labels[:, None]).squeeze(1).clamp(min=1e-12).log()
    return nll, (probs - truth).square().sum(1)


def risk_coverage(confidence: Tensor, correct: Tensor) -> Tensor:
    """Error rate (n,) float64 among the 1, 2, ..., n most confident of n pictures; its mean is the area (AURC).

    Geifman, El-Yaniv, "Selective Classification for Deep Neural Networks", 2017.
    """
    wrong = (~correct)[confidence.argsort(descending=True, stable=True)].double()
    return wrong.cumsum(0) / torch.arange(1, len(wrong) + 1, dtype=torch.float64)
