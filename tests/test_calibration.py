"""Calibration, thresholds and prediction sets on faces drawn from a known distribution."""
import numpy as np
import pytest
import torch

from models.faces import checkpoint
from models.faces.calibration import (
    Calibration,
    class_thresholds,
    fit_calibration,
    fit_terms,
    log_error_rates,
    raise_weak,
    set_thresholds,
    stratified_folds,
)


def draw_faces(n: int, *, temperature: float = 1.0, bias=(0.0, 0.0, 0.0, 0.0), seed: int = 0):
    """logits (n, 4), overconfident by `temperature`; labels (n,) drawn from the exact probs."""
    generator = torch.Generator().manual_seed(seed)
    sharp = 2.5 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial((sharp + torch.tensor(bias, dtype=torch.float64)).softmax(1), 1,
                               generator=generator)
    return (sharp * temperature).float(), labels[:, 0]


def test_known_temperature_and_biases_are_recovered():
    bias = (0.6, -0.4, 0.1, -0.3)
    logits, labels = draw_faces(8_000, temperature=1.8, bias=bias)
    calibration = fit_calibration(logits, labels, balance=0)
    assert calibration.temperature == pytest.approx(1.8, rel=0.05)
    assert calibration.bias == pytest.approx(bias, abs=0.12)
    probs = calibration.probs(logits)
    assert probs.dtype == torch.float32
    # as many as there are
    assert torch.allclose(probs.mean(0), torch.bincount(labels) / len(labels), atol=2e-3)


def test_doubt_goes_to_the_class_that_errs_most():
    """Class 1 is mistaken for class 0 in near-ties; nothing else is in doubt."""
    sure, tie = [4.0, 0.0, 0.0], [0.2, 0.0, -4.0]
    logits = torch.tensor([sure] * 50 + [[0.0, 4.0, 0.0]] * 30 + [[0.0, 0.0, 4.0]] * 50
                          + [tie] * 20).double()
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 50 + [1] * 11 + [0] * 9)
    log_probs = logits.log_softmax(1)
    rates = log_error_rates(log_probs, labels)
    overall = 12 / 152
    expected = torch.tensor([(10 * overall) / 69, (11 + 10 * overall) / 51,
                             (10 * overall) / 60]).double().log()
    assert torch.allclose(rates, expected - expected.mean())
    raised = raise_weak(log_probs, labels, 0.5)
    assert torch.allclose(raised, 0.5 * rates)
    n_correct = [(scores.argmax(1) == labels).sum() for scores in (log_probs, log_probs + raised)]
    assert n_correct[1] == n_correct[0] + 2


def test_no_right_label_is_paid_for_balance():
    sure, tie = [4.0, 0.0], [0.01, 0.0]
    logits = torch.tensor([sure] * 80 + [tie] * 10 + [[0.0, 4.0]] * 20 + [tie] * 8).double()
    log_probs = logits.log_softmax(1)
    labels = torch.tensor([0] * 90 + [1] * 28)
    assert log_error_rates(log_probs, labels)[1] > 0
    assert torch.equal(raise_weak(log_probs, labels, 0.5), torch.zeros(2).double())


def test_the_raise_is_in_bias_and_stored_probabilities():
    logits, labels = draw_faces(3_000, temperature=1.8, bias=(1.2, -0.4, -0.6, -0.2))
    logits[:, 0] += 0.5 * torch.randn(3_000, generator=torch.Generator().manual_seed(1))
    plain, raised = fit_calibration(logits, labels, balance=0), fit_calibration(logits, labels)
    by = torch.tensor(raised.bias) - torch.tensor(plain.bias)
    expected = (plain.val_probs.double().log() + by).softmax(1)
    assert torch.allclose(raised.val_probs.double(), expected, atol=1e-6)
    assert torch.allclose(by.double(), raise_weak(plain.val_probs.double().log(), labels, 0.5),
                          atol=1e-4)


def test_balance_leaves_a_class_without_a_face_alone():
    log_probs = torch.full((200, 4), 0.25).double().log()
    log_probs[:, 0] += 0.1
    rates = log_error_rates(log_probs, torch.arange(200) % 3)
    assert rates[0] < rates[3] < min(rates[1], rates[2])


def test_curved_confidence_is_recovered():
    """Logits as label smoothing leaves them: the larger the margin, the more they understate."""
    true, labels = draw_faces(8_000)
    margin = true.topk(2, 1).values.diff(dim=1).neg()
    # margin m with m (1 + 0.2 m) that of the true logits
    squeezed = true * 2 / (1 + (1 + 0.8 * margin).sqrt())
    calibration = fit_calibration(squeezed, labels, balance=0)
    assert calibration.temperature == pytest.approx(1.0, rel=0.1)
    assert calibration.curve == pytest.approx(0.2, rel=0.2)
    straight = fit_terms(squeezed.double(), labels, with_curve=False, with_bias=False)[0] * squeezed
    confidence = [probs.max(1).values
                  for probs in (calibration.probs(squeezed), straight.softmax(1), true.softmax(1))]
    curved, straight_error = ((confidence[i] - confidence[2]).abs().mean() for i in (0, 1))
    assert curved < 0.3 * straight_error


def test_logits_that_point_the_wrong_way_give_almost_no_confidence():
    true, labels = draw_faces(2_000)
    calibration = fit_calibration(-true, labels, balance=0)
    assert calibration.curve == 0 and calibration.temperature > 100


def test_a_curve_that_would_turn_the_order_around_is_left_out():
    true, labels = draw_faces(8_000)
    margin = true.topk(2, 1).values.diff(dim=1).neg()
    assert fit_calibration(true * (1 + 0.3 * margin), labels, balance=0).curve == 0


def test_optimum_agrees_with_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    logits, labels = draw_faces(400, temperature=1.4, bias=(0.5, 0.0, -0.5, 0.0))
    z = logits.double().numpy()

    def loss(theta):
        scores = z * theta[0] + theta[1:]
        nll = np.logaddexp.reduce(scores, 1) - scores[np.arange(len(z)), labels.numpy()]
        return nll.sum() + 0.5 * ((theta[0] - 1) ** 2 + (theta[1:] ** 2).sum())

    theirs = optimize.minimize(loss, np.array([1.0, 0, 0, 0, 0]), tol=1e-10).x
    slope, _, bias = fit_terms(logits.double(), labels, with_curve=False, with_bias=True)
    assert slope == pytest.approx(theirs[0], abs=1e-4)
    assert bias.numpy() == pytest.approx(theirs[1:] - theirs[1:].mean(), abs=1e-4)


def test_same_numbers_every_time_and_whatever_is_added_to_a_row():
    logits, labels = draw_faces(500)
    one, two = fit_calibration(logits, labels), fit_calibration(logits, labels)
    assert one.temperature == two.temperature and one.bias == two.bias
    assert torch.equal(one.val_probs, two.val_probs)
    shifted = fit_calibration(logits + torch.arange(500)[:, None] % 7, labels)
    assert torch.allclose(one.val_probs, shifted.val_probs, atol=1e-4)


def test_stored_probabilities_are_those_of_faces_left_out():
    """On labels independent of the logits, a fit overfits; the stored probabilities must not."""
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(60, 4, generator=generator)
    labels = torch.randint(4, (60,), generator=generator)
    calibration = fit_calibration(logits, labels, balance=0)

    def nll(probs):
        return -probs.gather(1, labels[:, None]).log().mean()

    assert nll(calibration.val_probs) > nll(calibration.probs(logits))
    assert torch.allclose(calibration.val_probs.sum(1), torch.ones(60))


def test_folds_hold_every_class_alike():
    labels = torch.tensor([0] * 100 + [1] * 23 + [2] * 7)
    folds = stratified_folds(labels, 5)
    counts = torch.stack([torch.bincount(labels[folds == fold], minlength=3) for fold in range(5)])
    assert (counts.max(0).values - counts.min(0).values <= 1).all()


@pytest.mark.parametrize("n", [2, 3, 12])
def test_few_and_separable_faces_give_finite_calibrations(n):
    labels = torch.arange(n) % 2
    calibration = fit_calibration(10 * torch.nn.functional.one_hot(labels, 4).float(), labels)
    assert 0 < calibration.temperature < 1e4
    assert calibration.val_probs.isfinite().all() and calibration.val_probs.shape == (n, 4)


def test_mistakes_are_named():
    logits, labels = draw_faces(10)
    with pytest.raises(ValueError, match="at least 2 faces"):
        fit_calibration(logits[:1], labels[:1])
    with pytest.raises(ValueError, match="labels reach from"):
        fit_calibration(logits, labels + 4)
    with pytest.raises(ValueError, match="not finite"):
        fit_calibration(logits.index_fill(0, torch.tensor([0]), torch.nan), labels)


def test_checkpoint_holds_the_same_class():
    assert checkpoint.Calibration is Calibration


def calibration_of(n: int, seed: int = 0) -> Calibration:
    """A calibration whose validation probabilities are true."""
    logits, labels = draw_faces(n, seed=seed)
    return Calibration(1.0, (0.0,) * 4, logits.softmax(1), labels)


def test_thresholds_keep_the_error_of_each_class_and_answer_as_many_as_possible():
    calibration = calibration_of(3000)
    thresholds = class_thresholds(calibration, 0.05)
    confidence, predictions = calibration.val_probs.max(1)
    for c in range(4):
        mine = predictions == c
        wrong = calibration.val_labels[mine] != c
        allowed = [t for t in confidence[mine].unique()
                   if wrong[confidence[mine] >= t].float().mean() <= 0.05]
        assert thresholds[c] == min(allowed)


def test_thresholds_at_the_ends():
    calibration = calibration_of(300)
    confidence, predictions = calibration.val_probs.max(1)
    least = torch.stack([confidence[predictions == c].min() for c in range(4)])
    assert torch.equal(class_thresholds(calibration, 1.0), least)
    always_wrong = Calibration(1.0, (0.0,) * 4, calibration.val_probs, (predictions + 1) % 4)
    assert class_thresholds(always_wrong, 0.05).isinf().all()


def test_faces_of_equal_confidence_are_answered_together():
    """Three at 0.9, one wrong: all are answered at an error of 1/3, none below, in any order."""
    probs = torch.tensor([[0.9, 0.1]] * 3)
    for labels in ([0, 0, 1], [1, 0, 0]):
        calibration = Calibration(1.0, (0.0, 0.0), probs, torch.tensor(labels))
        assert class_thresholds(calibration, 0.2)[0].isinf()
        assert class_thresholds(calibration, 0.34)[0] == pytest.approx(0.9)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_sets_cover_each_class(alpha):
    covered = torch.zeros(4)
    for seed in range(10):
        calibration = calibration_of(800, seed=2 * seed)
        logits, labels = draw_faces(4000, seed=2 * seed + 1)
        sets = logits.softmax(1) >= set_thresholds(calibration, alpha)
        covered += torch.stack([sets[labels == k, k].float().mean() for k in range(4)]) / 10
    # of ten quantiles, each of 200 faces of a class
    chance = (alpha * (1 - alpha) / (10 * 200)) ** 0.5
    assert ((covered - (1 - alpha)).abs() < 4 * chance).all()


def test_sets_by_hand_and_of_little():
    """Nine faces per class: alpha 0.1 allows one miss, the face of least probability; 0.05 none."""
    p = torch.linspace(0.1, 0.9, 9)
    probs = torch.cat([torch.stack([p, 1 - p], 1), torch.stack([1 - p, p], 1)])
    calibration = Calibration(1.0, (0.0, 0.0), probs, torch.tensor([0] * 9 + [1] * 9))
    low = torch.tensor([[0.05, 0.95], [0.2, 0.8]])
    assert (low >= set_thresholds(calibration, 0.1)).tolist() == [[False, True], [True, True]]
    assert (low >= set_thresholds(calibration, 0.05)).all()
