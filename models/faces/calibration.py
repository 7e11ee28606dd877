"""What validation says of a classifier's confidence: logits -> calibrated probabilities, thresholds, sets of labels."""
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

FOLDS = 5
BALANCE = 0.5               # of the logarithm of a class's error rate that is added to its bias, at most
ERROR_RATE_PRIOR_FACES = 10            # with which every class begins, wrong as often as all are: for classes of few faces
RIDGE = 1.0                 # pulls slope to 1, the rest to 0 as one face would: settles separable or tiny samples


@dataclass
class Calibration:
    """What validation said of a classifier: how to turn logits into probabilities, and how it errs.

    probs = softmax(logits * (1 / temperature + curve * margin) + bias), the margin of a face being how far its largest
    logit lies above its second. val_probs (n, C) float32 are such probabilities of the n validation faces and
    val_labels (n,) int64 their labels; confusion matrix, confidence tables, thresholds and group shares all follow from
    the two.
    """
    temperature: float
    bias: tuple[float, ...]
    val_probs: Tensor
    val_labels: Tensor
    curve: float = 0.0

    def probs(self, logits: Tensor) -> Tensor:
        """logits (n, C) -> calibrated probabilities (n, C) float32."""
        bias, logits = torch.tensor(self.bias, device=logits.device), logits.float()
        return (logits * (1 / self.temperature + self.curve * margins(logits)) + bias).softmax(1)


def margins(logits: Tensor) -> Tensor:
    """(n, 1): by how much each face's largest logit exceeds its second."""
    best = logits.topk(min(2, logits.shape[1]), 1).values
    return best[:, :1] - best[:, -1:]


def fit_calibration(logits: Tensor, labels: Tensor, balance: float = BALANCE) -> Calibration:
    """Temperature, its curve over the margin and a bias per class, from validation logits (n, C) and labels (n,).

    Bias-corrected temperature scaling (Alexandari, Kundaje, Shrikumar, "Maximum likelihood with bias-corrected
    calibration is hard-to-beat at label shift adaptation", 2020) and a term that no single temperature has: label
    smoothing and mixup hold the largest logits down, so that a network trained with them is too sure in the middle and
    not sure enough at the top. Fitted by Newton's method in float64 on the CPU: the same numbers on every machine.
    Curve and biases stay where they lower the likelihood loss of faces left out of the fit. val_probs are those of the
    left-out faces: each face's probabilities come from the other four fifths, so thresholds and error model are
    hardly told better of the classifier than a stranger's faces would tell. At last the biases of classes that err
    more are raised, which all faces decide together: see raise_weak. balance 0 leaves the likeliest biases.
    Raises ValueError for fewer than 2 faces, a label without a column, or logits that are not finite.
    """
    logits, labels = logits.detach().double().cpu(), labels.detach().long().cpu()
    check_labelled(logits, labels)
    folds = stratified_folds(labels, FOLDS)
    held_out = {terms: held_out_log_probs(logits, labels, folds, terms)
                for terms in itertools.product((False, True), repeat=2)}
    terms = min(held_out, key=lambda terms: mean_nll(held_out[terms], labels))
    slope, curve, bias = fit_terms(logits, labels, *terms)
    raised = raise_weak(held_out[terms], labels, balance)
    return Calibration(1 / slope, tuple((bias + raised).tolist()), (held_out[terms] + raised).softmax(1).float(),
                       labels, curve)


def raise_weak(log_probs: Tensor, labels: Tensor, balance: float) -> Tensor:
    """What to add to each class's log-probability (C,) so that doubt does not go against the hardest to tell.

    `balance` times the logarithm of its error rate; half or a quarter of that, or nothing, where more would cost right
    labels among the faces (n, C), (n,).
    """
    rates = log_error_rates(log_probs, labels)
    nothing = torch.zeros_like(rates)

    def right(raised: Tensor) -> int:
        return int(((log_probs + raised).argmax(1) == labels).sum())

    before = right(nothing)
    steps = (balance * part * rates for part in (1, 0.5, 0.25))
    return next((raised for raised in steps if right(raised) >= before), nothing)


def log_error_rates(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Logarithm of the share of each class's faces (n, C), (n,) that get another label: (C,) float64, less its mean."""
    wrong = (log_probs.argmax(1) != labels).double()
    overall = (wrong.sum() + 1) / (len(labels) + 2)
    errors = wrong.new_zeros(log_probs.shape[1]).index_add_(0, labels, wrong)
    counts = labels.bincount(minlength=log_probs.shape[1])
    rates = ((errors + ERROR_RATE_PRIOR_FACES * overall) / (counts + ERROR_RATE_PRIOR_FACES)).log()
    return rates - rates.mean()


def check_labelled(values: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless values (n, C) are finite, n >= 2 and each label is a column."""
    if values.ndim != 2 or len(values) != len(labels) or len(labels) < 2:
        raise ValueError(f"calibration wants logits (n, C) and labels (n,) of at least 2 faces, "
                         f"got {tuple(values.shape)} and {tuple(labels.shape)}")
    if not values.isfinite().all():
        raise ValueError("calibration: some logits are not finite")
    if labels.min() < 0 or labels.max() >= values.shape[1]:
        raise ValueError(f"calibration: labels reach from {labels.min()} to {labels.max()}, "
                         f"the logits have {values.shape[1]} classes")


def stratified_folds(labels: Tensor, n_folds: int) -> Tensor:
    """Fold of each face (n,): every class dealt out evenly, in an order drawn once and for all."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % n_folds
    return folds


def held_out_log_probs(logits: Tensor, labels: Tensor, folds: Tensor, terms: tuple[bool, bool]) -> Tensor:
    """Log-probabilities (n, C) of each face under the calibration fitted without its fold."""
    log_probs = torch.empty_like(logits)
    for fold in folds.unique():
        out = folds == fold
        slope, curve, bias = fit_terms(logits[~out], labels[~out], *terms)
        log_probs[out] = (logits[out] * (slope + curve * margins(logits[out])) + bias).log_softmax(1)
    return log_probs


def mean_nll(log_probs: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels."""
    return -log_probs.gather(1, labels[:, None]).mean().item()


def fit_terms(logits: Tensor, labels: Tensor, with_curve: bool, with_bias: bool) -> tuple[float, float, Tensor]:
    """Maximum-likelihood slope (1 / temperature), curve and biases (C,); logits (n, C) float64.

    A curve below 0, or a slope below it, would turn the order of the classes around at some margin: then there is no
    curve, and the slope of logits that point the wrong way is one of almost no confidence.
    """
    columns = [logits[:, :, None]]
    if with_curve:
        columns.append((logits * margins(logits))[:, :, None])
    if with_bias:
        columns.append(torch.eye(logits.shape[1], dtype=torch.float64).expand(len(logits), -1, -1))
    theta = maximum_likelihood(torch.cat(columns, 2), labels)
    if with_curve and theta[:2].min() <= 0:
        return fit_terms(logits, labels, False, with_bias)
    curve = theta[1].item() if with_curve else 0.0
    bias = theta[1 + with_curve:] if with_bias else torch.zeros(logits.shape[1], dtype=torch.float64)
    return max(theta[0].item(), 1e-3), curve, bias - bias.mean()


def maximum_likelihood(design: Tensor, labels: Tensor) -> Tensor:
    """Coefficients (k,) of the score design (n, C, k) @ coefficients, by damped Newton steps from (1, 0, ..., 0).

    design float64. The loss is convex, so the optimum is unique.
    """
    one_hot = torch.nn.functional.one_hot(labels, design.shape[1]).double()
    rows = design.flatten(0, 1)
    start = torch.zeros(design.shape[2], dtype=torch.float64)
    start[0] = 1.0

    def loss(theta: Tensor) -> Tensor:
        log_probs = (design @ theta).log_softmax(1)
        return -(log_probs * one_hot).sum() + RIDGE / 2 * (theta - start).square().sum()

    theta = start
    for _ in range(100):
        probs = (design @ theta).softmax(1)
        gradient = rows.T @ (probs - one_hot).flatten() + RIDGE * (theta - start)
        mean = (design * probs[:, :, None]).sum(1)                                                  # (n, k)
        hessian = (rows * probs.view(-1, 1)).T @ rows - mean.T @ mean
        step = torch.linalg.solve(hessian + RIDGE * torch.eye(len(theta), dtype=torch.float64), gradient)
        if step.abs().max() < 1e-9:
            break
        size = 1.0
        while size > 1e-6 and loss(theta - size * step) > loss(theta) + 1e-9:      # rounding is no ascent
            size /= 2
        theta = theta - size * step
    return theta


def class_thresholds(calibration: Calibration, target_error: float) -> Tensor:
    """Least confidence (C,) float32 at which a predicted label is answered; inf where no confidence is enough.

    For each predicted class on its own, the smallest confidence above which at most `target_error` of the
    validation faces so answered were wrong: no class pays for another.
    """
    confidence, predictions = calibration.val_probs.max(1)
    wrong = (predictions != calibration.val_labels).double()
    thresholds = torch.full((calibration.val_probs.shape[1],), torch.inf)
    for c in range(len(thresholds)):
        values, order = confidence[predictions == c].sort(descending=True)
        error = wrong[predictions == c][order].cumsum(0) / torch.arange(1, len(values) + 1)
        last_of_tie = torch.ones_like(values, dtype=torch.bool)
        last_of_tie[:-1] = values[:-1] > values[1:]
        reached = ((error <= target_error + 1e-12) & last_of_tie).nonzero()[:, 0]
        if len(reached):
            thresholds[c] = values[reached[-1]]
    return thresholds


def set_thresholds(calibration: Calibration, alpha: float) -> Tensor:
    """Least probability (C,) float32 with which a class is in a face's prediction set.

    A face of class k has k in its set with probability at least 1 - alpha, for every k: split conformal
    prediction within each class (Vovk, "Conditional validity of inductive conformal predictors", 2012), score
    1 - probability of the class, with the finite-sample quantile. A class of fewer than 1 / alpha - 1 validation
    faces is in every set. A set may be empty: a face unlike all classes.
    """
    least = torch.zeros(calibration.val_probs.shape[1])
    for k in range(len(least)):
        scores = calibration.val_probs[calibration.val_labels == k, k].sort().values
        spare = int(alpha * (len(scores) + 1) + 1e-9)       # the true class may fall below in this many of them
        least[k] = scores[spare - 1] if 0 < spare <= len(scores) else (0.0 if spare == 0 else torch.inf)
    return least
