import csv
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from models.data.batches import MAX_JOINED_PHOTOS
from models.data.faceset import FaceSetError, faceset_digest, read_faceset
from models.faces.align import WHOLE_TEMPLATE
from models.faces.labelled import align_set, most_central_face
from models.faces.mtcnn import MTCNN, Faces

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
    assert [order[label] for label in faces.labels] == ["Caucasian"] * 2 + ["African"] * 2 + ["Asian"] * 2 \
        + ["Indian"] * 2


def test_a_split_that_is_not_there_is_named(builder_folder):
    with pytest.raises(FaceSetError, match="no dev folder"):
        read_faceset(builder_folder, "dev")


def test_class_folders_without_splits_or_json(tmp_path):
    for name in ("White", "East_Asian", "Southeast_Asian", "Indian", "Black"):
        put(tmp_path / name / "a.png")
    faces = read_faceset(tmp_path, "test")
    assert faces.classes == ("Black", "East_Asian", "Indian", "Southeast_Asian", "White") and not faces.is_aligned
    joined = read_faceset(tmp_path, "test", {"East_Asian": "Asian", "Southeast_Asian": "Asian"}, CLASSES)
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


@pytest.mark.parametrize("text, reason", [("file,label\na.png,0\n", "expects the columns image and class"),
                                          ("image,class\na.png\n", "line 2 has no image or no class"),
                                          ("image,class\n", "no class folder matches")])
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
    assert (some.root, some.classes, some.is_aligned) == (faces.root, faces.classes, faces.is_aligned)


def test_central_face_is_the_large_one_in_the_middle():
    boxes = torch.tensor([[0, 0, 30, 30.], [40, 40, 70, 70], [45, 45, 50, 50],      # photo 0: the middle of three
                          [0, 0, 90, 90], [48, 48, 52, 52]])                        # photo 2: large beats exact
    faces = Faces(boxes, torch.ones(5), torch.zeros(5, 5, 2), torch.tensor([0, 0, 0, 2, 2]))
    assert most_central_face(faces, torch.tensor([[100, 110], [10, 10], [100, 100]])).tolist() == [1, -1, 3]
    none = Faces(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5, 2), torch.zeros(0, dtype=torch.int64))
    assert most_central_face(none, torch.tensor([[5, 5]])).tolist() == [-1]
    assert most_central_face(none, torch.zeros(0, 2, dtype=torch.int64)).tolist() == []


def test_finished_crops_of_different_sizes_show_the_same_window(tmp_path, detector):
    y, x = np.mgrid[0:224, 0:224]
    ramp = np.stack([x, y, (x + y) / 2], -1)                            # linear, so any resampling of it is exact
    for side in (224, 112):
        step = 224 // side
        picture = ramp.reshape(side, step, side, step, 3).mean((1, 3)).round().astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{side}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [str(tmp_path / name) for name in ("224.png", "broken.png", "112.png")]
    batch, = align_set(paths, True, detector, (14.0, 22.0, 98.0, 106.0), 84)
    assert batch.positions == [0, 2] and batch.aligned_by == "crop" and batch.views.dtype == torch.uint8
    assert batch.views.shape == (2, 3, 84, 84)
    assert (batch.views[0].int() - batch.views[1].int()).abs().max() <= 1
    assert batch.views[0, 0, 0, 0] == round((14 + 0.5) * 2 - 0.5)        # red is x: the window begins at 14
    assert batch.views[0, 1, 0, 0] == round((22 + 0.5) * 2 - 0.5)
    (position, status, reason), = batch.failures
    assert (position, status) == (1, "unreadable") and reason


def test_pictures_without_a_face_come_last_and_none_is_lost(tmp_path, detector):
    put(tmp_path / "plain.png", (120, 90))
    put(tmp_path / "tiny.png", (1, 1))
    put(tmp_path / "crop.png", (112, 112), (10, 20, 30))                # the size in which crops are handed around
    (tmp_path / "broken.png").write_bytes(b"")
    names = ["plain.png", "broken.png", "crop.png", "tiny.png"]
    batches = list(align_set([str(tmp_path / name) for name in names], False, detector, WHOLE_TEMPLATE, 112, batch_size=3))
    seen = {position: batch.aligned_by for batch in batches for position in batch.positions}
    assert seen == {0: "template", 2: "crop", 3: "template"}
    assert [failure[0] for batch in batches for failure in batch.failures] == [1]
    assert all(len(batch.views) == len(batch.positions) for batch in batches)
    kept = next(batch.views for batch in batches if batch.aligned_by == "crop")
    assert (kept[0, :, 5, 5] == torch.tensor([10, 20, 30])).all()


def test_batches_joined_as_for_a_gpu_give_the_same_views(tmp_path, detector, monkeypatch):
    for i in range(7):
        put(tmp_path / f"{i}.png", (100 + i, 90) if i % 3 else (112, 112), (20 * i, 60, 90))
    (tmp_path / "3.png").write_bytes(b"")
    paths = [str(tmp_path / f"{i}.png") for i in range(7)]
    apart = list(align_set(paths, False, detector, WHOLE_TEMPLATE, 112, batch_size=2))
    monkeypatch.setitem(MAX_JOINED_PHOTOS, "cpu", 128)
    joined = list(align_set(paths, False, detector, WHOLE_TEMPLATE, 112, batch_size=2))
    assert sum(batch.aligned_by == "crop" for batch in joined) == 1
    views, others = ({position: view for batch in batches for position, view in
                      zip(batch.positions, batch.views, strict=True)} for batches in (joined, apart))
    assert views.keys() == others.keys() == {0, 1, 2, 4, 5, 6}
    assert all(torch.equal(views[i], others[i]) for i in views)
    assert [failure[0] for batch in joined for failure in batch.failures] == [3]


def test_an_empty_list_gives_no_views(detector):
    assert sum(len(batch.views) for batch in align_set([], False, detector, WHOLE_TEMPLATE, 112)) == 0


@pytest.mark.real
def test_real_chips_are_aligned_by_landmarks_wherever_they_lie(faces_data, tmp_path, detector):
    with tarfile.open(faces_data / "UTKFace.tar") as tar:
        chips = []
        for member in tar:
            if member.isfile() and member.name.endswith(".jpg"):
                chips.append(Image.open(tar.extractfile(member)).convert("RGB"))
            if len(chips) == 12:
                break
    for i, chip in enumerate(chips):
        chip.save(tmp_path / f"{i}_chip.png")
        large = Image.new("RGB", (310, 290), (120, 110, 100))
        large.paste(chip, (60, 45))
        large.save(tmp_path / f"{i}_large.png")
    views = {}
    for kind in ("chip", "large"):
        paths = [str(tmp_path / f"{i}_{kind}.png") for i in range(len(chips))]
        for batch in align_set(paths, False, detector, (24.0, 34.0, 88.0, 98.0), 64):
            views |= {(kind, position): view for position, view in zip(batch.positions, batch.views, strict=True)
                      if batch.aligned_by == "mtcnn"}
    both = [i for i in range(len(chips)) if ("chip", i) in views and ("large", i) in views]
    assert len(both) >= 9
    differences = torch.stack([(views["chip", i].float() - views["large", i].float()).abs().mean() for i in both])
    assert differences.median() < 16        # grey levels; 11 here, 34 where boxes are clipped: the same face and place


def test_a_digest_is_that_of_the_names_alone():
    assert faceset_digest(["train/0/b.jpg", "train/1/a.jpg"]) == faceset_digest(["/x/a.jpg", "b.jpg"]) == "3b683f0b"
    assert faceset_digest(["a.jpg", "b.jpg"]) != faceset_digest(["a.jpg"]) and len(faceset_digest([])) == 8


def test_a_huge_picture_is_reduced_while_decoding(tmp_path, detector, monkeypatch):
    asked = []
    monkeypatch.setattr("models.faces.labelled.load_photos",
                        lambda *args, pool=None: asked.append((*args[2:4], pool is not None)) or iter(()))
    monkeypatch.setattr("models.faces.labelled.has_shared_memory", lambda: False)
    list(align_set(["a.jpg"], False, detector, WHOLE_TEMPLATE, 8, workers=4))
    assert asked == [(0, 3000, True)]
