"""Group shares: exact in exact cases, equal to other implementations, coverage of intervals."""
import csv
import importlib.util
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from models.faces.align import TEMPLATE, WHOLE_TEMPLATE
from models.faces.calibration import Calibration
from models.faces.checkpoint import Checkpoint, save_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec
from models.reports import shares
from models.reports.plots import draw_shares
from models.reports.shares import draw_weights, format_shares, report_shares, simplex_least_squares
from models.reports.tally import Tally

CLASSES = ("White", "Black", "Asian", "Indian")
VAL = (500, 220, 180, 200)


def load_benchmark():
    """benchmarks/shares.py as a module; `shares` is another module's name."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "shares.py"
    spec = importlib.util.spec_from_file_location("shares_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = load_benchmark()
METHODS = BENCHMARK.METHODS                                                     # with EM
estimate_shares = partial(shares.estimate_shares, methods=METHODS)


def draw_faces(counts, rng, blur: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """probs (n, 4) and labels (n,) of an 85 % classifier; a larger `blur` raises its errors."""
    means = np.array([[3.0, 0, 0, 0.3], [0, 3.0, 0, 0.8], [0.3, 0, 3.0, 0], [0.6, 1.0, 0.1, 2.6]])
    labels = np.repeat(np.arange(4), counts)
    scores = means[labels] + 1.2 * blur * rng.normal(size=(len(labels), 4))
    scores = np.exp(1.5 * scores)
    return scores / scores.sum(1, keepdims=True), labels


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def val(rng):
    return draw_faces(VAL, rng)


# ---------------------------------------------------------------------------------- point estimates
@pytest.mark.parametrize("name", ["adjusted", "probabilistic"])
def test_collection_made_of_the_validation_faces_is_solved_exactly(val, name):
    probs, labels = val
    # 500 White, 200 Indian
    taken = np.concatenate([np.flatnonzero(labels == 0), np.flatnonzero(labels == 3)])
    shares = estimate_shares(probs[taken], *val, n_boot=20)["methods"][name]["shares"]
    assert shares == pytest.approx([5 / 7, 0, 0, 2 / 7], abs=1e-9)


def test_perfect_classifier_counts_and_is_sure(val):
    one_hot, labels = np.eye(4)[val[1]], val[1]
    report = estimate_shares(one_hot[labels != 2][:600], one_hot, labels, n_boot=200)
    truth = np.bincount(labels[labels != 2][:600], minlength=4) / 600
    for name in METHODS:
        assert report["methods"][name]["shares"] == pytest.approx(truth, abs=1e-6)
    entry = report["methods"]["probabilistic"]
    # of these faces nothing is unknown
    assert np.subtract(entry["high"], entry["low"]).max() < 1e-9
    assert report["warning"] == ""


def test_simplex_least_squares_agrees_with_scipy(rng):
    optimize = pytest.importorskip("scipy.optimize")
    for _ in range(20):
        A, q = rng.dirichlet(np.ones(4), 4).T, rng.dirichlet(np.ones(4) * 0.3)
        weight = 1e5  # makes the sum all but an equation
        theirs = optimize.nnls(np.vstack([A, weight * np.ones(4)]), np.append(q, weight))[0]
        ours = simplex_least_squares(A, q)
        assert ours.sum() == pytest.approx(1) and ours.min() >= 0
        assert np.linalg.norm(A @ ours - q) == pytest.approx(np.linalg.norm(A @ theirs - q),
                                                             abs=1e-6)


def test_em_is_where_the_likelihood_is_highest(val, rng):
    probs, _ = draw_faces((30, 100, 0, 50), rng)
    prior = np.bincount(val[1]) / len(val[1])
    best = BENCHMARK.em_estimate(probs, np.ones(len(probs)), prior)

    def log_likelihood(p):
        return np.log(probs / prior @ p).sum()

    for _ in range(50):
        near = np.clip(best + 0.01 * rng.normal(size=4), 0, None)
        assert log_likelihood(near / near.sum()) <= log_likelihood(best) + 1e-6


def test_quapy_agrees(val, rng):
    pytest.importorskip("quapy")
    for counts in ((50, 50, 50, 50), (180, 10, 10, 0), (0, 0, 30, 170)):
        probs, _ = draw_faces(counts, rng)
        methods = estimate_shares(probs, *val, n_boot=2)["methods"]
        for name, theirs in BENCHMARK.quapy_shares(probs, *val).items():
            assert methods[name]["shares"] == pytest.approx(theirs, abs=1e-3), name


def test_default_is_far_nearer_than_the_count(val, rng):
    missed = {name: [] for name in METHODS}
    for _ in range(12):
        counts = rng.multinomial(1000, rng.dirichlet(np.ones(4)))
        methods = estimate_shares(draw_faces(counts, rng)[0], *val, n_boot=2)["methods"]
        for name in METHODS:
            missed[name].append(abs(np.array(methods[name]["shares"]) - counts / 1000).mean())
    assert np.mean(missed["probabilistic"]) < np.mean(missed["raw"]) / 2


def test_order_of_the_faces_says_nothing(val, rng):
    probs, _ = draw_faces((40, 30, 20, 10), rng)
    assert estimate_shares(probs, *val, n_boot=50) == estimate_shares(probs[::-1], *val, n_boot=50)


# ---------------------------------------------------------------------------------------- intervals
def test_intervals_hold_the_truth_also_of_absent_classes(rng):
    """Rates over 100 collections and validation sets; three standard errors are 6.5 points."""
    held, absent = {name: [] for name in METHODS}, []
    for number in range(100):
        shares = rng.dirichlet(np.ones(4))
        shares[rng.integers(4)] *= number % 2  # every second lacks a class
        counts = rng.multinomial(300, shares / shares.sum())
        methods = estimate_shares(draw_faces(counts, rng)[0], *draw_faces(VAL, rng),
                                  n_boot=150)["methods"]
        for name, entry in methods.items():
            low, high = np.array(entry["low"]), np.array(entry["high"])
            held[name].append((low <= counts / 300) & (counts / 300 <= high))
        absent.append(counts == 0)
    for name in ("adjusted", "probabilistic"):
        assert (np.mean(held[name], 0) > 0.885).all(), name
        assert np.array(held[name])[np.array(absent)].mean() > 0.885, name
        assert np.mean(held[name]) < 0.985, name  # and are not simply wide
    assert np.mean(held["raw"]) < 0.8


def test_intervals_hold_their_estimates_and_the_source_is_less_known_than_the_faces(val, rng):
    methods = estimate_shares(draw_faces((80, 5, 0, 15), rng)[0], *val, n_boot=200)["methods"]
    for name in METHODS:
        for prefix in ("", "source_"):
            low, shares, high = (np.array(methods[name][key])
                                 for key in (prefix + "low", "shares", prefix + "high"))
            assert (low >= 0).all()
            assert (low <= shares).all()
            assert (shares <= high).all()
            assert (high <= 1).all()
    entry = methods["probabilistic"]
    assert entry["source_high"][0] - entry["source_low"][0] > entry["high"][0] - entry["low"][0]


def test_repeated_pictures_add_no_certainty(val, rng):
    probs, _ = draw_faces((60, 60, 60, 60), rng)
    once, thrice = (estimate_shares(faces, *val, n_boot=400)
                    for faces in (probs, np.tile(probs, (3, 1))))
    assert (once["n_distinct"], thrice["n_distinct"], thrice["n"]) == (240, 240, 720)
    one, three = once["methods"]["probabilistic"], thrice["methods"]["probabilistic"]
    assert three["shares"] == pytest.approx(one["shares"])
    widths = [np.subtract(entry["high"], entry["low"]) for entry in (one, three)]
    assert widths[1] == pytest.approx(widths[0], rel=0.25)


def test_both_ways_of_resampling_draw_by_the_weights(rng):
    weights = np.array([0.5, 0.25, 0.25, 0.0])
    for size in (12, 500):  # one by one, and by the multinomial
        drawn = draw_weights(np.full(4000, size), weights, rng)
        assert drawn.sum(1) == pytest.approx(np.ones(4000))
        assert drawn.mean(0) == pytest.approx(weights, abs=0.01)
        assert drawn.var(0) == pytest.approx(weights * (1 - weights) / size, rel=0.15)


# ----------------------------------------------------------------------------------- the assumption
def test_warning_comes_when_faces_look_otherwise_and_seldom_else(val, rng):
    counts = (400, 200, 200, 200)
    alike = [estimate_shares(draw_faces(counts, rng)[0], *val, n_boot=200)["fit"]["p_value"]
             for _ in range(10)]
    assert np.mean(np.array(alike) < 0.1) < 0.35 and max(alike) > 0.3
    report = estimate_shares(draw_faces(counts, rng, blur=2.2)[0], *val, n_boot=200)
    assert report["fit"]["p_value"] < 0.01
    assert "do not look like the validation pictures" in report["warning"]
    assert report["warning"] in format_shares(report, CLASSES)


def test_own_labelled_faces_help_where_the_error_model_is_wrong(val, rng):
    missed = {"validation": [], "own": []}
    for _ in range(10):
        counts = rng.multinomial(1000, rng.dirichlet(np.ones(4)))
        probs = draw_faces(counts, rng, blur=1.8)[0]
        own = draw_faces((50, 50, 50, 50), rng, blur=1.8)
        for name, reference in (("validation", None), ("own", own)):
            report = estimate_shares(probs, *val, n_boot=20, reference=reference)
            estimate = np.array(report["methods"]["probabilistic"]["shares"])
            missed[name].append(abs(estimate - counts / 1000).mean())
    assert np.mean(missed["own"]) < 0.8 * np.mean(missed["validation"])
    assert report["n_reference"] == 200
    assert "200 labelled faces of your own" in format_shares(report, CLASSES)


def test_reference_may_lack_a_class(val, rng):
    report = estimate_shares(draw_faces((5, 5, 5, 5), rng)[0], *val, n_boot=20,
                             reference=draw_faces((9, 9, 0, 0), rng))
    assert sum(report["methods"]["probabilistic"]["shares"]) == pytest.approx(1)


# --------------------------------------------------------------------------------- little and wrong
@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_few_faces(val, rng, n, tmp_path):
    report = estimate_shares(draw_faces((n, 0, 0, 0), rng)[0], *val, n_boot=50)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["n"] == n and sum(report["counts"]) == n
    for entry in report["methods"].values():
        assert entry["shares"] is None if n == 0 else sum(entry["shares"]) == pytest.approx(1)
    assert format_shares(report, CLASSES)
    names = (*CLASSES[:3], r"$\frac$")  # a $ in a name is no mathematics
    draw_shares({"all": report, r"some $\x$": report}, names, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").stat().st_size > 1000


def test_mistakes_are_named(val):
    probs, labels = val
    with pytest.raises(ValueError, match="class 3 has no validation face"):
        estimate_shares(probs, probs[labels != 3], labels[labels != 3])
    with pytest.raises(ValueError, match="got .*4.* and .*3"):
        estimate_shares(probs, probs[:, :3], labels)
    with pytest.raises(ValueError, match="val_labels"):
        estimate_shares(probs, probs, labels[:-1])
    with pytest.raises(ValueError, match="val_labels reach from"):
        estimate_shares(probs, probs, labels + 1)
    with pytest.raises(ValueError, match="probs has rows that are not probabilities"):
        estimate_shares(probs * 2, probs, labels)


def test_report_of_all_faces_and_of_large_enough_groups(val, rng, tmp_path, capsys):
    probs = draw_faces((20, 10, 10, 10), rng)[0]
    groups = np.repeat([0, 1, -1], [30, 15, 5]).astype(np.int32)
    tally = Tally(None, None, None, probs, groups, ["b\udcff", "small"])  # a byte not in UTF-8
    calibration = Calibration(1.0, (0.0,) * 4, torch.tensor(val[0]), torch.tensor(val[1]))
    report_shares(tally, calibration, CLASSES, tmp_path, with_groups=True)
    printed = capsys.readouterr().out
    assert printed.startswith("\nall\nclass ") and "\ngroup b\\xff\n" in printed
    assert "1 groups with fewer than 20 faces have no estimate of their own" in printed
    content = json.loads((tmp_path / "shares.json").read_text())
    assert list(content) == ["classes", "all", "groups"] and set(content["groups"]) == {"b\udcff"}
    assert content["all"] == shares.estimate_shares(probs, *val)
    assert set(content["all"]["methods"]) == {"raw", "adjusted", "probabilistic"}
    assert (tmp_path / "shares.png").stat().st_size > 1000


def test_without_an_estimate_the_reason_is_printed_and_no_file_stays(val, tmp_path, capsys):
    calibration = Calibration(1.0, (0.0,) * 4, torch.tensor(val[0]), torch.tensor(val[1]))
    for n, known, reason in ((0, calibration, "0 faces are too few"),
                             (1, None, "1 face is too few"),
                             (20, None, "not calibrated")):
        (tmp_path / "shares.json").write_text("of an earlier run")
        tally = Tally(None, None, None, np.full((n, 4), 0.25), np.full(n, -1, np.int32), [])
        report_shares(tally, known, CLASSES, tmp_path)
        assert reason in capsys.readouterr().out and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------ the benchmark
def test_resplitting_keeps_sizes_and_faces(val, rng):
    test = draw_faces((90, 80, 70, 60), rng)
    a, b = BENCHMARK.resplit(val, test, rng)
    assert np.bincount(a[1]).tolist() == list(VAL)
    assert np.bincount(b[1]).tolist() == [90, 80, 70, 60]
    everyone = np.concatenate([np.column_stack(part) for part in (val, test)])
    again = np.concatenate([np.column_stack(part) for part in (a, b)])
    assert np.array_equal(np.unique(everyone, axis=0), np.unique(again, axis=0))


def test_benchmark_runs_small(val, rng, tmp_path, capsys):
    spec = FaceSpec(CLASSES, TEMPLATE, WHOLE_TEMPLATE, 112)
    calibration = Calibration(1.0, (0.0,) * 4, torch.tensor(val[0], dtype=torch.float32),
                              torch.tensor(val[1]))
    save_checkpoint(tmp_path / "small.pt",
                    Checkpoint(spec, FaceClassifier(spec).backbone.state_dict(), calibration))
    for name, blur in (("test", 1.0), ("other", 1.8)):
        probs, labels = draw_faces((90, 90, 90, 90), rng, blur)
        np.savez(tmp_path / f"{name}_probs.npz", probs=probs.astype(np.float32), labels=labels)
    command = ["--ckpt", str(tmp_path / "small.pt"), "--test", str(tmp_path / "test_probs.npz"),
               "--other", str(tmp_path / "other_probs.npz"), "--sizes", "50", "400",
               "--compositions", "4", "--repeats", "1", "--reference", "40", "--n_boot", "20",
               "--num_workers", "1", "--output_dir", str(tmp_path)]
    BENCHMARK.main(command)
    with (tmp_path / "shares_benchmark.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 * 4 * 5  # sources, sizes, methods, classes and all
    assert (tmp_path / "shares_benchmark.png").stat().st_size > 1000
    assert "other+40" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        BENCHMARK.main([*command, "--test", str(tmp_path / "none.npz")])
    assert stop.value.code == 2 and "--test" in capsys.readouterr().err
