"""Plots: confusion matrices, reliability, risk-coverage, subgroups, shares, class counts, faces.

Each function writes one figure as a file. Figures are rendered by Agg and need neither a display
nor pyplot's backend.
"""
import os
from pathlib import Path

import numpy as np

# matplotlib reads MPLBACKEND when it is imported, and fails if that backend is not installed here:
# notebooks pass theirs on to every command they start.
if os.environ.get("MPLBACKEND", "agg").lower() != "agg":
    del os.environ["MPLBACKEND"]

import matplotlib  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from models.reports.evaluation import AGE_BANDS, age_band  # noqa: E402
from models.running.files import atomic_write  # noqa: E402

BEFORE_COLOUR, AFTER_COLOUR = "#999999", "#1f6fb2"      # calibration
# Names of classes, folders and files may contain a $, which would start a formula.
without_formulas = matplotlib.rc_context({"text.parse_math": False})


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Writes the figure in the format of the file's suffix, whole or not at all."""
    with atomic_write(path) as temporary_path:
        figure.savefig(temporary_path, dpi=dpi)


# ------------------------------------------------------------------------------- evaluation
@without_formulas
def draw_confusion(confusion: np.ndarray, classes: tuple[str, ...], title: str, percentage: bool,
                   path: Path) -> None:
    """Confusion matrix (C, C) as counts, or as percentages of the pictures of each true class."""
    from sklearn.metrics import ConfusionMatrixDisplay  # slow to import; only this plot uses it

    n_classes, counts = len(classes), confusion.sum(1)
    figure = Figure(figsize=(1.6 + 1.15 * n_classes, 1.5 + 1.05 * n_classes), layout="constrained")
    axes = figure.subplots()
    display = ConfusionMatrixDisplay(confusion / counts[:, None].clip(min=1),
                                     display_labels=classes)
    display.plot(ax=axes, cmap="Blues", colorbar=False, values_format=".1%",
                 im_kw={"vmin": 0, "vmax": 1}, text_kw={"fontsize": 11})
    if not percentage:
        for text, count in zip(display.text_.flat, confusion.flat, strict=True):
            text.set_text(f"{count:,}")
    axes.set_yticks(range(n_classes),
                    [f"{name}\nn = {n:,}" for name, n in zip(classes, counts, strict=True)])
    axes.set_xlabel("predicted label")
    axes.set_ylabel("label in the data set")
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


@without_formulas
def draw_reliability(calibration: dict, classes: tuple[str, ...], title: str, path: Path) -> None:
    """Reliability diagrams before and after calibration, of the confidence and of each class.

    calibration: calibration_figures by state, 'before' and, if the checkpoint is calibrated,
    'after'.
    """
    colours = {"before": BEFORE_COLOUR, "after": AFTER_COLOUR}
    figure = Figure(figsize=(3.1 * (len(classes) + 1), 4.2), layout="constrained")
    panels = figure.subplots(1, len(classes) + 1, sharey=True)
    for axes, name in zip(panels, ("all", *classes), strict=True):
        axes.plot((0, 1), (0, 1), color="black", linewidth=0.6)
        rows = {state: figures if name == "all" else figures["per_class"][name]
                for state, figures in calibration.items()}
        for state, row in rows.items():
            stated, observed, _ = zip(*row["bins"], strict=True) if row["bins"] else ((), (), ())
            axes.plot(stated, observed, "o-", color=colours[state], markersize=3.5, linewidth=1,
                      label=state)
        axes.text(0.98, 0.03, score_lines(list(rows.values())), ha="right", va="bottom",
                  fontsize=8, transform=axes.transAxes)
        axes.set_title("predicted label" if name == "all" else name, fontsize=10)
        axes.set_xlabel("confidence" if name == "all" else f"p({name})")
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1)
        axes.legend(fontsize=8, loc="upper left", frameon=False)
    panels[0].set_ylabel("observed frequency")
    states = " → ".join(f"{state} calibration" for state in calibration)
    figure.suptitle(f"{title}\n15 bins of equal mass; ECE debiased; NLL and Brier score of a class "
                    f"over the pictures of that class; {states}", fontsize=10)
    save_figure(figure, path)


def score_lines(figures: list[dict]) -> str:
    """'ECE 3.1 → 0.9 %', NLL and Brier likewise, a line each, before and after calibration."""
    ece, nll, brier = (
        " → ".join(f"{scale * row[key]:.{digits}f}" for row in figures)
        for key, scale, digits in (("ece_debiased", 100, 1), ("nll", 1, 3), ("brier", 1, 3)))
    return f"ECE {ece} %\nNLL {nll}\nBrier {brier}"


@without_formulas
def draw_risk(curves: dict, title: str, path: Path) -> None:
    """Risk-coverage curves of all pictures and of each class, from risk_coverage_figures."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        is_total = name == "all"
        axes.plot(range(1, 1 + len(curve["risk"])), [100 * risk for risk in curve["risk"]],
                  color="black" if is_total else None, linewidth=2 if is_total else 1.2,
                  label=f"{name}: area {100 * curve['area']:.2f} %")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("coverage, most confident pictures first (%)")
    axes.set_ylabel("error rate of the covered pictures (%)")
    axes.grid(alpha=0.3)
    axes.legend(title="label in the data set", fontsize=8)
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


@without_formulas
def draw_subgroups(table: list[dict], classes: tuple[str, ...], title: str, path: Path) -> None:
    """Heat maps of class x age band: a row of panels for each figure, a column for each gender."""
    genders = sorted({row["gender"] for row in table}, reverse=True)
    kinds = [("accuracy", "accuracy", "{:.0f} %", {"cmap": "Blues", "vmin": 0.4, "vmax": 1}),
             ("calibration_gap", "mean confidence less accuracy, points", "{:+.0f}",
              {"cmap": "RdBu_r", "vmin": -0.3, "vmax": 0.3}),
             ("abstained", "share not answered", "{:.0f} %",
              {"cmap": "Oranges", "vmin": 0, "vmax": 1})]
    kinds = [kind for kind in kinds if table[0][kind[0]] is not None]
    height = 0.8 + len(kinds) * (0.8 + 0.75 * len(classes))
    figure = Figure(figsize=(1.2 + 6.2 * len(genders), height), layout="constrained")
    panels = figure.subplots(len(kinds), len(genders), squeeze=False)
    for panel_row, (key, name, template, colours) in zip(panels, kinds, strict=True):
        for axes, gender in zip(panel_row, genders, strict=True):
            rows = [row for row in table if row["gender"] == gender]
            draw_heat_map(axes, rows, classes, key, template, colours)
            axes.set_title(f"{gender}: {name}", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("age in the data set (years)")
    figure.suptitle(f"{title}\nby label, age and gender in the data set: the figure, its 95 % "
                    "interval, number of pictures", fontsize=10)
    save_figure(figure, path)


def draw_heat_map(axes: Axes, rows: list[dict], classes: tuple[str, ...], key: str, template: str,
                  colours: dict) -> None:
    """Class x age band: rows[...][key], a fraction, as colour and text, with its interval and n."""
    bands = [age_band(low) for low in AGE_BANDS]
    values = np.full((len(classes), len(bands)), np.nan)
    image = axes.imshow(values, aspect="auto", **colours)
    for row in rows:
        y, x = classes.index(row["class"]), bands.index(row["age_band"])
        values[y, x] = row[key]
        red, green, blue, _ = image.to_rgba(row[key])
        is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        low, high = (template.format(100 * end).removesuffix(" %") for end in row[f"{key}_ci95"])
        axes.text(x, y, f"{template.format(100 * row[key])}\n{low} to {high}\nn = {row['n']}",
                  ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
    image.set_data(values)
    axes.set_xticks(range(len(bands)), bands)
    axes.set_yticks(range(len(classes)), classes)


# ----------------------------------------------------------------------------------- shares
@without_formulas
def draw_shares(reports: dict[str, dict], classes: tuple[str, ...], path: str | Path) -> None:
    """Per class the estimated share with its interval and the raw share, a line for each report.

    reports: reports of estimate_shares by name; those of no faces are left out.
    """
    reports = {name: report for name, report in reports.items() if report["n"]}
    height = 1.4 + 0.28 * len(classes) * max(1, len(reports))
    figure = Figure(figsize=(1.6 + 1.5 * len(classes), height), layout="constrained")
    panels = figure.subplots(1, len(classes), sharey=True, squeeze=False)[0]
    for k, (axes, label) in enumerate(zip(panels, classes, strict=True)):
        for y, report in enumerate(reports.values()):
            entry = report["methods"][report["default"]]
            colour = "tab:red" if report["warning"] else "tab:blue"
            axes.plot([100 * entry["low"][k], 100 * entry["high"][k]], [y, y], color=colour,
                      linewidth=2)
            axes.plot(100 * entry["shares"][k], y, "o", color=colour,
                      label="estimate, 95 % interval; red: no fit to the validation faces")
            axes.plot(100 * report["methods"]["raw"]["shares"][k], y, "x", color="0.35",
                      label="raw count")
        axes.set_title(label)
        axes.set(xlim=(-3, 103), xticks=(0, 50, 100), xlabel="%")
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(reports)),
                         [f"{name} (n = {report['n']})" for name, report in reports.items()])
    panels[0].set_ylim(max(1, len(reports)) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, path, dpi=120)


# ------------------------------------------------------------------------- data and faces
@without_formulas
def draw_class_distribution(counts: dict[str, int], name: str, path: str | Path) -> None:
    """A bar for each class with its count and share. name: of the set, for the title."""
    total = sum(counts.values())
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(list(counts), list(counts.values()), color="tab:blue", width=0.7)
    shares = [f"{n:,}\n{100 * n / max(1, total):.1f} %" for n in counts.values()]
    axes.bar_label(bars, shares, padding=2)
    axes.set(title=f"{name}: {total:,} pictures", ylabel="pictures")
    axes.margins(y=0.18)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path, dpi=120)


@without_formulas
def draw_face_grid(faces: list[tuple[np.ndarray, str]], shape: tuple[int, int],
                   figsize: tuple[float, float], path: str | Path) -> None:
    """A grid of faces, row by row; positions beyond the last face stay empty.

    faces: crop (H, W, 3) uint8 and title of each. shape: (rows, columns). figsize: (width, height)
    in inches.
    """
    figure = Figure(figsize=figsize, layout="tight")
    panels = figure.subplots(*shape, squeeze=False).flatten()
    for axes in panels:
        axes.axis("off")
    for axes, (crop, title) in zip(panels, faces, strict=False):
        axes.imshow(crop)
        axes.set_title(title)
    save_figure(figure, path, dpi=100)
