"""The one path from files to aligned views: whose face, what without one, and nothing is lost."""
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from models.data.batches import MAX_JOINED_PHOTOS, PhotoBatch
from models.faces.align import WHOLE_TEMPLATE
from models.faces.mtcnn import MTCNN, Faces
from models.faces.pipeline import (
    FacePolicy,
    FaceRow,
    Loading,
    SelectedFaces,
    ViewSpec,
    align_photos,
    split_found,
)
from models.faces.selection import most_central_faces

WHOLE_VIEW = ViewSpec(WHOLE_TEMPLATE, 112)
PHOTOS = FacePolicy("central", "mean_landmarks")
CROPS = FacePolicy("central", "mean_landmarks", "never")


def put(path, size=(8, 8), colour=(90, 120, 150)):
    Image.new("RGB", size, colour).save(path)


@pytest.fixture(scope="module")
def detector():
    return MTCNN()


def test_central_face_is_the_large_one_in_the_middle():
    boxes = torch.tensor(
        [
            [0, 0, 30, 30.0],
            [40, 40, 70, 70],
            [45, 45, 50, 50],  # photo 0: the middle of three
            [0, 0, 90, 90],
            [48, 48, 52, 52],
        ]
    )                        # photo 2: large beats exact
    faces = Faces(boxes, torch.ones(5), torch.zeros(5, 5, 2), torch.tensor([0, 0, 0, 2, 2]))
    assert most_central_faces(faces, torch.tensor([[100, 110], [10, 10], [100, 100]])).tolist() == [
        1,
        -1,
        3,
    ]
    none = Faces(
        torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5, 2), torch.zeros(0, dtype=torch.int64)
    )
    assert most_central_faces(none, torch.tensor([[5, 5]])).tolist() == [-1]
    assert most_central_faces(none, torch.zeros(0, 2, dtype=torch.int64)).tolist() == []


def test_finished_crops_of_different_sizes_show_the_same_window(tmp_path, detector):
    y, x = np.mgrid[0:224, 0:224]
    ramp = np.stack([x, y, (x + y) / 2], -1)  # linear, so any resampling of it is exact
    for side in (224, 112):
        step = 224 // side
        picture = ramp.reshape(side, step, side, step, 3).mean((1, 3)).round().astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{side}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [str(tmp_path / name) for name in ("224.png", "broken.png", "112.png")]
    batch, = align_photos(paths, detector, ViewSpec((14.0, 22.0, 98.0, 106.0), 84), CROPS)
    assert batch.positions() == [0, 2] and batch.views.dtype == torch.uint8
    assert {row.aligned_by for row in batch.rows} == {"crop"}
    assert batch.views.shape == (2, 3, 84, 84)
    assert (batch.views[0].int() - batch.views[1].int()).abs().max() <= 1
    assert batch.views[0, 0, 0, 0] == round(
        (14 + 0.5) * 2 - 0.5
    )  # red is x: the window begins at 14
    assert batch.views[0, 1, 0, 0] == round((22 + 0.5) * 2 - 0.5)
    failure, = batch.failures
    position, status, reason = failure.position, failure.status, failure.error
    assert (position, status) == (1, "unreadable") and reason


def test_pictures_without_a_face_come_last_and_none_is_lost(tmp_path, detector):
    put(tmp_path / "plain.png", (120, 90))
    put(tmp_path / "tiny.png", (1, 1))
    put(
        tmp_path / "crop.png", (112, 112), (10, 20, 30)
    )  # the size in which crops are handed around
    (tmp_path / "broken.png").write_bytes(b"")
    names = ["plain.png", "broken.png", "crop.png", "tiny.png"]
    batches = list(
        align_photos(
            [str(tmp_path / name) for name in names], detector, WHOLE_VIEW, PHOTOS, Loading(3)
        )
    )
    seen = {row.position: row.aligned_by for batch in batches for row in batch.rows}
    assert seen == {0: "template", 2: "crop", 3: "template"}
    assert [failure.position for batch in batches for failure in batch.failures] == [1]
    assert all(len(batch.views) == len(batch.rows) for batch in batches)
    crop_view = next(
        view
        for batch in batches
        for row, view in zip(batch.rows, batch.views, strict=True)
        if row.aligned_by == "crop"
    )
    assert (crop_view[:, 5, 5] == torch.tensor([10, 20, 30])).all()


def test_batches_joined_as_for_a_gpu_give_the_same_views(tmp_path, detector, monkeypatch):
    for i in range(7):
        put(tmp_path / f"{i}.png", (100 + i, 90) if i % 3 else (112, 112), (20 * i, 60, 90))
    (tmp_path / "3.png").write_bytes(b"")
    paths = [str(tmp_path / f"{i}.png") for i in range(7)]
    apart = list(align_photos(paths, detector, WHOLE_VIEW, PHOTOS, Loading(2)))
    monkeypatch.setitem(MAX_JOINED_PHOTOS, "cpu", 128)
    joined = list(align_photos(paths, detector, WHOLE_VIEW, PHOTOS, Loading(2)))
    assert sum("crop" in {row.aligned_by for row in batch.rows} for batch in joined) == 1
    views, others = (
        {
            position: view
            for batch in batches
            for position, view in zip(batch.positions(), batch.views, strict=True)
        }
        for batches in (joined, apart)
    )
    assert views.keys() == others.keys() == {0, 1, 2, 4, 5, 6}
    assert all(torch.equal(views[i], others[i]) for i in views)
    assert [failure.position for batch in joined for failure in batch.failures] == [3]


def test_an_empty_list_gives_no_views(detector):
    assert sum(len(batch.views) for batch in align_photos([], detector, WHOLE_VIEW, PHOTOS)) == 0


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
        for batch in align_photos(paths, detector, ViewSpec((24.0, 34.0, 88.0, 98.0), 64), PHOTOS):
            views |= {
                (kind, row.position): view
                for row, view in zip(batch.rows, batch.views, strict=True)
                if row.aligned_by == "mtcnn"
            }
    both = [i for i in range(len(chips)) if ("chip", i) in views and ("large", i) in views]
    assert len(both) >= 9
    differences = torch.stack(
        [(views["chip", i].float() - views["large", i].float()).abs().mean() for i in both]
    )
    assert (
        differences.median() < 16
    )  # grey levels; 11 here, 34 where boxes are clipped: the same face and place


@pytest.mark.parametrize("most_views", [1, 5, 7, 100])
def test_views_are_rendered_in_bounded_batches_that_divide_no_photograph(most_views, monkeypatch):
    counts = torch.tensor([3, 1, 0, 4, 2])
    index = torch.repeat_interleave(counts)
    n_faces = int(counts.sum())
    faces = Faces(
        torch.zeros(n_faces, 4), torch.arange(n_faces).float(), torch.zeros(n_faces, 5, 2), index
    )
    photos = PhotoBatch(
        list(range(5)),
        torch.zeros(5, 3, 4, 4, dtype=torch.uint8),
        torch.full((5, 2), 4),
        torch.ones(5),
        [],
    )
    found = SelectedFaces(0, photos, faces, torch.zeros(n_faces, dtype=torch.int64), photos,
                       [FaceRow(9, -1, "unreadable")])
    monkeypatch.setattr("models.faces.pipeline.VIEW_BYTES", most_views * 3 * 112 ** 2)
    parts = list(split_found([found], WHOLE_VIEW))
    assert torch.cat([part.faces.scores for part in parts]).tolist() == list(range(n_faces))
    assert [len(part.failures) for part in parts] == [1] + [0] * (len(parts) - 1)
    assert [len(part.crops.positions) for part in parts] == [5] + [0] * (len(parts) - 1)
    for part in parts:
        images = part.faces.image_index.unique().tolist()
        assert len(part.faces.boxes) == counts[images].sum()
        assert len(part.faces.boxes) <= most_views or len(images) == 1


def test_a_photograph_reduced_to_the_size_of_crops_is_not_a_crop(tmp_path, detector):
    put(tmp_path / "photo.png", (224, 224))
    put(tmp_path / "crop.png", (112, 112))
    paths = [str(tmp_path / name) for name in ("photo.png", "crop.png")]
    batches = list(align_photos(paths, detector, WHOLE_VIEW, FacePolicy(), Loading(max_side=112)))
    assert [row.position for batch in batches for row in batch.rows] == [1]
    assert [row.status for batch in batches for row in batch.failures] == ["no_face"]
