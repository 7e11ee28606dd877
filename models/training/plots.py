"""Loss curves of a training run."""
import json
from pathlib import Path

from models.running.files import atomic_write


def draw_losses(log: Path, path: Path) -> None:
    """Writes a PNG of training loss, validation loss and validation accuracy by epoch."""
    from matplotlib.figure import Figure
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    loss_axes = figure.subplots()
    loss_axes.plot(epochs, [row["train_loss"] for row in rows], color="tab:blue",
                   label="training loss (augmented, with auxiliary heads)")
    loss_axes.plot(epochs, [row["val_loss"] for row in rows], label="validation loss",
                   color="tab:orange")
    loss_axes.set_xlabel("epoch")
    loss_axes.set_ylabel("cross-entropy")
    accuracy_axes = loss_axes.twinx()
    accuracy_axes.plot(epochs, [100 * row["val_accuracy"] for row in rows],
                       label="validation accuracy", color="tab:green")
    accuracy_axes.set_ylabel("validation accuracy, %")
    for previous, row in zip(rows, rows[1:], strict=False):
        if row["input_size"] != previous["input_size"]:
            loss_axes.axvline(row["epoch"] - 0.5, color="grey", linewidth=0.8, linestyle=":")
            loss_axes.annotate(f"{row['input_size']} px",
                               (row["epoch"] - 0.4, loss_axes.get_ylim()[1]), va="top", fontsize=8)
    lines = loss_axes.get_lines()[:2] + accuracy_axes.get_lines()
    figure.legend(lines, [str(line.get_label()) for line in lines],
                  loc="outside lower center", ncols=3)
    with atomic_write(path) as temporary_path:
        figure.savefig(temporary_path, dpi=120, format="png")
