"""facesets/fairface_set.py: evaluation pictures and near-duplicates stay on their side."""
import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facesets import fairface_set
from models.training.auxiliary import age_target


def write_noise(root: Path, n: int, classes: tuple[str, ...] = ("White", "Black")) -> None:
    """Class folders of n coarse noise pictures each."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(n):
            pixels = rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)
            picture = Image.fromarray(pixels).resize((112, 112), Image.Resampling.NEAREST)
            picture.save(root / name / f"{number}.png")


def test_leakage_is_left_out_and_near_duplicates_share_a_split(tmp_path, capsys):
    src, dst = tmp_path / "src", tmp_path / "dst"
    write_noise(src, 20)
    leaked = tmp_path / "val" / "White" / "7.png"
    leaked.parent.mkdir(parents=True)
    leaked.write_bytes((src / "White" / "3.png").read_bytes())
    (src / "Black" / "900.png").write_bytes((src / "Black" / "5.png").read_bytes())
    labels = tmp_path / "labels.csv"
    labels.write_text("file,age,gender\nBlack/5.png,20-29,Female\n")
    fairface_set.main(["--src", str(src), "--labels", str(labels), "--avoid", str(tmp_path / "val"),
                       "--dst", str(dst), "--val_share", "0.2", "--num_workers", "0"])
    assert "1 near-duplicates of 1 evaluation pictures: White/3.png;" in capsys.readouterr().out
    with open(dst / "manifest.csv", newline="") as file:
        rows = {row["file"].split("/", 1)[1]: row for row in csv.DictReader(file)}
    assert len(rows) == 40 and "White/3.png" not in rows
    first, copy = rows["Black/5.png"], rows["Black/900.png"]
    assert (first["split"], first["duplicate_group"]) == (copy["split"], copy["duplicate_group"])
    assert (first["age"], first["gender"]) == ("20-29", "1")
    assert 7 <= sum(row["split"] == "val" for row in rows.values()) <= 9
    assert all((dst / row["file"]).is_file() for row in rows.values())


def test_held_out_pictures_are_new_and_samples_are_equal():
    files = [f"{name}/{number}.jpg" for name in "AB" for number in range(100)]
    splits = fairface_set.assign_splits([[i] for i in range(200)], files, 0.5, 1, val_above=59)
    numbers = {split: [i % 100 for i in range(200) if splits[i] == split] for split in ("val", "")}
    assert min(numbers["val"]) == 60 and max(numbers[""]) == 59
    assert len(numbers["val"]) + len(numbers[""]) == 100
    sample = fairface_set.sample_files(files + ["C/1.jpg"], 21, 0)
    assert [sum(file[0] == name for file in sample) for name in "ABC"] == [10, 10, 1]


@pytest.mark.parametrize(("age", "shares"), [
    ("31", {4: 1.0}), ("30-39", {4: 0.4, 5: 0.6}), ("more than 70", {8: 1.0}), ("", {}),
    ("old", {})])
def test_age_ranges_are_shared_out_over_the_bands(age, shares):
    assert age_target(age).tolist() == pytest.approx([shares.get(band, 0) for band in range(9)])
