"""Photographs become crops whose landmarks lie on the template, whoever decodes, detects or
shares out the work.
"""
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facesets.mtcnn_crop_align import main
from models.data.batches import MAX_JOINED_PHOTOS
from models.data.decoding import decode_photo
from models.faces.align import TEMPLATE
from models.faces.mtcnn import MTCNN
from models.running.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
ASTRONAUT = ROOT / "facesets" / "samples" / "astronaut.jpg"

# A package of the form of mtcnn-pytorch's: one face for each bright corner, the smaller first; five
# x, then five y. Like that code it finds its files from the current folder, and fails where there
# is nothing to concatenate.
STAND_IN = """
import numpy as np
from .weights import SCORE


def detect_faces(image, min_face_size=20.0, thresholds=[0.6, 0.7, 0.8],
                 nms_thresholds=[0.7, 0.7, 0.7]):
    assert image.mode == "RGB" and open("src/weights.py").read()
    if image.width < min_face_size:
        raise ValueError("need at least one array to concatenate")
    if image.width == image.height:
        return [], []
    boxes = [[40, 10, 60, 30, SCORE], [0, 0, 40, 40, SCORE], [1, 1, 9, 9, SCORE]]
    faces = [[46, 54, 50, 47, 53, 17, 17, 21, 25, 25],
             [12, 28, 20, 14, 26, 14, 14, 22, 30, 30], [5] * 10]
    return np.array(boxes), np.array(faces)
"""


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two photographs with one face, one without, one truncated, one no picture, in folders
    with odd names.
    """
    folder = tmp_path / "photos"
    inner = folder / "Zoë, \"two\"\nlines"
    inner.mkdir(parents=True)
    shutil.copy(ASTRONAUT, folder / "a.JPG")
    Image.open(ASTRONAUT).resize((400, 400)).save(inner / "half size.png")
    (folder / "cut.jpg").write_bytes(ASTRONAUT.read_bytes()[:20_000])
    (folder / "text.webp").write_text("no picture")
    Image.new("L", (5, 5)).save(inner / "tiny.bmp")
    return folder


def rows(out: Path) -> list[list[str]]:
    with open(out / "skipped.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def files(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }


def align(photos: Path, out: Path, *flags) -> None:
    main(
        [
            "--in_dir",
            str(photos),
            "--out_dir",
            str(out),
            "--n_threads",
            "0",
            "--device",
            "cpu",
            *flags,
        ]
    )


def test_crops_lie_on_the_template_and_the_rest_is_listed(photos, tmp_path, capsys):
    out = tmp_path / "out"
    align(photos, out, "--min_face_size", "40")
    assert {name for name in files(out) if name.endswith("_0.jpg")} == {
        "a.JPG_0.jpg", 'Zoë, "two"\nlines/half size.png_0.jpg'}
    listed = rows(out)
    assert listed[0] == ["file", "status", "reason"]
    assert [row[:2] for row in listed[1:]] == [
        ['Zoë, "two"\nlines/tiny.bmp', "no_face"],
        ["cut.jpg", "unreadable"],
        ["text.webp", "unreadable"],
    ]
    assert all(row[2] for row in listed[2:])
    for name in files(out):
        if name.endswith(".jpg"):
            with Image.open(out / name) as crop:
                assert crop.size == (112, 112) and crop.layers == 3
                assert {component[1:3] for component in crop.layer} == {(1, 1)}            # 4:4:4
            image, _ = decode_photo(out / name)
            again = detected(image)
            # A least-squares fit meets the template's mean; five points of a face that is no
            # template lie about it.
            assert abs(again.mean(0) - np.mean(TEMPLATE, 0)).max() < 2
            assert abs(again[1] - again[0] - np.subtract(TEMPLATE[1], TEMPLATE[0])).max() < 4
    assert "no_face 1, unreadable 2" in capsys.readouterr().out
    assert not (out / "align_parts").exists()


def detected(image: torch.Tensor) -> np.ndarray:
    """Landmarks (5, 2) of the one face of a picture."""
    return (
        MTCNN(min_face_size=60)
        .detect(image[None], torch.tensor([image.shape[1:]]))
        .landmarks[0]
        .numpy()
    )


def test_a_crop_is_the_similarity_warp_that_someone_else_makes(photos, tmp_path):
    transform = pytest.importorskip("skimage.transform")
    align(photos, tmp_path / "out", "--min_face_size", "60")
    photo, _ = decode_photo(ASTRONAUT)
    pixels = photo.permute(1, 2, 0).numpy()
    to_template = transform.estimate_transform("similarity", detected(photo), np.array(TEMPLATE))
    theirs = transform.warp(
        pixels, to_template.inverse, output_shape=(112, 112), order=1, preserve_range=True
    )
    ours = decode_photo(tmp_path / "out" / "a.JPG_0.jpg")[0].permute(1, 2, 0).numpy()
    assert abs(ours - theirs)[8:-8, 8:-8].mean() < 5


def test_finished_crops_are_kept_or_replaced_as_asked(photos, tmp_path, capsys):
    out = tmp_path / "out"
    align(photos, out, "--min_face_size", "40", "--out_res", "64")
    before = files(out)
    (out / "a.JPG_0.jpg").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        align(photos, out)
    assert stopped.value.code == 2 and "--check_exists" in capsys.readouterr().err
    align(photos, out, "--min_face_size", "40", "--out_res", "64", "--check_exists")
    assert (out / "a.JPG_0.jpg").read_text() == "mine"
    assert files(out)["skipped.csv"] == before["skipped.csv"]
    for face in (1, 2):
        (out / f"a.JPG_{face}.jpg").write_text("of a run that found more faces")
    align(photos, out, "--min_face_size", "40", "--out_res", "64", "--overwrite")
    assert files(out) == before


def test_a_crop_that_cannot_be_written_is_a_row(photos, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "a.JPG_0.jpg" / "in the way").mkdir(parents=True)
    align(photos, out, "--min_face_size", "60", "--overwrite")
    row, = (row for row in rows(out) if row[0] == "a.JPG")
    assert row[1] == "unwritable" and "cannot be written" in row[2]
    assert 'Zoë, "two"\nlines/half size.png_0.jpg' in files(out)
    assert "1 crops of 1 photographs" in capsys.readouterr().out


def test_a_dead_run_is_resumed_without_its_finished_parts(photos, tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    for i in range(20):                                     # more than one chunk of 16
        Image.new("RGB", (30, 30)).save(photos / f"grey{i:02}.png")
    align(photos, whole, "--min_face_size", "60")
    from facesets import mtcnn_crop_align as command
    written = command.write_part
    monkeypatch.setattr(command, "write_part", lambda photos, chunk, *rest: 1 / 0 if chunk else
                        written(photos, chunk, *rest))
    with pytest.raises(ZeroDivisionError):
        align(photos, out, "--min_face_size", "60")
    done = (out / "align_parts" / "000000.csv").stat().st_mtime_ns
    monkeypatch.setattr(
        command,
        "write_part",
        lambda photos, chunk, *rest: (
            written(photos, chunk, *rest)
            if chunk
            else pytest.fail(f"part 0 of {done} was done again")
        ),
    )
    with pytest.raises(SystemExit):
        align(photos, out, "--min_face_size", "50", "--resume")
    assert "--min_face_size" in capsys.readouterr().err
    align(photos, out, "--min_face_size", "60", "--resume")
    assert files(out) == files(whole)


def test_a_finished_run_is_not_done_again_by_resume(photos, tmp_path, capsys):
    align(photos, tmp_path / "out", "--min_face_size", "40")
    before = files(tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        align(photos, tmp_path / "out", "--resume", "--out_res", "56")
    assert stopped.value.code == 0 and "nothing to resume" in capsys.readouterr().err
    assert files(tmp_path / "out") == before


def test_a_list_may_not_leave_the_folder(photos, tmp_path):
    (tmp_path / "list.txt").write_text(
        f"./text.webp\n{photos / 'text.webp'}\n../elsewhere.jpg\n{ASTRONAUT}\n"
    )
    align(photos, tmp_path / "out", "--in_list", str(tmp_path / "list.txt"))
    assert [row[1] for row in rows(tmp_path / "out")[1:]] == [
        "unreadable",
        "unreadable",
        "outside",
        "outside",
    ]


def test_a_checkout_of_mtcnn_pytorch_takes_the_place_of_the_networks(tmp_path, monkeypatch, capsys):
    checkout, photos = tmp_path / "checkout", tmp_path / "photos"
    (checkout / "src").mkdir(parents=True)
    photos.mkdir()
    (checkout / "src" / "__init__.py").write_text("from .detector import detect_faces\n")
    (checkout / "src" / "detector.py").write_text(STAND_IN)
    (checkout / "src" / "weights.py").write_text("SCORE = 0.9\n")
    picture = Image.new("RGB", (64, 48), "black")
    picture.paste("red", (0, 0, 40, 40))
    for name, size in (("two", (64, 48)), ("none", (64, 64)), ("small", (8, 9))):
        picture.resize(size).save(photos / f"{name}.png")
    picture.paste("blue", (0, 0, 40, 40))
    picture.save(photos / "more.png")
    monkeypatch.chdir(tmp_path)
    written = []
    monkeypatch.setattr(
        "facesets.mtcnn_crop_align.atomic_write",
        lambda path: written.append(path.name) or atomic_write(path),
    )
    main(
        [
            "--in_dir",
            "photos",
            "--out_dir",
            "out",
            "--mtcnn_pytorch_path",
            "checkout",
            "--n_threads",
            "0",
        ]
    )
    out = tmp_path / "out"
    crops = [
        f"{name}.png_{face}.jpg" for name in ("two", "more") for face in (1, 0)
    ]  # coinciding points: no face
    assert files(out).keys() == {"skipped.csv", *crops}
    for name in ("two", "more"):  # the first crop of a photograph is written last
        assert [path for path in written if path.startswith(f"{name}.png_")] == [
            f"{name}.png_1.jpg",
            f"{name}.png_0.jpg",
        ]
    assert [row[:2] for row in rows(out)[1:]] == [["none.png", "no_face"], ["small.png", "no_face"]]
    for name, channel in (("two", 0), ("more", 2)):
        colour = [
            decode_photo(out / f"{name}.png_{face}.jpg")[0].float().mean((1, 2)) for face in (0, 1)
        ]
        assert colour[0].argmax() == channel
        assert colour[0][channel] > 200 > 60 > colour[1][channel]  # the larger face came first
    assert str(checkout) not in sys.path
    for path in photos.iterdir():
        path.write_text("no picture")
    main(
        [
            "--in_dir",
            "photos",
            "--out_dir",
            "bad",
            "--mtcnn_pytorch_path",
            "checkout",
            "--n_threads",
            "0",
        ]
    )
    assert [row[1] for row in rows(tmp_path / "bad")[1:]] == ["unreadable"] * 4
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["--in_dir", "photos", "--out_dir", "other", "--mtcnn_pytorch_path", "photos"])
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 2
        and "--mtcnn_pytorch_path photos" in error
        and error.count("\n") == 1
    )


@pytest.mark.parametrize("flags, named", [
    (["--in_dir", "nowhere", "--out_dir", "out"], "nowhere"), (["--in_dir", "."], "--out_dir"),
    (["--in_dir", ".", "--out_dir", "./inside"], "--output_dir"),
    (["--in_dir", ".", "--out_dir", "../o", "--out_res", "0"], "--out_res")])
def test_mistakes_are_one_line(flags, named, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and named in error and error.count("\n") == 1


def test_two_ranks_write_what_one_writes(photos, tmp_path):
    for i in range(20):
        shutil.copy(ASTRONAUT if i == 15 else photos / "text.webp", photos / f"more{i:02}.jpg")
    align(photos, tmp_path / "one", "--min_face_size", "60")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "facesets" / "mtcnn_crop_align.py"),
        "--in_dir",
        str(photos),
        "--out_dir",
        str(tmp_path / "two"),
        "--min_face_size",
        "60",
        "--n_threads",
        "0",
        "--device",
        "cpu",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200,
                          env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == 0, done.stderr[-2000:]
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_batches_joined_as_for_a_gpu_give_the_same_crops(photos, tmp_path, monkeypatch):
    for i in range(20):
        shutil.copy(photos / ("a.JPG" if i % 9 == 0 else "cut.jpg"), photos / f"more{i:02}.jpg")
    align(photos, tmp_path / "apart", "--min_face_size", "60")
    for module in ("models.faces.pipeline", "models.data.chunks"):
        monkeypatch.setattr(f"{module}.chunk_size", lambda _: 32)
    monkeypatch.setitem(MAX_JOINED_PHOTOS, "cpu", 128)
    searched = []
    detect = MTCNN.detect
    monkeypatch.setattr(MTCNN, "detect", lambda self, images, sizes: searched.append(len(images))
                        or detect(self, images, sizes))
    align(photos, tmp_path / "joined", "--min_face_size", "60")
    assert searched == [6] and files(tmp_path / "joined").keys() == files(tmp_path / "apart").keys()
    assert (
        rows(tmp_path / "joined") == rows(tmp_path / "apart")
        and len(rows(tmp_path / "joined")) == 21
    )
    for path in (tmp_path / "joined").rglob("*.jpg"):
        apart = decode_photo(tmp_path / "apart" / path.relative_to(tmp_path / "joined"))[0]
        assert (decode_photo(path)[0].float() - apart.float()).abs().mean() < 0.1
