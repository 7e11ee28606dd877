"""label_photos: the same faces and numbers as infer.py, from paths, bytes, images and arrays."""
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import infer
from models import label_photos, load_checkpoint
from models.faces.predictions import read_predictions

SAMPLE = ROOT / "facesets" / "samples" / "astronaut.jpg"


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(ROOT / "checkpoints" / "resnet18_general.pt")


def test_faces_and_numbers_are_those_of_infer(checkpoint, tmp_path):
    infer.main(["--input_dir", str(SAMPLE.parent), "--output_dir", str(tmp_path), "--faces", "all",
                "--device", "cpu"])
    row, = read_predictions(tmp_path / "predictions.csv")
    face, = label_photos([SAMPLE], checkpoint)
    assert face.label == row["ethnicity"] and face.status == "ok"
    assert f"{face.confidence:.7f}" == row["confidence"]
    assert [f"{p:.7f}" for p in face.probs.values()] == [row[f"p_{name}"] for name in face.probs]
    assert [f"{v:.2f}" for v in face.box] == [row[key] for key in ("x1", "y1", "x2", "y2")]
    assert "|".join(face.prediction_set) == row["set"]
    x1, y1, x2, y2 = face.box
    assert (
        (face.landmarks > torch.tensor([x1, y1])) & (face.landmarks < torch.tensor([x2, y2]))
    ).all()


def test_every_kind_of_picture_gives_the_same_face(checkpoint):
    image = Image.open(SAMPLE).convert("RGB")
    photos = [str(SAMPLE), SAMPLE.read_bytes(), image, np.asarray(image)]
    faces = label_photos(photos, checkpoint, faces="largest")
    assert [face.photo for face in faces] == [0, 1, 2, 3]
    assert len({(face.label, face.box) for face in faces}) == 1
    for face in faces[1:]:
        assert list(face.probs.values()) == pytest.approx(list(faces[0].probs.values()), abs=5e-6)


def test_a_picture_without_a_face_or_contents_is_an_entry_with_a_reason(checkpoint, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    blank = np.zeros((64, 48, 3), np.uint8)
    faces = label_photos([tmp_path / "broken.jpg", blank, tmp_path / "absent.png"], checkpoint)
    assert [(face.photo, face.status) for face in faces] == [(0, "unreadable"), (1, "no_face"),
                                                             (2, "unreadable")]
    assert faces[0].error and faces[0].probs is None and not faces[1].prediction_set
    assert label_photos([], checkpoint) == []
