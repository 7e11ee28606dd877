"""Confidence: calibrated probabilities, selective prediction, conformal prediction sets."""
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

FOLDS = 5
BALANCE = 0.5               # of the logarithm of a class's error rate, added to its bias
ERROR_RATE_PRIOR_FACES = 10     # per class, with the overall error rate: for classes of few faces
RIDGE = 1.0                 # penalty of slope - 1 and the other terms, for separable samples


@dataclass
class Calibration:
    """Bias-corrected temperature scaling, and the probabilities of the validation faces.

    probs = softmax(logits * (1 / temperature + curve * margin) + bias), where the margin of a face
    is the difference between its largest and its second largest logit. val_probs (n, C) float32 are
    such probabilities of the n validation faces, out of fold, and val_labels (n,) int64 their
    labels. Thresholds, prediction sets and group shares are computed from these two.
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
    """(n, 1): difference between the largest and the second largest logit of each face."""
    largest = logits.topk(min(2, logits.shape[1]), 1).values
    return largest[:, :1] - largest[:, -1:]


def fit_calibration(logits: Tensor, labels: Tensor, balance: float = BALANCE) -> Calibration:
    """Temperature, curve over the margin and a bias per class, from logits (n, C) and labels (n,).

    Bias-corrected temperature scaling (Alexandari, Kundaje, Shrikumar, "Maximum likelihood with
    bias-corrected calibration is hard-to-beat at label shift adaptation", 2020) with a curve: label
    smoothing and mixup limit the largest logits, so that a network trained with them is
    overconfident at medium margins and underconfident at large ones, which no single temperature
    corrects. Fitted by Newton's method in float64 on the CPU: the same numbers on every machine.
    Curve and biases are kept if they lower the NLL of held-out faces. val_probs are out-of-fold:
    each face's probabilities come from a fit to the other folds, so thresholds and error rates
    generalise to new faces. At last the biases of classes with higher error rates are raised on all
    faces together, see raise_weak; balance 0 keeps the maximum-likelihood biases.
    Raises ValueError for fewer than 2 faces, a label without a column, or logits that are not
    finite.
    """
    logits, labels = logits.detach().double().cpu(), labels.detach().long().cpu()
    check_labelled(logits, labels)
    folds = stratified_folds(labels, FOLDS)
    held_out = {terms: held_out_log_probs(logits, labels, folds, terms)
                for terms in itertools.product((False, True), (False, True))}
    terms = min(held_out, key=lambda terms: mean_nll(held_out[terms], labels))
    slope, curve, bias = fit_terms(logits, labels, *terms)
    raised = raise_weak(held_out[terms], labels, balance)
    val_probs = (held_out[terms] + raised).softmax(1).float()
    return Calibration(1 / slope, tuple((bias + raised).tolist()), val_probs, labels, curve)


def raise_weak(log_probs: Tensor, labels: Tensor, balance: float) -> Tensor:
    """Addition (C,) to the class log-probabilities that favours classes with high error rates.

    `balance` times the logarithm of the class's error rate; half or a quarter of that, or zeros, if
    more would lower the accuracy on the faces log_probs (n, C), labels (n,).
    """
    rates = log_error_rates(log_probs, labels)
    zeros = torch.zeros_like(rates)

    def count_correct(raised: Tensor) -> int:
        return int(((log_probs + raised).argmax(1) == labels).sum())

    baseline = count_correct(zeros)
    steps = (balance * fraction * rates for fraction in (1, 0.5, 0.25))
    return next((raised for raised in steps if count_correct(raised) >= baseline), zeros)


def log_error_rates(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Centred logarithm (C,) float64 of the error rate of each class; (n, C) and (n,)."""
    wrong = (log_probs.argmax(1) != labels).double()
    overall = (wrong.sum() + 1) / (len(labels) + 2)
    errors = wrong.new_zeros(log_probs.shape[1]).index_add_(0, labels, wrong)
    counts = labels.bincount(minlength=log_probs.shape[1])
    prior_errors = ERROR_RATE_PRIOR_FACES * overall
    rates = ((errors + prior_errors) / (counts + ERROR_RATE_PRIOR_FACES)).log()
    return rates - rates.mean()


def check_labelled(values: Tensor, labels: Tensor) -> None:
    """Raises ValueError unless values (n, C) are finite, n >= 2 and each label is a column."""
    if values.ndim != 2 or len(values) != len(labels) or len(labels) < 2:
        raise ValueError("calibration expects logits (n, C) and labels (n,) of at least 2 faces, "
                         f"got {tuple(values.shape)} and {tuple(labels.shape)}")
    if not values.isfinite().all():
        raise ValueError("calibration: some logits are not finite")
    if labels.min() < 0 or labels.max() >= values.shape[1]:
        raise ValueError(f"calibration: labels reach from {labels.min()} to {labels.max()}, "
                         f"the logits have {values.shape[1]} classes")


def stratified_folds(labels: Tensor, n_folds: int) -> Tensor:
    """Fold of each face (n,): each class in equal parts, in one fixed random order.

    Not scikit-learn's StratifiedKFold, which assigns other faces to the folds (and with them other
    numbers to every calibration) and refuses sets without n_folds faces of any class.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = order[labels[order].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % n_folds
    return folds


def held_out_log_probs(logits: Tensor, labels: Tensor, folds: Tensor,
                       terms: tuple[bool, bool]) -> Tensor:
    """Out-of-fold log-probabilities (n, C): each fold by the calibration fitted without it."""
    log_probs = torch.empty_like(logits)
    for fold in folds.unique():
        is_held_out = folds == fold
        slope, curve, bias = fit_terms(logits[~is_held_out], labels[~is_held_out], *terms)
        held_out = logits[is_held_out]
        scores = held_out * (slope + curve * margins(held_out)) + bias
        log_probs[is_held_out] = scores.log_softmax(1)
    return log_probs


def mean_nll(log_probs: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the labels."""
    return -log_probs.gather(1, labels[:, None]).mean().item()


def fit_terms(logits: Tensor, labels: Tensor, with_curve: bool,
              with_bias: bool) -> tuple[float, float, Tensor]:
    """Maximum-likelihood slope (1 / temperature), curve and biases (C,); logits (n, C) float64.

    A negative curve or slope would reverse the order of the classes at some margin. The curve is
    then left out, and a negative slope becomes one of almost no confidence.
    """
    columns = [logits[:, :, None]]
    if with_curve:
        columns.append((logits * margins(logits))[:, :, None])
    if with_bias:
        identity = torch.eye(logits.shape[1], dtype=torch.float64)
        columns.append(identity.expand(len(logits), -1, -1))
    theta = maximum_likelihood(torch.cat(columns, 2), labels)
    if with_curve and theta[:2].min() <= 0:
        return fit_terms(logits, labels, False, with_bias)
    curve = theta[1].item() if with_curve else 0.0
    no_bias = torch.zeros(logits.shape[1], dtype=torch.float64)
    bias = theta[1 + with_curve:] if with_bias else no_bias
    return max(theta[0].item(), 1e-3), curve, bias - bias.mean()


def maximum_likelihood(design: Tensor, labels: Tensor) -> Tensor:
    """Coefficients (k,) of the scores design (n, C, k) @ coefficients, labels (n,).

    Damped Newton steps from (1, 0, ..., 0). design is float64. The loss is convex, so the optimum
    is unique.
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
        mean = (design * probs[:, :, None]).sum(1)                                  # (n, k)
        hessian = (rows * probs.view(-1, 1)).T @ rows - mean.T @ mean
        ridge = RIDGE * torch.eye(len(theta), dtype=torch.float64)
        step = torch.linalg.solve(hessian + ridge, gradient)
        if step.abs().max() < 1e-9:
            break
        step_size = 1.0
        while step_size > 1e-6 and loss(theta - step_size * step) > loss(theta) + 1e-9:  # rounding
            step_size /= 2
        theta = theta - step_size * step
    return theta


def class_thresholds(calibration: Calibration, target_error: float) -> Tensor:
    """Least confidence (C,) float32 at which each predicted label is answered; inf for none.

    Selective prediction per predicted class: the smallest confidence above which the error rate of
    the validation faces is at most `target_error`, so that every class keeps to it.
    """
    confidence, predictions = calibration.val_probs.max(1)
    wrong = (predictions != calibration.val_labels).double()
    thresholds = torch.full((calibration.val_probs.shape[1],), torch.inf)
    for c in range(len(thresholds)):
        values, order = confidence[predictions == c].sort(descending=True)
        n_answered = torch.arange(1, len(values) + 1)
        error = wrong[predictions == c][order].cumsum(0) / n_answered
        is_last_of_tie = torch.ones_like(values, dtype=torch.bool)
        is_last_of_tie[:-1] = values[:-1] > values[1:]
        reached = ((error <= target_error + 1e-12) & is_last_of_tie).nonzero()[:, 0]
        if len(reached):
            thresholds[c] = values[reached[-1]]
    return thresholds


def set_thresholds(calibration: Calibration, alpha: float) -> Tensor:
    """Least probability (C,) float32 with which each class is in the prediction set of a face.

    Class-conditional split conformal prediction (Vovk, "Conditional validity of inductive conformal
    predictors", 2012): for every k, the set of a face of class k contains k with probability at
    least 1 - alpha. The score is 1 - probability of the class, with the finite-sample quantile. A
    class of fewer than 1 / alpha - 1 validation faces is in every set. A set may be empty.
    """
    thresholds = torch.zeros(calibration.val_probs.shape[1])
    for k in range(len(thresholds)):
        scores = calibration.val_probs[calibration.val_labels == k, k].sort().values
        n_misses = int(alpha * (len(scores) + 1) + 1e-9)    # faces of class k that may fall below
        if n_misses:
            thresholds[k] = scores[n_misses - 1] if n_misses <= len(scores) else torch.inf
    return thresholds
