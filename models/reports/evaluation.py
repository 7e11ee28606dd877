"""Evaluation statistics: predictions on labelled pictures -> every figure of the report.

The figures are plain values in dicts, ready for JSON; tables.py prints them, plots.py draws them.
"""
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.data.faceset import GENDERS
from models.faces.calibration import Calibration, class_thresholds, set_thresholds
from models.reports.metrics import (
    calibration_error,
    class_figures,
    confusion_matrix,
    ece_interval,
    mcnemar_exact,
    proper_scores,
    reliability_bins,
    risk_coverage,
    wilson_interval,
)

AGE_BANDS = (0, 10, 20, 30, 40, 60)             # lower ends, years

Manifest = dict[str, dict[str, str]]            # rows of the builder's manifest.csv by file


@dataclass
class LabelledPredictions:
    """A classifier's predictions on the readable pictures of a labelled set."""
    files: list[str]                # as in the FaceSet
    labels: Tensor                  # (n,) int64
    logits: Tensor                  # (n, C) float32
    probs: Tensor                   # (n, C) float32, calibrated if the checkpoint is
    aligned_by: list[str]           # 'mtcnn', 'template' (no face was found) or 'crop' (aligned)
    unreadable: list[str]           # 'file: reason' of the other pictures

    def predicted(self) -> Tensor:
        """Predicted labels (n,) int64, as infer.py writes them."""
        return self.probs.argmax(1)

    def correct(self) -> Tensor:
        """(n,) bool: the predicted label is the label of the data set."""
        return self.predicted() == self.labels


def measure(predictions: LabelledPredictions, calibration: Calibration | None,
            classes: tuple[str, ...], manifest: Manifest, target_error: float,
            alpha: float) -> dict:
    """Every figure of the report.

    calibration: of the checkpoint, or None. manifest: empty if the set has none. target_error and
    alpha: see selective_figures.
    """
    has_face = torch.tensor([source != "template" for source in predictions.aligned_by])
    figures = {**subset_figures(predictions, torch.ones_like(has_face), classes),
               "unreadable": predictions.unreadable,
               "with_detected_face": subset_figures(predictions, has_face, classes),
               "without_detected_face": subset_figures(predictions, ~has_face, classes)}
    if manifest:
        is_unique = without_near_duplicate(predictions.files, manifest)
        figures["without_twin"] = subset_figures(predictions, is_unique, classes)
    labels, answered = predictions.labels, None
    before = calibration_figures(predictions.logits.softmax(1), labels, classes)
    figures["calibration"] = {"before": before}
    if calibration:
        figures["calibration"]["after"] = calibration_figures(predictions.probs, labels, classes)
        figures["abstention"], answered = selective_figures(predictions, calibration, classes,
                                                            target_error, alpha)
    figures["risk_coverage"] = risk_coverage_figures(predictions.probs, labels, classes)
    if manifest:
        figures["age_gender"] = subgroup_figures(predictions, answered, manifest, classes)
    return figures


def subset_figures(predictions: LabelledPredictions, is_member: Tensor,
                   classes: tuple[str, ...]) -> dict:
    """Accuracy with its 95 % interval, per-class figures, confusion matrix; is_member (n,) bool."""
    confusion = confusion_matrix(predictions.labels[is_member],
                                 predictions.predicted()[is_member], len(classes))
    figures = class_figures(confusion)
    figures["per_class"] = dict(zip(classes, figures["per_class"], strict=True))
    interval = wilson_interval(int(confusion.diagonal().sum()), figures["n"])
    return {"accuracy": figures.pop("accuracy"), "accuracy_ci95": list(interval), **figures,
            "confusion_matrix": confusion.tolist()}


# ---------------------------------------------------------------------------------- confidence
def calibration_figures(probs: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict:
    """ECE (15 bins of equal mass), NLL and Brier score, for all pictures and per class.

    For all pictures, the ECE compares the confidence with the accuracy; `ece_ci95` is a bootstrap
    interval. Per class, `ece` compares p_class with the frequency of the class over all pictures,
    and `ece_predicted` the confidence with the accuracy over the pictures predicted as that class;
    `nll` and `brier` are means over the pictures of the class. `bins` are those of the plot.
    """
    confidence, predicted = probs.max(1)
    correct = predicted == labels
    nll, brier = proper_scores(probs, labels)
    bins = reliability_bins(confidence, correct)
    ece, debiased = calibration_error(bins)
    figures: dict = {"ece": ece, "ece_debiased": debiased}
    figures |= {"ece_ci95": list(ece_interval(confidence, correct)), "nll": nll.mean().item(),
                "brier": brier.mean().item(), "bins": bins.tolist(), "per_class": {}}
    for c, name in enumerate(classes):
        of_class, as_class = labels == c, predicted == c
        bins = reliability_bins(probs[:, c], of_class)
        ece, debiased = calibration_error(bins)
        ece_predicted = calibration_error(reliability_bins(confidence[as_class],
                                                           correct[as_class]))
        count = of_class.sum().clamp(min=1)
        figures["per_class"][name] = {
            "ece": ece, "ece_debiased": debiased, "ece_predicted": ece_predicted[0],
            "ece_predicted_debiased": ece_predicted[1],
            "nll": (nll[of_class].sum() / count).item(),
            "brier": (brier[of_class].sum() / count).item(), "bins": bins.tolist()}
    return figures


def subsets_by_class(labels: Tensor, classes: tuple[str, ...]) -> dict[str, Tensor]:
    """Membership (n,) bool of 'all' pictures and of the pictures of each class."""
    members = {name: labels == c for c, name in enumerate(classes)}
    return {"all": torch.ones_like(labels, dtype=torch.bool), **members}


def risk_coverage_figures(probs: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict:
    """Risk-coverage curves of all pictures and of each class.

    `area` is the area under the curve, `risk` the error rate at a coverage of 1, 2, ..., 100 %.
    """
    confidence, predicted = probs.max(1)
    curves = {}
    for name, is_member in subsets_by_class(labels, classes).items():
        risk = risk_coverage(confidence[is_member], predicted[is_member] == labels[is_member])
        n = len(risk)
        positions = [max(1, round(n * percent / 100)) - 1 for percent in range(1, 101)] if n else []
        curves[name] = {"n": n, "area": risk.mean().item() if n else 0.0,
                        "risk": risk[positions].tolist()}
    return curves


def selective_figures(predictions: LabelledPredictions, calibration: Calibration,
                      classes: tuple[str, ...], target_error: float,
                      alpha: float) -> tuple[dict, Tensor]:
    """Selective prediction and prediction sets, for all pictures and per class; answered (n,) bool.

    Thresholds and sets come from the validation faces in the calibration. A picture is answered if
    its confidence reaches the threshold of its predicted class for `target_error`. Per class of the
    data set: the share not answered, the error rate of those answered, and the share whose
    prediction set at error `alpha` contains the label.
    """
    confidence, predicted = predictions.probs.max(1)
    thresholds = class_thresholds(calibration, target_error)
    answered = confidence >= thresholds[predicted]
    sets = predictions.probs >= set_thresholds(calibration, alpha)
    covered = sets.gather(1, predictions.labels[:, None]).squeeze(1)
    finite = {name: value if value <= 1 else None
              for name, value in zip(classes, thresholds.tolist(), strict=True)}
    per_class = {}
    for name, is_member in subsets_by_class(predictions.labels, classes).items():
        n, n_answered = int(is_member.sum()), int((is_member & answered).sum())
        n_wrong = int((is_member & answered & ~predictions.correct()).sum())
        per_class[name] = {"n": n, "abstained": (n - n_answered) / max(n, 1),
                           "error_of_answered": n_wrong / max(n_answered, 1),
                           "set_coverage": int((is_member & covered).sum()) / max(n, 1),
                           "mean_set_size": sets[is_member].sum().item() / max(n, 1)}
    overall = per_class.pop("all")
    return {"target_error": target_error, "alpha": alpha, "per_class": per_class,
            "thresholds": finite, **overall}, answered


# ------------------------------------------------------------------- what the manifest adds
def with_manifest(predictions: LabelledPredictions, manifest: Manifest) -> LabelledPredictions:
    """The predictions with the manifest's `aligned_by` of pictures that were built as crops."""
    if not manifest:
        return predictions
    aligned_by = [manifest[file]["aligned_by"] if source == "crop" else source
                  for file, source in zip(predictions.files, predictions.aligned_by, strict=True)]
    return replace(predictions, aligned_by=aligned_by)


def without_near_duplicate(files: list[str], manifest: Manifest) -> Tensor:
    """(n,) bool: no other split holds a near-duplicate, by the manifest's duplicate_group."""
    splits: dict[str, set[str]] = {}
    for row in manifest.values():
        splits.setdefault(row["duplicate_group"], set()).add(row["split"])
    groups = [manifest[file]["duplicate_group"] for file in files]      # '' without near-duplicate
    return torch.tensor([not group or len(splits[group]) == 1 for group in groups])


def age_band(age: int) -> str:
    """'20-29' for 25, '60+' for 71."""
    index = sum(age >= low for low in AGE_BANDS) - 1
    low, *upper = AGE_BANDS[index:index + 2]
    return f"{low}-{upper[0] - 1}" if upper else f"{low}+"


def subgroup_figures(predictions: LabelledPredictions, answered: Tensor | None,
                     manifest: Manifest, classes: tuple[str, ...]) -> list[dict]:
    """A row for each class x age band x gender of the data set.

    Each row holds n, accuracy, the calibration gap (mean confidence less accuracy) and the share
    not answered. Intervals are Wilson's; that of the calibration gap takes the mean confidence as
    exact. answered (n,) bool, or None without a calibration.
    """
    confidence, correct = predictions.probs.max(1).values, predictions.correct()
    members: dict[tuple, list[int]] = {}
    labels = predictions.labels.tolist()
    for row, (file, label) in enumerate(zip(predictions.files, labels, strict=True)):
        person = manifest[file]
        gender = GENDERS.get(person["gender"], person["gender"])
        members.setdefault((label, age_band(int(person["age"])), gender), []).append(row)
    table = []
    for (label, band, gender), rows in sorted(members.items()):
        n, n_correct = len(rows), int(correct[rows].sum())
        mean_confidence = confidence[rows].double().mean().item()
        low, high = wilson_interval(n_correct, n)
        n_abstained = None if answered is None else int((~answered[rows]).sum())
        table.append({"class": classes[label], "age_band": band, "gender": gender, "n": n,
                      "accuracy": n_correct / n, "accuracy_ci95": [low, high],
                      "mean_confidence": mean_confidence,
                      "calibration_gap": mean_confidence - n_correct / n,
                      "calibration_gap_ci95": [mean_confidence - high, mean_confidence - low],
                      **abstention_share(n_abstained, n)})
    return table


def abstention_share(n_abstained: int | None, n: int) -> dict:
    """The share of pictures not answered, with its interval; None without a calibration."""
    if n_abstained is None:
        return {"abstained": None, "abstained_ci95": [None, None]}
    return {"abstained": n_abstained / n, "abstained_ci95": list(wilson_interval(n_abstained, n))}


# ------------------------------------------------------------------------------- comparisons
def compare_resolution(predictions: LabelledPredictions, through_112: LabelledPredictions,
                       classes: tuple[str, ...]) -> dict:
    """Figures of predictions through 112 x 112 crops; McNemar p against those from the source."""
    everything = torch.ones_like(through_112.labels, dtype=torch.bool)
    return subset_figures(through_112, everything, classes) | {
        "mcnemar_p": mcnemar_exact(predictions.correct(), through_112.correct())}


def compare_checkpoints(predictions: LabelledPredictions,
                        other: dict[str, tuple[int, int]]) -> dict:
    """Accuracy of another checkpoint on the same pictures, and the McNemar p value.

    other: label and prediction by file. Raises ValueError if its pictures or labels differ.
    """
    labels = dict(zip(predictions.files, predictions.labels.tolist(), strict=True))
    if {file: label for file, (label, _) in other.items()} != labels:
        raise ValueError("holds other pictures or other labels")
    other_predicted = torch.tensor([other[file][1] for file in predictions.files])
    correct, other_correct = predictions.correct(), other_predicted == predictions.labels
    return {"accuracy": other_correct.double().mean().item(),
            "right_here_alone": int((correct & ~other_correct).sum()),
            "right_there_alone": int((other_correct & ~correct).sum()),
            "mcnemar_p": mcnemar_exact(correct, other_correct)}
