"""benchmarks/consensus_noise.py recovers a known correlation, and its synthetic people have it."""
import csv
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_crop

from benchmarks import consensus_noise
from models.faces.align import TEMPLATE
from models.faces.checkpoint import Checkpoint, save_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec

CLASSES = ("White", "Black")


def draw_votes(correlation: float, n_people: int = 600) -> np.ndarray:
    """Votes of people of three classes, 8 or 15 pictures each."""
    rng, votes = np.random.default_rng(0), []
    means = np.array([[0.8, 0.1, 0.1], [0.05, 0.9, 0.05], [0.2, 0.1, 0.7]])
    for k in range(n_people):
        mean = means[k % 3]
        shares = rng.dirichlet(mean * (1 - correlation) / correlation) if correlation else mean
        votes.append(rng.multinomial(8 if k % 2 else 15, shares))
    return np.array(votes)


@pytest.mark.parametrize("correlation", [0.0, 0.15, 0.3])
def test_a_known_correlation_is_recovered(correlation):
    estimate = consensus_noise.vote_correlation(draw_votes(correlation))
    assert estimate == pytest.approx(correlation, abs=0.05)


@pytest.mark.parametrize("correlation", [0.0, 0.4])
def test_synthetic_people_are_of_one_class_and_share_no_photo(correlation):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 12_000)
    predictions = np.where(rng.random(12_000) < 0.8, labels, rng.integers(0, 3, 12_000))
    people = consensus_noise.deal_people(predictions, labels, 3, 10, correlation, rng)
    assert len(np.unique(people)) == people.size and people.shape[1] == 10
    assert 590 <= len(people) <= 600
    assert (labels[people] == labels[people[:, :1]]).all()
    dealt = consensus_noise.dealt_correlation(predictions, labels, people, 3)
    assert dealt == pytest.approx(correlation, abs=0.05)
    accuracy = (predictions[people] == labels[people]).mean(1)
    expected = 0.87 * 0.13 * (1 / 10 + correlation * 9 / 10)    # variance of a mean of ten draws
    assert accuracy.var() == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("flags, named", [(["--per_person", "40"], "--per_person 40"),
                                          (["--correlation", "1"], "--correlation 1")])
def test_settings_without_people_are_one_line(tmp_path, capsys, flags, named):
    make_set(tmp_path)
    with pytest.raises(SystemExit) as stop:
        consensus_noise.main(["--ckpt", str(tmp_path / "one.pt"), "--data", str(tmp_path / "data"),
                              "--num_workers", "0", "--output_dir", str(tmp_path), "--device",
                              "cpu", *flags])
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_consensus_removes_independent_errors_and_keeps_correlated_ones():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 6000)
    predictions = np.where(rng.random(6000) < 0.8, labels, rng.integers(0, 3, 6000))
    errors = {}
    for correlation in (0.0, 0.5):
        people = consensus_noise.deal_people(predictions, labels, 3, 10, correlation,
                                             np.random.default_rng(3))
        consensus = consensus_noise.decide_people(predictions, people, 3, 0.8)
        is_kept = consensus >= 0
        errors[correlation] = (consensus[is_kept] != labels[people[is_kept, 0]]).mean()
    assert errors[0.0] < 0.001 and errors[0.5] > 0.01, errors


def make_set(folder: Path) -> None:
    """data/, a small set of drawn faces, and one.pt, a classifier with random weights."""
    for split, n in (("train", 12), ("val", 4)):
        for label, name in enumerate(CLASSES):
            class_folder = folder / "data" / split / name
            class_folder.mkdir(parents=True)
            for i in range(n):
                draw_crop(label, i).save(class_folder / f"{i}.png")
    spec = FaceSpec(CLASSES, TEMPLATE, (16, 30, 96, 110), 32)
    weights = FaceClassifier(spec).backbone.state_dict()
    save_checkpoint(folder / "one.pt", Checkpoint(spec, weights))


def test_the_command_writes_table_and_figure(tmp_path):
    make_set(tmp_path)
    with open(tmp_path / "people.csv", "w") as file:
        file.write("file,face,status,ethnicity,confidence\n")
        file.writelines(f"p{k}/{i}.jpg,0,ok,{CLASSES[(k + (i > 3 and k % 3 == 0)) % 2]},0.9\n"
                        for k in range(6) for i in range(6))
    consensus_noise.main(["--ckpt", str(tmp_path / "one.pt"), "--data", str(tmp_path / "data"),
                          "--people", str(tmp_path / "people.csv"), "--per_person", "3",
                          "--thresholds", "0.6", "--num_workers", "0", "--output_dir",
                          str(tmp_path), "--device", "cpu"])
    with open(tmp_path / "consensus_noise.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and float(rows[0]["correlation"]) == 0 < float(rows[1]["correlation"])
    assert (tmp_path / "consensus_noise.png").stat().st_size > 10_000


def test_a_table_without_people_is_one_line(tmp_path, capsys):
    (tmp_path / "people.csv").write_text("file,face,status,ethnicity,confidence\n"
                                         "a.jpg,0,ok,White,0.9\n")
    spec = FaceSpec(CLASSES, TEMPLATE, (16, 30, 96, 110), 32)
    weights = FaceClassifier(spec).backbone.state_dict()
    save_checkpoint(tmp_path / "one.pt", Checkpoint(spec, weights))
    with pytest.raises(SystemExit) as stop:
        consensus_noise.main(["--ckpt", str(tmp_path / "one.pt"), "--people",
                              str(tmp_path / "people.csv"), "--output_dir", str(tmp_path)])
    assert stop.value.code == 2 and "--people" in capsys.readouterr().err
