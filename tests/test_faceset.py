import csv
import json

import pytest
import torch
from PIL import Image

from models.data.faceset import FaceSetError, faceset_digest, read_faceset
from models.faces.mtcnn import MTCNN

CLASSES = ("White", "Black", "Asian", "Indian")


def put(path, size=(8, 8), colour=(90, 120, 150)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture(scope="module")
def detector():
    return MTCNN()


@pytest.fixture
def builder_folder(tmp_path):
    """train|val|test/<label> with faceset.json, as utk_dataset_builder.py writes them."""
    for split, n in (("train", 3), ("val", 2), ("test", 1)):
        for label in range(4):
            for i in range(n):
                put(tmp_path / split / str(label) / f"{i}.png")
    (tmp_path / "faceset.json").write_text(json.dumps({"classes": CLASSES, "aligned": True}))
    return tmp_path


def test_a_built_set_has_the_classes_of_its_json_in_their_order(builder_folder):
    faces = read_faceset(builder_folder, "val")
    assert faces.classes == CLASSES and faces.is_aligned and faces.unmatched == ()
    assert faces.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert faces.files[:3] == ["val/0/0.png", "val/0/1.png", "val/1/0.png"]
    assert Image.open(faces.paths()[-1]).size == (8, 8)
    assert len(read_faceset(builder_folder, "train")) == 12


def test_other_class_orders_and_names_reach_the_same_pictures(builder_folder):
    order = ("African", "Asian", "Caucasian", "Indian")
    faces = read_faceset(builder_folder, "val", {"White": "Caucasian", "Black": "African"}, order)
    assert [order[label] for label in faces.labels] == ["Caucasian"] * 2 + ["African"] * 2 + [
        "Asian"
    ] * 2 + ["Indian"] * 2


def test_a_split_that_is_not_there_is_named(builder_folder):
    with pytest.raises(FaceSetError, match="no dev folder"):
        read_faceset(builder_folder, "dev")


def test_class_folders_without_splits_or_json(tmp_path):
    for name in ("White", "East_Asian", "Southeast_Asian", "Indian", "Black"):
        put(tmp_path / name / "a.png")
    faces = read_faceset(tmp_path, "test")
    assert (
        faces.classes == ("Black", "East_Asian", "Indian", "Southeast_Asian", "White")
        and not faces.is_aligned
    )
    joined = read_faceset(
        tmp_path, "test", {"East_Asian": "Asian", "Southeast_Asian": "Asian"}, CLASSES
    )
    assert torch.bincount(joined.labels).tolist() == [1, 1, 2, 1] and joined.unmatched == ()
    partly = read_faceset(tmp_path, "test", {"East_Asian": "Asian"}, CLASSES)
    assert partly.unmatched == ("Southeast_Asian",) and len(partly) == 4


def test_numbered_folders_without_json_are_positions_in_the_classes(tmp_path):
    for label in (0, 2, 3):
        put(tmp_path / str(label) / "a.png")
    faces = read_faceset(tmp_path, None, None, CLASSES)
    assert faces.labels.tolist() == [0, 2, 3] and faces.unmatched == ()


def test_person_folders_lie_below_their_class(tmp_path):
    put(tmp_path / "African" / "m.01" / "0.png")
    put(tmp_path / "African" / "m.02" / "deep" / "0.png")
    put(tmp_path / "Asian" / "m.03" / "0.png")
    put(tmp_path / "stray.png")
    faces = read_faceset(tmp_path, "train")
    assert faces.files == ["African/m.01/0.png", "African/m.02/deep/0.png", "Asian/m.03/0.png"]
    assert faces.labels.tolist() == [0, 0, 1]


def test_a_csv_list_with_relative_and_absolute_paths(tmp_path):
    put(tmp_path / "faces" / "ä b.png")
    put(tmp_path / "elsewhere.png")
    with open(tmp_path / "list.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("image", "class"), ("faces/ä b.png", "Black"),
                                    (tmp_path / "elsewhere.png", "White")])
    faces = read_faceset(tmp_path / "list.csv", "train", None, CLASSES)
    assert faces.labels.tolist() == [1, 0]
    assert all(Image.open(path).size == (8, 8) for path in faces.paths())


@pytest.mark.parametrize(
    "text, reason",
    [
        ("file,label\na.png,0\n", "expects the columns image and class"),
        ("image,class\na.png\n", "line 2 has no image or no class"),
        ("image,class\n", "no class folder matches"),
    ],
)
def test_lists_that_are_none(tmp_path, text, reason):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(FaceSetError, match=reason):
        read_faceset(tmp_path / "list.csv")


def test_folders_that_are_no_set(tmp_path):
    with pytest.raises(FaceSetError, match="no such folder"):
        read_faceset(tmp_path / "absent")
    with pytest.raises(FaceSetError, match="no class folders with pictures"):
        read_faceset(tmp_path)
    put(tmp_path / "Martian" / "a.png")
    with pytest.raises(FaceSetError, match="White.*found Martian"):
        read_faceset(tmp_path, None, None, CLASSES)
    (tmp_path / "faceset.json").write_text("{")
    with pytest.raises(FaceSetError, match="not valid JSON"):
        read_faceset(tmp_path)


def test_subset_keeps_everything_else(builder_folder):
    faces = read_faceset(builder_folder, "train")
    some = faces.subset([11, 0])
    assert some.files == [faces.files[11], faces.files[0]] and some.labels.tolist() == [3, 0]
    assert (some.root, some.classes, some.is_aligned) == (
        faces.root,
        faces.classes,
        faces.is_aligned,
    )


def test_a_digest_is_that_of_the_names_alone():
    assert (
        faceset_digest(["train/0/b.jpg", "train/1/a.jpg"])
        == faceset_digest(["/x/a.jpg", "b.jpg"])
        == "3b683f0b"
    )
    assert (
        faceset_digest(["a.jpg", "b.jpg"]) != faceset_digest(["a.jpg"])
        and len(faceset_digest([])) == 8
    )
