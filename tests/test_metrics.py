import math

import numpy as np
import pytest
import sklearn.metrics
import torch

from models.reports.metrics import (
    class_figures,
    confusion_matrix,
    ece_interval,
    mcnemar_exact,
    wilson_interval,
)


def random_pair(n: int, n_classes: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(n_classes, (n,), generator=generator)
    noise = torch.randint(n_classes, (n,), generator=generator)
    return labels, torch.where(torch.rand(n, generator=generator) < 0.8, labels, noise)


def test_figures_agree_with_scikit_learn():
    labels, predictions = random_pair(500)
    confusion = confusion_matrix(labels, predictions, 4)
    assert confusion.dtype == torch.int64
    assert np.array_equal(confusion.numpy(), sklearn.metrics.confusion_matrix(labels, predictions))
    figures = class_figures(confusion)
    assert figures["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
    balanced = sklearn.metrics.balanced_accuracy_score(labels, predictions)
    assert figures["balanced_accuracy"] == pytest.approx(balanced)
    assert figures["macro_f1"] == pytest.approx(sklearn.metrics.f1_score(labels, predictions,
                                                                         average="macro"))
    columns = sklearn.metrics.precision_recall_fscore_support(labels, predictions)
    for row, wanted in zip(figures["per_class"], zip(*columns, strict=True), strict=True):
        cells = [row[key] for key in ("precision", "recall", "f1", "n")]
        assert cells == pytest.approx(list(wanted))


def test_matrices_of_parts_add_up_to_the_whole():
    labels, predictions = random_pair(101)
    parts = sum(confusion_matrix(labels[rank::3], predictions[rank::3], 4) for rank in range(3))
    assert torch.equal(parts, confusion_matrix(labels, predictions, 4))


def test_absent_classes_and_empty_sets_give_numbers():
    labels, predictions = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2, 1, 1])
    figures = class_figures(confusion_matrix(labels, predictions, 4))
    assert figures["balanced_accuracy"] == 0.75  # over the two classes that have pictures
    assert figures["macro_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["per_class"][2] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 0}
    empty = torch.zeros(0, dtype=torch.int64)
    figures = class_figures(confusion_matrix(empty, empty, 4))
    assert (figures["n"], figures["accuracy"], figures["balanced_accuracy"],
            figures["macro_f1"]) == (0, 0, 0, 0)


def test_wilson_interval_of_the_published_figure():
    low, high = wilson_interval(round(0.88261 * 4404), 4404)
    assert (round(100 * low, 2), round(100 * high, 2)) == (87.28, 89.18)


def test_wilson_interval_at_its_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1
    for k in range(11):  # its defining equation: the score test at either end
        for p in wilson_interval(k, 10):
            assert abs(k / 10 - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / 10),
                                                    abs=1e-6)
            assert 0 <= p <= 1


def test_mcnemar_is_the_binomial_test_on_the_pictures_that_differ():
    generator = torch.Generator().manual_seed(1)
    for n in (10, 400, 5000):
        a, b = torch.rand(n, generator=generator) < 0.8, torch.rand(n, generator=generator) < 0.75
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        n_different = only_a + only_b
        n_ways = sum(math.comb(n_different, i) for i in range(min(only_a, only_b) + 1))
        assert mcnemar_exact(a, b) == pytest.approx(min(1, 2 * n_ways / 2 ** n_different))
        assert mcnemar_exact(a, b) == mcnemar_exact(b, a)


def test_mcnemar_of_equal_classifiers_is_one():
    same = torch.tensor([True, False, True])
    assert mcnemar_exact(same, same) == 1.0


@pytest.mark.parametrize("shift", [0.0, 0.03])
def test_the_calibration_errors_interval_holds_the_true_error(shift):
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(20):
        stated = 0.55 + 0.4 * torch.rand(1000, generator=generator)
        low, high = ece_interval(stated, torch.rand(1000, generator=generator) < stated - shift,
                                 n_resamples=100)
        assert 0 <= low <= high < 0.1
        held += low <= shift <= high
    assert held >= 17
    assert ece_interval(stated, stated > 0.6) == ece_interval(stated, stated > 0.6)
    assert ece_interval(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) == (0, 1)
