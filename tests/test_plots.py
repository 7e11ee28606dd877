"""Plots: what is drawn, with any name and any MPLBACKEND."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from PIL import Image

from models.reports import plots

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
import sys
import numpy as np
from models.reports import plots
folder = sys.argv[1]
plots.draw_confusion(np.eye(2, dtype=int), ("a", "b"), "title", True, folder + "/confusion.png")
plots.draw_class_distribution({"a": 3, "b": 0}, "train", folder + "/classes.png")
import matplotlib
assert "MPLBACKEND" not in matplotlib.os.environ
"""


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no_such_backend",
                                     "TkAgg"])
def test_no_display_and_no_backend_is_needed(backend, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    environment |= {"MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], env=environment, check=True)
    for name in ("confusion", "classes"):
        assert Image.open(tmp_path / f"{name}.png").width > 200


@pytest.mark.parametrize("percentage", [False, True])
def test_confusion_matrix_shows_counts_or_shares(percentage, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: drawn.update(figure=figure))
    confusion = sklearn.metrics.confusion_matrix([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0],
                                                 labels=[0, 1, 2])
    plots.draw_confusion(confusion * 1000, ("$x_{$", "b", "c"), "title", percentage, tmp_path)
    axes, = drawn["figure"].axes
    shares = ["66.7%", "33.3%", "0.0%", "33.3%", "66.7%", "0.0%", "0.0%", "0.0%", "0.0%"]
    counts = ["2,000", "1,000", "0", "1,000", "2,000", "0", "0", "0", "0"]
    assert [text.get_text() for text in axes.texts] == (shares if percentage else counts)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["$x_{$", "b", "c"]
    assert axes.get_yticklabels()[1].get_text() == "b\nn = 3,000"
    colours = axes.images[0].get_array()            # a class without pictures gives 0
    assert np.allclose(colours, [[2 / 3, 1 / 3, 0], [1 / 3, 2 / 3, 0], [0, 0, 0]])
    assert axes.images[0].get_clim() == (0, 1)


def test_face_grid_takes_fewer_faces_than_it_has_places(tmp_path):
    crop = np.full((112, 112, 3), 200, dtype=np.uint8)
    plots.draw_face_grid([(crop, "White 99%"), (crop, r"$\\frac$")], (2, 3), (6, 4),
                         tmp_path / "0.jpg")
    picture = Image.open(tmp_path / "0.jpg")
    assert picture.format == "JPEG" and picture.size == (600, 400)
