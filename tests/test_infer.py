"""infer.py as a user runs it: a row for every picture, the same bytes however the work is shared
out, honest ends.
"""
import csv
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, draw_crop
from PIL import Image

import infer
from models.data.chunks import DECODE_BATCH, MAX_CHUNK, chunk_size, count_chunks, count_files
from models.faces.align import TEMPLATE
from models.faces.calibration import Calibration
from models.faces.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec
from models.faces.pipeline import AlignedBatch, FaceRow, full_batches
from models.faces.predictions import (
    Prediction,
    format_row,
    prediction_columns,
    quote_cell,
    read_predictions,
)
from models.faces.predictor import Predictor, fuse_batch_norm
from models.reports import shares
from models.reports.shares import distinct_faces, no_shares_reason
from models.reports.tally import Tally, read_groups, tally_predictions

CLASSES = ("White", "Black", "East Asian", "Indian")


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory) -> Path:
    """A checkpoint with drawn weights, batch-norm statistics that are none of the defaults,
    and a calibration.
    """
    torch.manual_seed(0)
    classifier = FaceClassifier(FaceSpec(CLASSES, TEMPLATE, (14.0, 22.0, 98.0, 106.0), 32)).train()
    with torch.no_grad():
        for _ in range(3):
            classifier(torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8))
    labels = torch.arange(400) % 4
    probs = (torch.randn(400, 4) + 3 * torch.nn.functional.one_hot(labels, 4)).softmax(1)
    path = tmp_path_factory.mktemp("ckpt") / "drawn.pt"
    calibration = Calibration(1.3, (0.1, 0.0, -0.1, 0.0), probs, labels)
    save_checkpoint(
        path, Checkpoint(classifier.spec, classifier.backbone.state_dict(), calibration)
    )
    return path


@pytest.fixture(autouse=True)
def without_shares(request, monkeypatch):
    """Estimating and drawing shares takes longest of all on a few crops: only tests of them
    do it.
    """
    if "shares" not in request.node.name:
        monkeypatch.setattr(shares, "MIN_FACES", 1000)


@pytest.fixture(scope="session")
def face() -> Image.Image:
    """A photograph with one face, in the public domain."""
    path = Path(pytest.importorskip("skimage").__file__).parent / "data" / "astronaut.png"
    if not path.is_file():
        pytest.skip("this scikit-image comes without its astronaut")
    return Image.open(path).convert("RGB").crop((130, 0, 330, 200))


@pytest.fixture
def crops(tmp_path) -> Path:
    """A folder of 40 drawn finished crops in two subfolders."""
    folder = tmp_path / "crops"
    for i in range(40):
        path = folder / f"part {i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_crop(i % 4, i).save(path)
    return folder


def run(tmp_path, ckpt, *flags, out="out", source=None) -> list[dict[str, str]]:
    """Rows of predictions.csv of a run in this process."""
    infer.main(
        [
            *(["--input_dir", str(source)] if source else []),
            "--output_dir",
            str(tmp_path / out),
            "--ckpt",
            str(ckpt),
            "--device",
            "cpu",
            "--num_workers",
            "0",
            *map(str, flags),
        ]
    )
    return list(read_predictions(tmp_path / out / "predictions.csv"))


def refused(capsys, *flags) -> str:
    """The one line with which a run with these flags ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        infer.main([*map(str, flags)])
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1, line
    return line


# -------------------------------------------------------------------------------------- photographs
def test_every_picture_gets_its_row(tmp_path, ckpt, face, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    good = {"plain.png": {}, "café 写真.png": {}, "new\nline.png": {}, os.fsdecode(b"\xff.png"): {}}
    for name in good:
        face.save(source / name)
    for orientation, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90)):
        exif = Image.Exif()
        exif[274] = orientation
        face.transpose(turn).save(source / f"exif{orientation}.png", exif=exif)
    big = Image.new("RGB", (600, 500), "grey")
    big.paste(face, (20, 30))
    big.save(source / "larger.png")
    Image.new("RGB", (1, 1)).save(source / "pixel.png")
    Image.new("RGB", (112, 112)).save(source / "crop.png")
    face.convert("L").save(source / "grey.png")
    face.save(source / "jpeg.jpg")
    (source / "cut.jpg").write_bytes((source / "jpeg.jpg").read_bytes()[:4000])
    (source / "text.jpg").write_text("hello")
    (source / "empty.png").write_bytes(b"")
    (source / "notes.txt").write_text("no picture")
    face.resize((900, 900)).save(source / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500_000)
    rows = {row["file"]: row for row in run(tmp_path, ckpt, "--min_face_size", 40, "--visualize",
                                            "--n_vis_samples_per_pic", 4, "--n_vis_rows_per_pic", 2,
                                            "--figsize_h", 3, "--figsize_w", 3, source=source)}
    assert len(rows) == 15 and "notes.txt" not in rows
    failed = {
        "cut.jpg": "unreadable",
        "text.jpg": "unreadable",
        "empty.png": "unreadable",
        "bomb.png": "too_large",
        "pixel.png": "no_face",
    }
    for name, row in rows.items():
        assert row["status"] == failed.get(name, "ok"), (name, row)
        assert bool(row["error"]) == (row["status"] in ("unreadable", "too_large"))
        assert (row["face"] == "-1") == (row["status"] != "ok")
    plain, larger = rows["plain.png"], rows["larger.png"]
    for name in [*good, "exif3.png", "exif6.png"]:
        same = {**rows[name], "file": plain["file"]}
        assert same == plain, name
    shift = [float(larger[key]) - float(plain[key]) for key in ("x1", "y1", "x2", "y2")]
    assert np.allclose(
        shift, [20, 30, 20, 30], atol=6
    )  # the detector's grid does not move with the face
    assert rows["crop.png"]["x1"] == "" and rows["crop.png"]["detector_score"] == ""
    lines = (
        (tmp_path / "out" / "pred_ethnicities.txt")
        .read_bytes()
        .decode("utf-8", "surrogateescape")
        .split("\n")
    )
    named = [
        f"{row['file']} {row['ethnicity']}".replace("\n", "\\n")
        for row in rows.values()
        if row["status"] == "ok"
    ]
    assert lines == [*named, ""]
    grids = sorted(path.name for path in (tmp_path / "out").glob("*.jpg"))
    assert grids == ["0.jpg", "1.jpg", "2.jpg"]                 # 10 faces, 4 a grid
    assert not (tmp_path / "out" / "infer_parts").exists()


def test_all_faces_come_by_size_in_pixels_of_the_original(tmp_path, ckpt, face):
    canvas = Image.new("RGB", (1000, 500), "grey")
    canvas.paste(face, (50, 50))
    canvas.paste(face.resize((400, 400)), (500, 50))
    (tmp_path / "in").mkdir()
    canvas.save(tmp_path / "in" / "two.png")
    flags = ["--min_face_size", 40, "--max_side", 500]
    both = run(tmp_path, ckpt, "--faces", "all", *flags, source=tmp_path / "in")
    one = run(tmp_path, ckpt, *flags, source=tmp_path / "in", out="one")
    assert [row["face"] for row in both] == ["0", "1"] and len(one) == 1
    apart = 2e-4 if Predictor(load_checkpoint(ckpt), torch.device("cpu")).bfloat16 else 2e-5
    for name, cell in one[0].items():  # the last digits of a number hang on its batch
        number = name == "confidence" or name.startswith("p_")
        assert (
            cell == both[0][name]
            or number
            and float(cell) == pytest.approx(float(both[0][name]), abs=apart)
        )
    sides = [float(row["x2"]) - float(row["x1"]) for row in both]
    assert sides[0] == pytest.approx(2 * sides[1], rel=0.2)
    assert (
        float(both[0]["x1"]) > 500 > float(both[1]["x2"])
    )  # of 1000 pixels, though searched at 500
    text = (tmp_path / "out" / "pred_ethnicities.txt").read_text().splitlines()
    assert [line.rsplit(" ", 1)[0] for line in text] == ["two.png_0", "two.png_1"]


# ----------------------------------------------------------------------------------- finished crops
def test_probabilities_are_those_of_the_plain_network(tmp_path, ckpt, crops):
    from models.faces.align import crop_views
    rows = run(tmp_path, ckpt, source=crops)
    checkpoint = load_checkpoint(ckpt)
    spec = checkpoint.spec
    apart = 0.005 if Predictor(checkpoint, torch.device("cpu")).bfloat16 else 2e-6
    for row in rows[:5]:
        crop = torch.from_numpy(np.array(Image.open(crops / row["file"]))).permute(2, 0, 1)[None]
        with torch.inference_mode():
            logits = checkpoint.classifier(torch.device("cpu"))(
                crop_views(crop, spec.window, spec.input_size)
            )
        probs = checkpoint.probs(logits)[0].tolist()
        assert [float(row[f"p_{name}"]) for name in CLASSES] == pytest.approx(probs, abs=apart)
        assert float(row["confidence"]) == pytest.approx(max(probs), abs=apart)
        assert row["ethnicity"] == CLASSES[int(np.argmax(probs))].replace(" ", "_")


def test_results_do_not_depend_on_how_work_is_shared(tmp_path, ckpt, crops):
    whole = run(tmp_path, ckpt, source=crops)
    for name, flags in (("small", ["--batch_size", 3]), ("workers", ["--num_workers", 2])):
        other = run(tmp_path, ckpt, *flags, source=crops, out=name)
        for a, b in zip(whole, other, strict=True):
            assert [v for k, v in a.items() if k[:2] not in ("p_", "co")] == [
                v for k, v in b.items() if k[:2] not in ("p_", "co")
            ]
            assert float(a["confidence"]) == pytest.approx(float(b["confidence"]), abs=2e-5)
    names = ["predictions.csv", "pred_ethnicities.txt"]
    assert all(
        (tmp_path / "out" / name).read_bytes() == (tmp_path / "workers" / name).read_bytes()
        for name in names
    )


def test_lists_and_shards_give_the_folders_rows(tmp_path, ckpt, crops):
    rows = run(tmp_path, ckpt, source=crops)
    (tmp_path / "list").write_text(
        "".join(f"{row['file']}\n" for row in reversed(rows)), encoding="utf-8-sig"
    )
    listed = run(tmp_path, ckpt, "--in_list", tmp_path / "list", source=crops, out="listed")
    assert [row["file"] for row in listed] == [row["file"] for row in reversed(rows)]
    for shard in range(2):
        with tarfile.open(tmp_path / f"s{shard}.tar", "w") as tar:
            for row in rows[20 * shard:20 * shard + 20]:
                tar.add(crops / row["file"], row["file"])
    packed = run(tmp_path, ckpt, source=tmp_path / "s*.tar", out="packed")
    assert [row["file"] for row in packed] == [
        f"s{i // 20}.tar/{row['file']}" for i, row in enumerate(rows)
    ]
    drop = {"file": ""}
    assert [row | drop for row in packed] == [row | drop for row in rows]
    assert {row["file"]: row["confidence"] for row in listed}.keys() == {
        row["file"] for row in rows
    }


def test_two_ranks_write_what_one_process_writes(tmp_path, ckpt, crops):
    run(
        tmp_path,
        ckpt,
        "--visualize",
        "--figsize_h",
        3,
        "--figsize_w",
        3,
        "--n_vis_samples_per_pic",
        20,
        source=crops,
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "infer.py",
        "--input_dir",
        crops,
        "--output_dir",
        tmp_path / "two",
        "--ckpt",
        ckpt,
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--visualize",
        "--figsize_h",
        "3",
        "--figsize_w",
        "3",
        "--n_vis_samples_per_pic",
        "20",
    ]
    done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "out").iterdir():
        if path.suffix != ".png":
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_resume_does_what_is_missing_and_no_more(tmp_path, ckpt, crops, monkeypatch, capsys):
    whole = run(tmp_path, ckpt, source=crops)
    write_part, written = infer.write_part, []

    def break_down(run, chunk, *rest, **named):
        if chunk == 1:
            raise KeyboardInterrupt
        write_part(run, chunk, *rest, **named)

    monkeypatch.setattr(infer, "write_part", break_down)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ckpt, source=crops, out="broken")
    assert not (tmp_path / "broken" / "predictions.csv").exists()
    flags = [
        "--input_dir",
        crops,
        "--output_dir",
        tmp_path / "broken",
        "--ckpt",
        ckpt,
        "--device",
        "cpu",
    ]
    assert "--resume" in refused(capsys, *flags)
    assert "--faces" in refused(capsys, *flags, "--resume", "--faces", "all")
    monkeypatch.setattr(infer, "write_part", lambda run, chunk, *rest, **named: (
        written.append(chunk), write_part(run, chunk, *rest, **named)))
    assert run(tmp_path, ckpt, "--resume", source=crops, out="broken") == whole
    assert written == [1, 2]
    with pytest.raises(SystemExit) as finished:
        run(tmp_path, ckpt, "--resume", source=crops, out="broken")
    assert finished.value.code == 0


def test_finished_crops_of_any_side_must_be_square(tmp_path, ckpt):
    (tmp_path / "in").mkdir()
    for side in (112, 224, 64):
        draw_crop(1, 7, 112).resize((side, side)).save(tmp_path / "in" / f"{side}.png")
    Image.new("RGB", (100, 120)).save(tmp_path / "in" / "oblong.png")
    rows = {
        row["file"]: row for row in run(tmp_path, ckpt, "--align", "never", source=tmp_path / "in")
    }
    assert (
        rows["oblong.png"]["status"] == "unreadable" and "100 x 120" in rows["oblong.png"]["error"]
    )
    assert {rows[f"{side}.png"]["status"] for side in (112, 224, 64)} == {"ok"}
    assert float(rows["112.png"]["confidence"]) == pytest.approx(
        float(rows["224.png"]["confidence"]), abs=0.05
    )


# --------------------------------------------------------------------------------- doubt and shares
def test_the_doubtful_are_uncertain_and_keep_their_probabilities(tmp_path, ckpt, crops):
    plain = run(tmp_path, ckpt, source=crops)
    middle = sorted(float(row["confidence"]) for row in plain)[20]
    careful = run(tmp_path, ckpt, "--min_confidence", middle, source=crops, out="careful")
    assert 15 <= sum(row["ethnicity"] == "uncertain" for row in careful) <= 25
    for a, b in zip(plain, careful, strict=True):
        assert b["ethnicity"] in (a["ethnicity"], "uncertain") and a | {"ethnicity": ""} == b | {
            "ethnicity": ""
        }
        assert (b["ethnicity"] == "uncertain") == (float(b["confidence"]) < middle - 1e-6) or \
            abs(float(b["confidence"]) - middle) < 2e-6
    run(tmp_path, ckpt, "--target_error", 0.0, "--alpha", 0.5, source=crops, out="strict")
    wide = {
        row["set"].count("|")
        for row in run(tmp_path, ckpt, "--alpha", 0.0, source=crops, out="wide")
    }
    assert wide == {3}  # nothing may be missed: all classes in every set


def test_shares_of_all_and_of_groups(tmp_path, ckpt, crops, capsys):
    rows = run(tmp_path, ckpt, "--by", "folder", source=crops)
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "shares.json").read_text())
    assert (
        set(report) == {"classes", "all", "groups"}
        and (tmp_path / "out" / "shares.png").stat().st_size
    )
    assert sum(report["all"]["counts"]) == 40 and {
        k: v["n"] for k, v in report["groups"].items()
    } == {"part 0": 20, "part 1": 20}
    assert "group part 1" in told and "ok 40" in told and "images/s" in told
    with open(
        tmp_path / "groups.csv", "w", encoding="utf-8-sig"
    ) as file:  # as spreadsheets write it
        csv.writer(file).writerows(
            [("file", "age", "decade"), *((row["file"], 1, "all") for row in rows[:30])]
        )
    run(tmp_path, ckpt, "--by", f"{tmp_path / 'groups.csv'}:decade", source=crops, out="csv")
    report = json.loads((tmp_path / "csv" / "shares.json").read_text())
    assert report["groups"]["all"]["n"] == 30 and report["all"]["n"] == 40


def test_shares_of_a_list_of_absolute_paths_are_by_the_folder_that_holds_each(
    tmp_path, ckpt, crops
):
    (tmp_path / "list.txt").write_text(
        "".join(f"{path}\n" for path in sorted(crops.rglob("*.png")))
    )
    run(tmp_path, ckpt, "--by", "folder", "--in_list", tmp_path / "list.txt")
    report = json.loads((tmp_path / "out" / "shares.json").read_text())
    assert {k: v["n"] for k, v in report["groups"].items()} == {
        str(crops / "part 0"): 20,
        str(crops / "part 1"): 20,
    }


@pytest.mark.parametrize("spelling", ["./{}", "{}", "absolute", "windows"])
def test_groups_are_found_however_the_list_spells_the_files(tmp_path, ckpt, crops, spelling):
    rows = run(tmp_path, ckpt, source=crops)
    names = {"absolute": lambda file: str(crops / file),
             "windows": lambda file: file.replace("/", "\\")}.get(spelling, spelling.format)
    with open(tmp_path / "groups.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "g"), *((names(row["file"]), "x") for row in rows)])
    run(tmp_path, ckpt, "--by", tmp_path / "groups.csv", "--overwrite", source=crops)
    tally = tally_predictions(tmp_path / "out" / "predictions.csv", CLASSES,
                              groups=read_groups(str(tmp_path / "groups.csv"), str(crops)))
    assert tally.group_names == ["x"] and (tally.groups == 0).all()


def test_groups_that_match_nothing_in_part_or_twice_are_said(tmp_path, ckpt, crops, capsys):
    table, flags = (
        tmp_path / "groups.csv",
        ["--input_dir", crops, "--output_dir", tmp_path / "out", "--ckpt", ckpt],
    )
    table.write_text("file,g\nother/x.png,a\n")
    line = refused(capsys, *flags, "--by", table)
    assert "other/x.png" in line and "part 0/00.png" in line
    assert not (tmp_path / "out" / "infer_parts").exists()
    table.write_text("file,g\npart 0/00.png,a\n./part 0/00.png,b\n")
    line = refused(capsys, *flags, "--by", table)
    assert "part 0/00.png" in line and "as a and as b" in line
    table.write_text("file,g\n")
    assert "lists no file" in refused(capsys, *flags, "--by", table)
    table.write_text("file,g\npart 0/00.png,a\n")
    run(tmp_path, ckpt, "--by", table, source=crops)
    assert "39 of 40 pictures are in no group" in capsys.readouterr().out


def test_shares_notice_repeated_pictures_in_a_written_table(tmp_path):
    probs = torch.randn(15, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    rows = [FaceRow(i, 0, "ok", probs=probs[i % 15]) for i in range(30)]
    lines = [format_row(f"{i}.jpg", row, Prediction("White"), 4) for i, row in enumerate(rows)]
    (tmp_path / "predictions.csv").write_text(
        "".join([",".join(prediction_columns(CLASSES)) + "\n", *lines])
    )
    tally = tally_predictions(tmp_path / "predictions.csv", CLASSES)
    assert tally.probs == pytest.approx(probs.repeat(2, 1).double().numpy(), abs=6e-8)
    assert len(distinct_faces(tally.probs)[0]) == 15
    assert (
        len(distinct_faces(tally.probs.round(6))[0]) == 30
    )  # equal rows of fewer digits tell nothing


def test_one_face_gives_no_shares(ckpt):
    for n, said in ((0, "0 faces are too few"), (1, "1 face is too few")):
        tally = Tally(None, None, None, np.zeros((n, 4)), np.zeros(n, np.int32), [])
        assert no_shares_reason(len(tally.probs)).startswith(said)


def test_shares_learn_from_labelled_pictures_of_ones_own(tmp_path, ckpt, crops, capsys):
    own = tmp_path / "own"
    for label, name in enumerate(CLASSES[:3]):  # a class may be missing: validation has it
        (own / name).mkdir(parents=True)
        for i in range(3):
            draw_crop(label, 1000 + i).save(own / name / f"{i}.png")
    run(tmp_path, ckpt, source=crops, out="plain")
    run(tmp_path, ckpt, "--reference", own, source=crops)
    plain, report = (
        json.loads((tmp_path / out / "shares.json").read_text())["all"] for out in ("plain", "out")
    )
    assert (report["n_val"], report["n_reference"], plain["n_reference"]) == (400, 9, 0)
    assert report["methods"]["adjusted"] != plain["methods"]["adjusted"]
    assert "9 labelled faces of your own and 400 validation faces" in capsys.readouterr().out
    (own / "Martian").mkdir()
    draw_crop(0, 1).save(own / "Martian" / "0.png")
    assert (
        "--reference"
        in (
            line := refused(
                capsys,
                "--input_dir",
                crops,
                "--output_dir",
                tmp_path / "out",
                "--ckpt",
                ckpt,
                "--reference",
                own,
                "--overwrite",
            )
        )
        and "Martian" in line
    )


def test_an_uncalibrated_checkpoint_gives_no_shares(tmp_path, ckpt, crops, capsys):
    checkpoint = load_checkpoint(ckpt)
    checkpoint.calibration = None
    bare = tmp_path / "bare.pt"
    save_checkpoint(bare, checkpoint)
    assert {row["set"] for row in run(tmp_path, bare, source=crops)} == {""}
    assert (
        "not calibrated" in capsys.readouterr().out
        and not (tmp_path / "out" / "shares.json").exists()
    )
    for flag, value in (("--target_error", 0.1), ("--reference", crops)):
        assert flag in refused(
            capsys,
            "--input_dir",
            crops,
            "--output_dir",
            tmp_path / "o",
            "--ckpt",
            bare,
            flag,
            value,
        )


# ----------------------------------------------------------------------------------------- mistakes
def test_mistakes_are_one_line_that_names_the_flag(tmp_path, ckpt, crops, capsys):
    out, source = ["--output_dir", tmp_path / "out"], ["--input_dir", crops]
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for flag, flags in (("--input_dir", [*out]), ("--output_dir", [*source]),
                        ("--input_dir", [*out, "--input_dir", tmp_path / "nowhere"]),
                        ("--input_dir", [*out, "--input_dir", tmp_path / "empty"]),
                        ("--in_list", [*out, "--in_list", tmp_path / "nowhere"]),
                        ("--ckpt", [*out, *source, "--ckpt", tmp_path / "nowhere.pt"]),
                        ("--ckpt", [*out, *source, "--ckpt", tmp_path / "file"]),
                        ("--output_dir", [*source, "--output_dir", tmp_path / "file" / "x"]),
                        ("--device", [*out, *source, "--device", "cuda:99"]),
                        ("--batch_size", [*out, *source, "--batch_size", 0]),
                        ("--by", [*out, *source, "--by", tmp_path / "nowhere.csv"]),
                        ("--n_vis_rows_per_pic", [*out, *source, "--n_vis_rows_per_pic", 7]),
                        ("--figsize_w", [*out, *source, "--figsize_w", 9000]),
                        ("--figsize_h", [*out, *source, "--figsize_h", 0.01]),
                        ("--output_dir", [*source, "--output_dir", crops / "out"])):
        chosen = flags if "--ckpt" in flags else [*flags, "--ckpt", ckpt]
        assert flag in refused(capsys, *chosen)
        assert not (tmp_path / "out" / "infer_parts").exists() and not (crops / "out").exists()


def test_results_are_not_lost_unasked(tmp_path, ckpt, crops, capsys):
    run(tmp_path, ckpt, source=crops)
    before = (tmp_path / "out" / "predictions.csv").read_bytes()
    assert "--overwrite" in refused(
        capsys, "--input_dir", crops, "--output_dir", tmp_path / "out", "--ckpt", ckpt
    )
    run(tmp_path, ckpt, "--overwrite", source=crops)
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == before


# ------------------------------------------------------------------------------------- single steps
def test_fusing_batch_norm_changes_nothing(ckpt):
    checkpoint = load_checkpoint(ckpt)
    plain = checkpoint.classifier(torch.device("cpu"))
    fused = fuse_batch_norm(checkpoint.classifier(torch.device("cpu")))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    views = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.allclose(plain(views), fused(views), atol=1e-4)


def test_mirror_images_share_their_probabilities(ckpt):
    predictor = Predictor(load_checkpoint(ckpt), torch.device("cpu"))
    views = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(
        predictor.probs(views, flip=True), predictor.probs(views.flip(3), flip=True), atol=1e-6
    )
    assert predictor.probs(views[:0]).shape == (0, 4)


@pytest.mark.parametrize("parts", [[0], [3, 0, 5], [10], [1] * 9, [4, 4]])
def test_full_batches_keep_rows_and_order_within_a_chunk(parts):
    views = list(torch.arange(sum(parts)))
    aligned = [
        AlignedBatch(
            chunk, [FaceRow(int(i), 0, "ok") for i in part], part, [FaceRow(-1, -1, "no_face")]
        )
        for chunk in (0, 1)
        for part in torch.arange(sum(parts)).split(parts)
    ]
    for chunk, chunk_batches in itertools.groupby(
        full_batches(aligned, 4), lambda batch: batch.chunk
    ):
        batches = list(chunk_batches)
        assert chunk in (0, 1) and [view for batch in batches for view in batch.views] == views
        assert [row.position for batch in batches for row in batch.rows] == list(range(sum(parts)))
        assert all(len(batch.rows) == len(batch.views) == 4 for batch in batches[:-1])
        assert sum(len(batch.failures) for batch in batches) == len(parts)


def test_chunks_are_whole_batches():
    for n in (1, 15, 16, 17, 1024, 1025, 5000, 100_000, 42_000_000):
        size = chunk_size(n)
        assert (
            count_files(n, range(count_chunks(n))) == n
            and count_files(n, [count_chunks(n) - 1]) > 0
        )
        assert size % DECODE_BATCH == 0 and 0 < size <= MAX_CHUNK


@pytest.mark.parametrize("text", ["plain", "a,b", 'say "x"', "two\nlines", "a\rb", "", " "])
def test_quoted_cells_are_read_back(tmp_path, text):
    path = tmp_path / "x.csv"
    path.write_text(f"{quote_cell(text)},end\n", newline="")
    with open(path, newline="") as file:
        assert list(csv.reader(file)) == [[text, "end"]]
