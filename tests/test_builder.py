"""The builder: names, groups, splits, and whole builds from folders and archives."""
import csv
import io
import json
import random
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_blots, jpeg
from PIL import Image

import utk_dataset_builder as builder
from models.data.batches import collate_photos
from models.data.decoding import decode_photo
from models.data.faceset import SPLITS, read_faceset
from models.data.group_splits import split_groups, split_sizes
from models.data.utk import OTHERS, Chip, ChipCollection, parse_utk_name, read_split_list
from models.faces.align import TEMPLATE
from models.faces.second_look import load_detector
from models.faces.selection import most_central_faces


def chip_name(i: int, label: int) -> str:
    """A name as UTKFace has them."""
    return f"{20 + i % 50}_{i % 2}_{label}_201701{i:011d}.jpg.chip.jpg"


@pytest.fixture(scope="module")
def chips() -> dict[str, bytes]:
    """File name -> bytes: 40 chips, 10 a class, with a pair of equals, a pair that
    disagrees, and odd files.
    """
    files = {chip_name(i, i % 4): jpeg(draw_blots(i)) for i in range(40)}
    files[chip_name(101, 1)] = files[chip_name(1, 1)]
    files[chip_name(102, 3)] = files[chip_name(2, 2)]
    files[chip_name(103, 4)] = jpeg(draw_blots(103))
    files["39_1_20170116174525125.jpg.chip.jpg"] = jpeg(draw_blots(104))
    files[chip_name(105, 0)] = b"not a picture"
    files["readme.txt"] = b"no picture either"
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder of these files."""
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def build(tmp_path: Path, src: Path, dst: str = "built", *flags: str) -> Path:
    """Runs the command; the folder it has built."""
    argv = [
        "--src",
        src,
        "--dst",
        tmp_path / dst,
        "--vis_dir",
        tmp_path / "plots",
        "--workers",
        "0",
        *flags,
    ]
    builder.main([str(arg) for arg in argv])
    return tmp_path / dst


def rows_of(path: Path) -> list[dict]:
    """The rows of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fails(capsys, *flags) -> str:
    """Runs the command, which must exit with 2; its one line."""
    with pytest.raises(SystemExit) as stop:
        builder.main([str(flag) for flag in flags])
    error = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len([line for line in error if "error:" in line]) == 1
    return error[-1]


# Names

def test_a_name_gives_age_gender_race():
    assert parse_utk_name("25_0_1_20170116174525125.jpg.chip.jpg") == (25, 0, 1)
    assert parse_utk_name("100_1_4_20170116174525125.jpg") == (100, 1, 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("39_1_20170116174525125.jpg.chip.jpg", "3 of the 4"),
        ("53__0_20170116184028385.jpg.chip.jpg", "gender"),
        ("x_0_0_20170116184028385.jpg", "age"),
        ("200_0_0_20170116184028385.jpg", "age"),
        ("25_3_0_20170116184028385.jpg", "gender"),
        ("25_0_5_20170116184028385.jpg", "race"),
        ("²5_0_0_20170116184028385.jpg", "age"),
        ("-5_0_0_20170116184028385.jpg", "age"),
        ("face.jpg", "1 of the 4"),
    ],
)
def test_a_malformed_name_gives_the_reason(name, reason):
    assert reason in parse_utk_name(name)


# Groups

def test_groups_of_two_and_more_are_numbered():
    chips = [Chip(str(i), str(i), 20, 0, 0) for i in range(5)]
    builder.number_groups(chips, [[0, 2], [1, 4], [3]])
    assert [chip.group for chip in chips] == [1, 2, 1, 0, 2]


def test_groups_lose_their_unreadable_pictures():
    collection = ChipCollection([Chip(str(i), str(i), 20, 0, 0) for i in range(5)])
    groups = builder.drop_failures(collection, [[0, 2], [1, 4], [3]], {2: "broken", 3: "empty"})
    assert groups == [[0], [1, 2]]
    assert [(chip.file, chip.group) for chip in collection.chips] == [("0", 0), ("1", 1), ("4", 1)]
    assert collection.skipped == [("2", "broken"), ("3", "empty")]


# Splits

@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 100, 22013])
def test_split_sizes_sum_and_round(n):
    sizes = split_sizes(n, (0.6, 0.2, 0.2))
    assert sum(sizes) == n
    assert all(
        abs(size - n * ratio) < 1 for size, ratio in zip(sizes, (0.6, 0.2, 0.2), strict=True)
    )


def grouped_chips(seed: int) -> tuple[list[Chip], list[list[int]]]:
    """500 chips in groups of 1 to 4, some of which disagree on the label."""
    rng = random.Random(seed)
    found, groups = [], []
    while len(found) < 500:
        label, size = rng.randrange(4), rng.choice([1] * 12 + [2, 2, 3, 4])
        groups.append(list(range(len(found), len(found) + size)))
        found += [
            Chip("", "", 20, 0, label if rng.random() > 0.1 or size == 1 else rng.randrange(4))
            for _ in range(size)
        ]
    return found, groups


def draw_splits(chips, groups, ratios, seed) -> None:
    """Sets the split of each chip as the command does."""
    splits = split_groups([chip.label for chip in chips], groups, ratios, seed)
    for chip, split in zip(chips, splits, strict=True):
        chip.split = split


def test_splits_are_leak_free_stratified_and_exact():
    found, groups = grouped_chips(0)
    draw_splits(found, groups, (0.6, 0.2, 0.2), 101)
    odd = builder.label_conflicts(found, groups)
    assert odd
    for group in groups:
        assert len({found[i].split for i in group}) == 1
        assert (found[group[0]].split == "") == (group in odd)
    counted = Counter((chip.label, chip.split) for chip in found if chip.split)
    for label in range(4):
        own = [counted[label, split] for split in ("train", "val", "test")]
        assert own == split_sizes(sum(own), (0.6, 0.2, 0.2))


def test_the_seed_decides_the_split():
    drawn = []
    for seed in (101, 101, 102):
        found, groups = grouped_chips(0)
        draw_splits(found, groups, (0.6, 0.2, 0.2), seed)
        drawn.append([chip.split for chip in found])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_group_larger_than_its_splits_stays_whole():
    found = [Chip("", "", 20, 0, 0) for _ in range(5)]
    draw_splits(found, [[0, 1, 2, 3, 4]], (0.4, 0.3, 0.3), 1)
    assert len({chip.split for chip in found}) == 1


# The command

def test_a_build_holds_what_it_says(tmp_path, chips):
    built = build(tmp_path, write_folder(tmp_path / "src", chips))
    manifest, about = (
        rows_of(built / "manifest.csv"),
        json.loads((built / "faceset.json").read_text()),
    )
    pictures = {name for name in contents(built) if name.endswith(".jpg")}
    assert pictures == {row["file"] for row in manifest}
    assert len(pictures) == 40  # 42 readable ones, less the pair that disagrees
    for row in manifest:
        split, label, name = row["file"].split("/")
        assert (row["split"], row["label"], row["class"]) == (
            split,
            label,
            about["classes"][int(label)],
        )
        assert parse_utk_name(name) == (int(row["age"]), int(row["gender"]), int(label))
        assert row["aligned_by"] == "template"                      # blots have no face
    twins = [row for row in manifest if row["duplicate_group"]]
    assert {row["file"].split("/")[-1] for row in twins} == {chip_name(1, 1), chip_name(101, 1)}
    assert len({(row["split"], row["duplicate_group"]) for row in twins}) == 1
    counted = Counter((row["split"], row["class"]) for row in manifest)
    assert all(about["counts"][split][name] == counted[split, name]
               for split in SPLITS for name in about["classes"])
    assert (about["aligned"], about["split"], about["seed"]) == (True, "leak-free", 101)
    conflict = rows_of(built / "label_conflicts.csv")
    assert [(row["file"], row["split"], row["label"]) for row in conflict] == [
        (chip_name(2, 2), "none", "2"), (chip_name(102, 3), "none", "3")]
    skipped = {row["file"]: row["reason"] for row in rows_of(built / "skipped.csv")}
    assert set(skipped) == {"39_1_20170116174525125.jpg.chip.jpg", chip_name(105, 0)}
    assert "UnidentifiedImageError" in skipped[chip_name(105, 0)]
    with Image.open(built / manifest[0]["file"]) as crop:
        assert (crop.size, crop.layer) == (
            (224, 224),
            [(1, 1, 1, 0), (2, 1, 1, 1), (3, 1, 1, 1)],
        )  # 4:4:4
    assert all((tmp_path / "plots" / f"{split}_dist.png").stat().st_size > 1000 for split in SPLITS)
    assert len(read_faceset(built, "train")) == sum(about["counts"]["train"].values())


def test_order_workers_and_packing_change_nothing(tmp_path, chips):
    first = contents(build(tmp_path, write_folder(tmp_path / "a", chips), "one"))
    backwards = dict(reversed(chips.items()))
    write_folder(tmp_path / "b", backwards)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "b", "UTKFace")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        for name, data in backwards.items():
            archive.writestr(f"UTKFace/{name}", data)
    for src, workers in (("b", "2"), ("c.tar.gz", "0"), ("d.zip", "3")):
        again = contents(build(tmp_path, tmp_path / src, src + ".built", "--workers", workers))
        for name in ("skipped.csv",):  # names the files as the archive does
            again[name] = again[name].replace(b"UTKFace/", b"")
        assert again == first
    assert not list(tmp_path.glob("*.partial*"))


def test_an_archive_cannot_write_outside(tmp_path, chips):
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    name, data = chip_name(0, 0), chips[chip_name(0, 0)]
    with tarfile.open(inside / "evil.tar", "w") as archive:
        for path in (f"../{name}", f"{tmp_path}/{name}", f"a/../../{name}", chip_name(1, 1)):
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo(chip_name(2, 2))
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    before = set(contents(tmp_path))
    built = build(inside, inside / "evil.tar")
    new = {path for path in contents(tmp_path) if path not in before}
    assert all(path.startswith(("deep/er/built/", "deep/er/plots/")) for path in new)
    assert [row["file"].split("/")[-1] for row in rows_of(built / "manifest.csv")] == [
        chip_name(1, 1)
    ]


def test_no_align_copies_the_bytes(tmp_path, chips):
    src = write_folder(tmp_path / "src", chips)
    built = build(tmp_path, src, "built", "--no_align", "--ratios", "0.5", "0.3", "0.2")
    for row in rows_of(built / "manifest.csv"):
        assert (built / row["file"]).read_bytes() == chips[row["file"].split("/")[-1]]
        assert row["aligned_by"] == "none"
    assert not read_faceset(built, "val").is_aligned


def test_a_listed_split_is_followed_whole(tmp_path, chips):
    src, splits = write_folder(tmp_path / "src", chips), ("train", "val", "test")
    names = [
        name for name in chips if isinstance(parse := parse_utk_name(name), tuple) and parse[2] < 4
    ]
    listed = {name: splits[i % 3] for i, name in enumerate(names) if i != 5} | {
        chip_name(900, 0): "val"
    }
    lines = [f"{name},{split},{name.split('_')[2]}" for name, split in listed.items()]
    (tmp_path / "split.csv").write_text(
        "\n".join(["file,split,label", *lines]) + "\n", encoding="utf-8-sig"
    )
    built = build(tmp_path, src, "built", "--split_csv", str(tmp_path / "split.csv"))
    found = {row["file"].split("/")[-1]: row["split"] for row in rows_of(built / "manifest.csv")}
    unusable = (chip_name(105, 0), chip_name(900, 0))
    assert found == {name: split for name, split in listed.items() if name not in unusable}
    assert [row["split"] for row in rows_of(built / "label_conflicts.csv")] == [
        listed[chip_name(2, 2)], listed[chip_name(102, 3)]]
    assert json.loads((built / "faceset.json").read_text())["split"] == "split.csv"


def test_a_finished_set_is_replaced_only_when_asked_and_only_by_a_whole_one(
    tmp_path, chips, capsys, monkeypatch
):
    some = {chip_name(i, i % 4): chips[chip_name(i, i % 4)] for i in range(8)}
    src, dst = write_folder(tmp_path / "src", some), tmp_path / "built"
    before = contents(build(tmp_path, src))
    argv = [
        "--src",
        src,
        "--dst",
        dst,
        "--vis_dir",
        tmp_path / "plots",
        "--workers",
        "0",
        "--seed",
        "7",
    ]
    assert "--overwrite" in fails(capsys, *argv)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(
            builder, "split_groups", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        builder.main([str(arg) for arg in (*argv, "--overwrite")])
    assert contents(dst) == before
    assert {path.name for path in tmp_path.iterdir()} == {"src", "built", "plots"}
    builder.main([str(arg) for arg in (*argv, "--overwrite")])
    assert json.loads((dst / "faceset.json").read_text())["seed"] == 7
    assert {path.name for path in tmp_path.iterdir()} == {"src", "built", "plots"}
    mine = write_folder(tmp_path / "mine", {"letter.txt": b"dear"})
    assert "not a data set of this" in fails(capsys, "--src", src, "--dst", mine, "--overwrite")
    assert (mine / "letter.txt").exists()


def damage_archives(folder: Path) -> None:
    """cut.tar.gz ends early, bent.tar.gz and bent.zip hold broken streams, locked.zip says
    that it is encrypted.
    """
    noise = np.random.default_rng(0).bytes(40_000)
    with tarfile.open(folder / "whole.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(chip_name(0, 0))
        member.size = len(noise)
        archive.addfile(member, io.BytesIO(noise))
    data = (folder / "whole.tar.gz").read_bytes()
    (folder / "cut.tar.gz").write_bytes(data[:20_000])
    (folder / "bent.tar.gz").write_bytes(data[:20_000] + b"\xff" * (len(data) - 20_000))
    with zipfile.ZipFile(folder / "whole.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(chip_name(0, 0), noise)
    data = (folder / "whole.zip").read_bytes()
    (folder / "bent.zip").write_bytes(data[:100] + b"\xff" * 1000 + data[1100:])
    directory = data.index(b"PK\1\2")
    (folder / "locked.zip").write_bytes(
        data[:6] + b"\1" + data[7 : directory + 8] + b"\1" + data[directory + 9 :]
    )


def test_mistakes_are_one_line(tmp_path, chips, capsys):
    src = write_folder(tmp_path / "src", {chip_name(0, 0): chips[chip_name(0, 0)]})
    where = ["--dst", tmp_path / "built", "--vis_dir", tmp_path / "plots", "--workers", "0"]
    write_folder(tmp_path / "empty", {})
    (tmp_path / "broken.tar").write_bytes(b"nothing")
    damage_archives(tmp_path)
    (tmp_path / "columns.csv").write_text("image,class\n")
    (tmp_path / "label.csv").write_text(f"file,split,label\n{chip_name(0, 0)},train,2\n")
    (tmp_path / "split.csv").write_text(f"file,split,label\n{chip_name(0, 0)},training,0\n")
    for flags, words in (
        (["--src", src, "--ratios", "0.6", "0.2", "0.3"], "--ratios 0.6 0.2 0.3: must sum to 1"),
        (["--src", tmp_path / "none"], "no such folder or archive"),
        (["--src", tmp_path / "empty"], "no chip"),
        (["--src", tmp_path / "broken.tar"], "broken.tar: cannot be unpacked"),
        (["--src", tmp_path / "cut.tar.gz"], "cut.tar.gz: cannot be unpacked"),
        (["--src", tmp_path / "bent.tar.gz"], "bent.tar.gz: cannot be unpacked"),
        (["--src", tmp_path / "bent.zip"], "bent.zip: cannot be unpacked"),
        (["--src", tmp_path / "locked.zip"], "locked.zip: cannot be unpacked"),
        (["--src", tmp_path / "label.csv"], "expects a folder or a file of"),
        (
            ["--src", src, "--split_csv", tmp_path / "columns.csv"],
            "expects the columns file, split, label",
        ),
        (["--src", src, "--split_csv", tmp_path / "label.csv"], "contradicts"),
        (["--src", src, "--split_csv", tmp_path / "split.csv"], "'training'"),
        (["--src", src, "--split_csv", tmp_path / "absent.csv"], "absent.csv"),
        (["--src", src, "--dst", src / "x" / ".."], "--output_dir"),
        (["--src", src, "--out_res", "0"], "--out_res"),
    ):
        assert words in fails(capsys, *where, *flags)
    assert not (tmp_path / "built").exists()
    assert not list(tmp_path.glob("*.partial*"))


# Real chips

@pytest.mark.real
def test_two_thousand_real_chips(tmp_path, faces_data):
    (tmp_path / "src").mkdir()
    with tarfile.open(faces_data / "UTKFace.tar") as archive:
        members = [member for member in archive if member.isfile() and member.name.endswith(".jpg")]
        for member in members[::len(members) // 2100][:2100]:
            (tmp_path / "src" / Path(member.name).name).write_bytes(
                archive.extractfile(member).read()
            )
    argv = ["--src", tmp_path / "src", "--dst", tmp_path / "built", "--vis_dir", tmp_path / "plots",
            "--split_csv", faces_data / "utk_seed_split.csv"]
    builder.main([str(arg) for arg in argv])
    manifest = rows_of(tmp_path / "built" / "manifest.csv")
    assert len(manifest) >= 2000
    listed = {row["file"]: row for row in rows_of(faces_data / "utk_seed_split.csv")}
    assert all((row["split"], row["label"]) == (listed[name]["split"], listed[name]["label"])
               for row in manifest for name in [row["file"].split("/")[-1]])
    assert Counter(row["aligned_by"] for row in manifest)["template"] < 0.05 * len(manifest)
    some = [row for row in manifest if row["aligned_by"] == "mtcnn"][::100]
    assert max(warp_differences(tmp_path / "src", tmp_path / "built", some)) < 3


def warp_differences(src: Path, built: Path, rows: list[dict]) -> list[float]:
    """Mean grey levels between each crop and scikit-image's warp of the chip by the
    landmarks found in it.
    """
    transform = pytest.importorskip("skimage.transform")
    differences = []
    for row in rows:
        images, sizes = collate_photos([decode_photo(src / row["file"].split("/")[-1])[0]])
        faces = load_detector(torch.device("cpu"), 40).detect(images, sizes)
        landmarks = faces.landmarks[most_central_faces(faces, sizes)[0]].numpy()
        to_crop = transform.SimilarityTransform.from_estimate(
            landmarks, (np.array(TEMPLATE) + 0.5) * 2 - 0.5
        )
        warped = transform.warp(
            images[0].permute(1, 2, 0).numpy(),
            to_crop.inverse,
            output_shape=(224, 224),
            order=1,
            mode="edge",
            preserve_range=True,
        )
        with Image.open(built / row["file"]) as crop:
            differences.append(float(np.abs(np.asarray(crop) - warped).mean()))
    return differences


@pytest.mark.real
def test_the_published_split_lists_every_chip_of_four_classes(faces_data):
    listed = read_split_list(faces_data / "utk_seed_split.csv")
    assert Counter(split for split, _ in listed.values()) == {
        "train": 13207,
        "val": 4402,
        "test": 4404,
    }
    with tarfile.open(faces_data / "UTKFace.tar") as archive:
        names = [Path(name).name for name in archive.getnames() if name.endswith(".jpg")]
    assert {name for name in names if parse_utk_name(name)[2] != OTHERS} == set(listed)
