"""A person's label depends on that person's photos only; streamed votes equal a plain count."""
import csv
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_crop

from benchmarks import consensus_scale
from facesets.consensus import main
from models.data.faceset import read_faceset
from models.faces.align import TEMPLATE, WHOLE_TEMPLATE
from models.faces.checkpoint import Checkpoint, save_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec
from models.faces.predictions import prediction_columns
from models.reports import prediction_blocks
from models.reports.name_hashes import hash_name

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("White", "Black", "East Asian")
UNUSUAL_NAMES = ["Zoë", "two words", "a,b", 'q"x', "new\nline"]


def draw_rows(n_people: int, seed: int = 0) -> list[list[str]]:
    """Rows of a predictions.csv: people with 1 to 40 photos, which show 0, 1 or 2 faces."""
    rng, rows = np.random.default_rng(seed), []
    labels = ["White", "Black", "East_Asian", "uncertain"]
    for k, person in enumerate(UNUSUAL_NAMES + [f"p{i:03}" for i in range(n_people)]):
        chances = np.roll([0.85, 0.06, 0.06, 0.03], k % 3 if k % 3 < 2 else 0)
        for i in range(int(rng.integers(1, 41))):
            faces = int(rng.choice(3, p=[0.1, 0.8, 0.1]))
            for face in range(faces) if faces else [-1]:
                label = str(rng.choice(labels, p=chances)) if faces else ""
                rows.append([f"{person}/{i}.jpg", str(face), "ok" if faces else "no_face", label,
                             *[""] * (len(prediction_columns(CLASSES)) - 4)])
    return rows


def write_table(path: Path, rows: list[list[str]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(prediction_columns(CLASSES))
        writer.writerows(rows)
    return path


def run(table: Path, out: Path, *flags) -> list[dict[str, str]]:
    main(["--predictions", str(table), "--output_dir", str(out), *flags])
    return read(out / "people.csv")


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def count_row_by_row(rows: list[list[str]], n: int, seed: int = 0) -> dict[str, list[int]]:
    """Counts and votes of every person, by a plain loop over the rows."""
    people = defaultdict(list)
    for name, face, status, label, *_ in rows:
        if face in ("-1", "0"):
            key = int(hash_name(name.encode(), seed + 1)) >> 34
            people[name.split("/")[0]].append((key, status, label))
    faces = {person: [label for _, status, label in sorted(pictures)[:n] if status == "ok"]
             for person, pictures in people.items()}
    return {person: [len(pictures), min(n, len(pictures)), len(faces[person]),
                     *(faces[person].count(name) for name in ("White", "Black", "East_Asian"))]
            for person, pictures in people.items()}


def counts_of(people: list[dict[str, str]]) -> dict[str, list[int]]:
    return {row["id"]: [int(value) for value in list(row.values())[1:7]] for row in people}


@pytest.mark.parametrize("block", [1 << 24, 3000])
def test_streamed_votes_equal_a_row_by_row_count(tmp_path, monkeypatch, block):
    monkeypatch.setattr(prediction_blocks, "BLOCK_BYTES", block)
    rows = draw_rows(80)
    people = run(write_table(tmp_path / "p.csv", rows), tmp_path / "out", "--input_dir", str(ROOT),
                 "--max_images", "7")
    assert counts_of(people) == count_row_by_row(rows, 7)
    decided = {row["id"]: row["decision"] for row in people}
    expected = [(f"{ROOT}/{name}", decided[name.split("/")[0]]) for name, face, status, *_ in rows
                if face == "0" and status == "ok" and decided[name.split("/")[0]]]
    listed = read(tmp_path / "out" / "train_list.csv")
    assert [(row["image"], row["class"]) for row in listed] == expected
    faces = read_faceset(tmp_path / "out" / "train_list.csv")
    assert len(faces) == len(expected) and set(faces.classes) == set(decided.values()) - {""}
    for name in ("White", "Black", "East_Asian"):
        class_list = tmp_path / "out" / "estimated_ethnicities" / f"{name}.txt"
        assert class_list.read_text().splitlines() == sorted(
            person.replace("\n", "\\n") for person in decided if decided[person] == name)
    report = json.loads((tmp_path / "out" / "yield.json").read_text())
    n_dropped = sum(report["dropped_because"].values())
    assert report["kept"] + n_dropped == report["people"] == len(people)
    assert report["train_images"] == len(expected)
    assert report["kept"] == len([1 for c in decided.values() if c])
    assert (tmp_path / "out" / "votes.png").stat().st_size > 5000


def test_a_sample_does_not_depend_on_order_or_other_people(tmp_path):
    rows = draw_rows(30)
    whole = run(write_table(tmp_path / "p.csv", rows), tmp_path / "whole", "--max_images", "5")
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    table = write_table(tmp_path / "q.csv", shuffled)
    assert run(table, tmp_path / "shuffled", "--max_images", "5") == whole
    fewer = [row for row in rows if not row[0].startswith(("p00", "Zoë"))]
    expected = [row for row in whole if not row["id"].startswith(("p00", "Zoë"))]
    table = write_table(tmp_path / "r.csv", fewer)
    assert run(table, tmp_path / "fewer", "--max_images", "5") == expected
    other = run(tmp_path / "p.csv", tmp_path / "other", "--max_images", "5", "--seed", "1")
    assert counts_of(other) == count_row_by_row(rows, 5, seed=1) != counts_of(whole)


def test_every_photo_is_sampled_equally_often():
    names = [b"person/%d.jpg" % i for i in range(40)]
    drawn = np.zeros(40)
    for seed in range(500):
        keys = np.array([hash_name(name, seed + 1) for name in names])
        drawn[keys.argsort()[:10]] += 1
    assert abs(drawn - 125).max() < 5 * np.sqrt(500 * 0.25 * 0.75)


@pytest.mark.parametrize("labels, flags, decision, reason", [
    ("WWWWB", (), "White", ""), ("WWWWB", ("--strict",), "", "threshold"),
    ("WWWBB", (), "", "threshold"), ("WWWW--", (), "White", ""), ("WW----", (), "", "too few"),
    ("W", (), "", "too few"), ("---", (), "", "no face"),
    ("WWBB", ("--threshold", "0.5"), "", "two classes"), ("WWWWu", (), "White", ""),
    ("WWWuu", (), "", "threshold")])
def test_the_rule(tmp_path, labels, flags, decision, reason):
    names = {"W": "White", "B": "Black", "u": "uncertain", "-": ""}
    rows = [[f"x/{i}.jpg", "0" if names[c] else "-1", "ok" if names[c] else "unreadable", names[c],
             *[""] * (len(prediction_columns(CLASSES)) - 4)] for i, c in enumerate(labels)]
    person, = run(write_table(tmp_path / "p.csv", rows), tmp_path / "out", *flags)
    assert person["decision"] == decision
    assert reason in person["reason"] and bool(person["reason"]) == bool(reason)


def test_an_empty_class_is_reported(tmp_path, capsys):
    rows = [[f"x/{i}.jpg", "0", "ok", "White", *[""] * (len(prediction_columns(CLASSES)) - 4)]
            for i in range(3)]
    run(write_table(tmp_path / "p.csv", rows), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "no person of class Black is kept" in printed and "class White is kept" not in printed


@pytest.fixture
def people(tmp_path) -> tuple[Path, Path]:
    """A folder of people and a checkpoint of random weights."""
    folder = tmp_path / "people"
    for k, person in enumerate(["Zoë", "two words", "a,b", "one", "twin"]):
        (folder / person).mkdir(parents=True)
        for i in range(1 if person == "one" else 4):
            draw_crop(k, i).save(folder / person / f"{i}.png")
    shutil.copy(folder / "Zoë" / "1.png", folder / "twin" / "same.png")
    (folder / "broken").mkdir()
    (folder / "broken" / "x.jpg").write_text("no picture")
    (folder / "empty").mkdir()
    draw_crop(0, 0).save(folder / "stray.png")
    torch.manual_seed(0)
    spec = FaceSpec(CLASSES, TEMPLATE, WHOLE_TEMPLATE, 32)
    weights = FaceClassifier(spec).backbone.state_dict()
    save_checkpoint(tmp_path / "net.pt", Checkpoint(spec, weights))
    return folder, tmp_path / "net.pt"


FLAGS = ("--num_workers", "0", "--device", "cpu", "--max_images", "4")


def test_a_folder_gets_the_same_votes_as_a_table_of_infer(people, tmp_path, capsys):
    import infer
    folder, ckpt = people
    out = tmp_path / "out"
    main(["--input_dir", str(folder), "--output_dir", str(out), "--ckpt", str(ckpt), *FLAGS])
    printed = capsys.readouterr().out
    rows = {row["id"]: row for row in read(out / "people.csv")}
    assert list(rows) == sorted(rows, key=str.encode) and len(rows) == 7
    assert rows["empty"]["reason"] == "no picture"
    assert rows["broken"]["reason"] == "no face in any picture"
    assert "too few" in rows["one"]["reason"]
    assert rows["twin"]["n_images"] == "5" and rows["twin"]["n_used"] == "4"
    assert "1 photos lie outside any person's folder" in printed
    assert not (out / "consensus_parts").exists()
    assert all(Path(row["image"]).is_file() for row in read(out / "train_list.csv"))
    infer.main(["--input_dir", str(folder), "--output_dir", str(tmp_path / "infer"), "--ckpt",
                str(ckpt), "--num_workers", "0", "--device", "cpu"])
    table = run(tmp_path / "infer" / "predictions.csv", tmp_path / "table", "--input_dir",
                str(folder), *FLAGS)
    del rows["empty"]
    assert counts_of(table) == counts_of(list(rows.values()))


def test_people_with_identical_photos_are_reported(people, tmp_path, capsys):
    folder, ckpt = people
    main(["--input_dir", str(folder), "--output_dir", str(tmp_path / "out"), "--ckpt", str(ckpt),
          "--num_workers", "0", "--device", "cpu"])
    rows = {row["id"]: row for row in read(tmp_path / "out" / "people.csv")}
    assert "1 pictures identical to those of Zoë" in rows["twin"]["reason"]
    assert "twin" in rows["Zoë"]["reason"]
    printed = capsys.readouterr().out.replace("'twin' and 'Zoë'", "'Zoë' and 'twin'")
    assert "possibly one person: 'Zoë' and 'twin'" in printed


def test_two_ranks_write_the_results_of_one(people, tmp_path):
    folder, ckpt = people
    flags = ["--input_dir", str(folder), "--ckpt", str(ckpt), *FLAGS]
    main([*flags, "--output_dir", str(tmp_path / "one")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "facesets" / "consensus.py"), *flags,
               "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200,
                          env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("people.csv", "train_list.csv", "yield.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize("flags, named", [
    ([], "--ckpt"), (["--ckpt", "x.pt"], "--input_dir"),
    (["--ckpt", "x.pt", "--input_dir", "nowhere"], "nowhere"),
    (["--predictions", "nowhere.csv"], "nowhere.csv"),
    (["--predictions", "list.csv"], "not a predictions.csv"),
    (["--predictions", "list.csv", "--threshold", "1.5"], "--threshold"),
    (["--predictions", "list.csv", "--threshold", "1", "--strict"], "--strict"),
    (["--predictions", "list.csv", "--min_images", "21"], "--min_images"),
    (["--ckpt", "x.pt", "--input_dir", "."], "--output_dir")])
def test_wrong_flags_are_one_line(flags, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.csv").write_text("image,class\na.jpg,White\n")
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--output_dir", "out"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and named in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize("line, named", [
    ("a/x.jpg,0,ok,Green" + "," * (len(prediction_columns(CLASSES)) - 4), "Green"),
    ("a/x.jpg,0,ok", "3 cells"),
    ("x.jpg,0,ok,White" + "," * (len(prediction_columns(CLASSES)) - 4), "no person")])
def test_a_broken_table_is_one_line(tmp_path, capsys, line, named):
    (tmp_path / "p.csv").write_text(",".join(prediction_columns(CLASSES)) + f"\n{line}\n")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "p.csv", tmp_path / "out")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and named in error and error.count("\n") == 1


def test_results_are_replaced_only_with_overwrite(tmp_path, capsys):
    table = write_table(tmp_path / "p.csv", draw_rows(2))
    before = run(table, tmp_path / "out")
    with pytest.raises(SystemExit) as stopped:
        run(table, tmp_path / "out")
    assert stopped.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert run(table, tmp_path / "out", "--overwrite") == before


def test_consensus_scale_finds_no_difference_to_plain_votes(tmp_path):
    consensus_scale.main(["--rows", "6000", "--checked", "3000", "--folder", str(tmp_path), "--out",
                          str(tmp_path / "figures.json")])
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["people_checked"] > 100 and figures["people_differing"] == 0
