"""benchmarks/domain_shift.py: figures by their definitions; corruptions keep the size."""
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import domain_shift
from models.faces.calibration import Calibration

CLASSES = ("a", "b")


@pytest.fixture
def calibration() -> Calibration:
    """Of 100 faces per class, of which the confidence is 0.505 to 0.995 and always right."""
    confidence = torch.linspace(0.505, 0.995, 100)
    probs = torch.stack([confidence, 1 - confidence], 1)
    return Calibration(1.0, (0.0, 0.0), torch.cat([probs, probs.flip(1)]),
                       torch.tensor([0] * 100 + [1] * 100))


@pytest.mark.parametrize("name", domain_shift.CORRUPTIONS)
def test_corruptions_keep_the_size(name):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8)
    corrupted = domain_shift.CORRUPTIONS[name](Image.fromarray(pixels))
    assert corrupted.size == (61, 40) and corrupted.mode == "RGB"
    is_same = np.array_equal(np.asarray(corrupted), pixels)
    assert is_same == (name in ("none", "mirrored"))


def test_figures_by_class(calibration):
    probs = torch.tensor([[0.95, 0.05], [0.8, 0.2], [0.3, 0.7], [0.99, 0.01]])
    labels = torch.tensor([0, 0, 1, 1])
    total, first, second = domain_shift.report_classes(probs, labels, calibration, CLASSES, 0.05)
    assert (total["n"], total["accuracy"], total["sure"]) == (4, "75.00", "50.00")
    assert (first["accuracy"], second["accuracy"]) == ("100.00", "50.00")
    assert total["accuracy_of_sure"] == "50.00" and second["accuracy_of_sure"] == "0.00"
    assert total["uncertain"] == "0.00" and first["ece"] == ""
    # the 90 % sets hold a class from about 0.55 on
    assert (total["set_coverage"], total["set_size"]) == ("75.00", "1.00")


def test_faces_of_no_class_have_no_accuracy(calibration):
    labels = torch.full((2,), domain_shift.NO_CLASS)
    (row,) = domain_shift.report_classes(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), labels,
                                         calibration, CLASSES, 0.05)
    assert row["accuracy"] == row["set_coverage"] == "" and row["uncertain"] == "50.00"
