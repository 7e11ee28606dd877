"""Tables of an evaluation: the printed report, CSV and JSON files, saved predictions.

The figures are those of evaluation.measure. Every file is written whole or not at all.
"""
import csv
import json
import zipfile
from pathlib import Path

import numpy as np

from models.reports.evaluation import LabelledPredictions
from models.running.files import atomic_write


# --------------------------------------------------------------------------- printed report
def format_accuracy(figures: dict) -> str:
    """'88.26 % (95 % interval 87.28 to 89.18) of 4,404'."""
    low, high = (100 * end for end in figures["accuracy_ci95"])
    return (f"{100 * figures['accuracy']:.2f} % (95 % interval {low:.2f} to {high:.2f}) "
            f"of {figures['n']:,}")


def print_report(figures: dict, set_name: str) -> None:
    """The figures as text; the first line has the form of the published evaluation."""
    print(f"Accuracy of the model on the {set_name} set: {100 * figures['accuracy']:.3f} %")
    print(f"  all pictures              {format_accuracy(figures)}")
    print(f"  with a detected face      {format_accuracy(figures['with_detected_face'])}; "
          f"{figures['without_detected_face']['n']:,} aligned by mean landmarks")
    if "without_twin" in figures:
        print(f"  without near-duplicates   {format_accuracy(figures['without_twin'])} "
              "(in another split)")
    if "through_112" in figures:
        print(f"  through 112 x 112 crops   {format_accuracy(figures['through_112'])}; "
              f"McNemar p {figures['through_112']['mcnemar_p']:.3g}")
    if other := figures.get("against"):
        print(f"  the other checkpoint      {100 * other['accuracy']:.2f} %; only this one correct "
              f"{other['right_here_alone']}, only the other {other['right_there_alone']}: "
              f"McNemar p {other['mcnemar_p']:.3g}")
    print(f"  balanced accuracy {100 * figures['balanced_accuracy']:.2f} %, "
          f"macro-F1 {100 * figures['macro_f1']:.2f} %")
    if figures["unreadable"]:
        print(f"  {len(figures['unreadable'])} unreadable, left out; the first: "
              f"{figures['unreadable'][0]}")
    print_classes(figures["per_class"])
    print_calibration(figures["calibration"])
    if "abstention" in figures:
        print_selective(figures["abstention"])
    else:
        print("The checkpoint has no calibration: evaluate.py --calibrate fits one")


def print_classes(per_class: dict[str, dict]) -> None:
    """Precision, recall, F1 and number of pictures of each class."""
    width = max(map(len, per_class)) + 2
    print(f"\n{'':{width}}precision   recall       F1        n")
    for name, row in per_class.items():
        cells = "".join(f"{100 * row[key]:7.2f} %" for key in ("precision", "recall", "f1"))
        print(f"{name:{width}}{cells}{row['n']:9,}")


def print_calibration(calibration: dict) -> None:
    """Debiased ECE, NLL and Brier score before and after calibration."""
    print()
    for state, scores in calibration.items():
        per_class = ", ".join(f"{name} {100 * row['ece_debiased']:.1f}"
                              for name, row in scores["per_class"].items())
        print(f"{state:7}calibration: ECE {100 * scores['ece_debiased']:.2f} % ({per_class}), "
              f"NLL {scores['nll']:.4f}, Brier {scores['brier']:.4f}")


def print_selective(figures: dict) -> None:
    """Selective prediction and prediction sets, for all pictures and per class."""
    print(f"Selective prediction at a target error of {100 * figures['target_error']:g} %: share "
          "not answered, error of those answered; coverage and mean size of the "
          f"{100 - 100 * figures['alpha']:g} % prediction sets:")
    width = max(map(len, ("all", *figures["per_class"]))) + 2
    for name, row in (("all", figures), *figures["per_class"].items()):
        print(f"  {name:{width}}{100 * row['abstained']:5.1f} %"
              f"{100 * row['error_of_answered']:8.2f} %{100 * row['set_coverage']:8.1f} %"
              f"{row['mean_set_size']:8.2f}")


# ------------------------------------------------------------------------------------ files
def write_json(path: Path, values: dict) -> None:
    """Indented JSON."""
    with atomic_write(path) as temporary_path:
        temporary_path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    """A CSV whose columns are the keys of the first row."""
    with (atomic_write(path) as temporary_path,
          open(temporary_path, "w", newline="", encoding="utf-8") as file):
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_subgroups(table: list[dict], path: Path) -> None:
    """subgroup_figures as a CSV; an interval <key>_ci95 becomes <key>_low and <key>_high."""
    rows = []
    for row in table:
        cells: dict = {}
        for key, value in row.items():
            name = key.removesuffix("_ci95")
            ends = {f"{name}_low": value[0], f"{name}_high": value[1]} if name != key else {}
            cells |= ends or {key: value}
        rows.append({key: f"{value:.4f}" if isinstance(value, float) else value
                     for key, value in cells.items()})
    write_csv(path, rows)


def write_summary(folder: Path) -> None:
    """summary.csv, also printed: a row for each <name>_metrics.json of the folder."""
    rows = []
    for path in sorted(folder.glob("*_metrics.json")):
        figures = json.loads(path.read_text(encoding="utf-8"))
        if {"checkpoint", "per_class", "accuracy_ci95"} <= set(figures):    # else another program's
            rows.append(summary_row(path.name.removesuffix("_metrics.json"), figures))
    write_csv(folder / "summary.csv", rows)
    titles = [f"{row['checkpoint']} on {row['data']}" for row in rows]
    width = max(map(len, titles))
    print(f"\nAll reports in {folder} (accuracy and 95 % interval in %, n, class of lowest recall "
          "and that recall in %):")
    for title, row in zip(titles, rows, strict=True):
        print(f"  {title:{width}}  {row['accuracy']} ({row['low']} to {row['high']})"
              f"  n {row['n']:,}  {row['worst class']} {row['its recall']}")


def summary_row(name: str, figures: dict) -> dict:
    """A report's row of summary.csv."""
    recall = {name: row["recall"] for name, row in figures["per_class"].items() if row["n"]}
    worst = min(recall, key=lambda name: recall[name])
    low, high = figures["accuracy_ci95"]
    unique = figures.get("without_twin")
    return {"name": name, "checkpoint": figures["checkpoint"],
            "data": f"{figures['data']} {figures['split']}".strip(), "n": figures["n"],
            "accuracy": f"{100 * figures['accuracy']:.2f}", "low": f"{100 * low:.2f}",
            "high": f"{100 * high:.2f}",
            "without twin": f"{100 * unique['accuracy']:.2f}" if unique else "",
            "worst class": worst, "its recall": f"{100 * recall[worst]:.1f}",
            "recall gap": f"{100 * (max(recall.values()) - recall[worst]):.1f}"}


def save_predictions(path: Path, predictions: LabelledPredictions) -> None:
    """An .npz file with files (n,), labels (n,), logits (n, C) and probs (n, C)."""
    with atomic_write(path) as temporary_path:
        np.savez_compressed(temporary_path, files=np.array(predictions.files),
                            labels=predictions.labels.numpy(), logits=predictions.logits.numpy(),
                            probs=predictions.probs.numpy())


def read_saved_predictions(path: str | Path) -> dict[str, tuple[int, int]]:
    """Label and predicted label by file, from a file of save_predictions.

    Raises OSError if it cannot be read and ValueError if it is another kind of file.
    """
    try:
        with np.load(path) as saved:
            predicted = saved["probs"].argmax(1).tolist()
            rows = zip(saved["labels"].tolist(), predicted, strict=True)
            return dict(zip(saved["files"].tolist(), rows, strict=True))
    except (KeyError, ValueError, TypeError, zipfile.BadZipFile):
        raise ValueError("not a file of evaluate.py --save_probs") from None
