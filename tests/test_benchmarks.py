"""benchmarks/: plain and fast procedures agree, the figures are correct; nothing is timed."""
import csv
import json
import os
import pickle
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, draw_crop

from benchmarks import baseline, run
from benchmarks.agreement import agreement_bars, both_agreements, same_faces, same_labels
from benchmarks.entries.align import align_batches, align_each
from benchmarks.entries.classify import label_folder
from benchmarks.entries.memory import peak_of_tree
from benchmarks.entries.photos import bench_photos
from benchmarks.harness import Figure, Result, call_alone, take_turns
from benchmarks.inputs import Bench, Sizes
from models.data.decoding import decode_photo
from models.faces.align import TEMPLATE, TEMPLATE_SIZE, crop_views
from models.faces.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec
from models.faces.mtcnn import MTCNN, Faces
from models.faces.predictor import Predictor

SAMPLES = ROOT / "facesets" / "samples"
SMALL = Sizes(runs=1, chips=4, photos=4, agreed=3, crops=6, plain_crops=6, built=8, plain_built=4)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> str:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    spec = FaceSpec(("White", "Black", "Asian", "Indian"), TEMPLATE, (14, 24, 98, 108), 112)
    path = tmp_path_factory.mktemp("ckpt") / "random.pt"
    save_checkpoint(path, Checkpoint(spec, FaceClassifier(spec).backbone.state_dict()))
    return str(path)


def bench_in(folder: Path, data: Path, ckpt: str) -> Bench:
    return Bench(data, folder, ckpt, torch.device("cpu"), sizes=SMALL, quick=True)


def boxes_of(*boxes) -> Faces:
    rows = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    landmarks = rows[:, None, :2].expand(-1, 5, -1)
    return Faces(rows, torch.ones(len(rows)), landmarks, torch.zeros(len(rows)).long())


def pictures(faces_data: Path, archive: str, every: int) -> list[torch.Tensor]:
    """Every n-th picture of an archive, decoded; n = every."""
    with tarfile.open(faces_data / archive) as tar:
        members = [member for member in tar if member.isfile()]
        members.sort(key=lambda member: member.name)
        return [decode_photo(tar.extractfile(member).read())[0] for member in members[::every]]


def test_plain_and_batched_detection_agree_on_the_sample():
    photos = [decode_photo(SAMPLES / "astronaut.jpg")[0], torch.zeros(3, 15, 40, dtype=torch.uint8),
              torch.full((3, 90, 60), 128, dtype=torch.uint8)]
    agreement = same_faces(align_batches(photos, MTCNN()),
                       align_each(photos, baseline.PlainMTCNN()))
    assert agreement["faces"] == agreement["plain_faces"] == agreement["same"] >= 1
    assert agreement["landmarks_apart_px"] < 0.01


@pytest.mark.real
@pytest.mark.parametrize("archive, every, face_size", [("wild.tar", 30, 40),
                                                       ("UTKFace.tar", 3000, 20)])
def test_plain_and_batched_detection_agree_on_real_pictures(faces_data, archive, every, face_size):
    photos = pictures(faces_data, archive, every)
    agreement = same_faces(align_batches(photos, MTCNN(min_face_size=face_size)),
                       align_each(photos, baseline.PlainMTCNN(face_size)))
    assert agreement["faces"] == agreement["plain_faces"] == agreement["same"] >= 5
    assert agreement["landmarks_apart_px"] < 0.01


def test_plain_and_batched_classification_agree(tmp_path, ckpt):
    bench = bench_in(tmp_path, SAMPLES, ckpt)
    crops = tmp_path / "crops"
    crops.mkdir()
    for i in range(5):
        draw_crop(i, i, TEMPLATE_SIZE).save(crops / f"{i}.png")
    predictor = Predictor(bench.checkpoint, bench.device)
    ours = label_folder(bench, str(crops), predictor, None)
    plain = tmp_path / "plain.csv"
    baseline.label_crops(sorted(crops.iterdir()), plain, baseline.PlainClassifier(bench.checkpoint))
    agreement = same_labels(ours, plain)
    assert (agreement["files"], agreement["faces"], agreement["other_status"]) == (5, 5, 0)
    assert agreement["largest_difference"] < (0.005 if predictor.bfloat16 else 1e-4)
    assert all(bar.met for bar in agreement_bars("drawn", agreement))


def test_one_view_alone_and_in_a_batch(ckpt):
    checkpoint = load_checkpoint(ckpt)
    crops = torch.randint(0, 256, (3, 3, 112, 112), dtype=torch.uint8)
    views = crop_views(crops, checkpoint.spec.window, 112)
    predictor = Predictor(checkpoint, torch.device("cpu"))
    together = predictor.probs(views)
    plain = baseline.PlainClassifier(checkpoint)
    alone = torch.tensor([plain.probs(view) for view in views])
    torch.testing.assert_close(together, alone, rtol=0, atol=0.005 if predictor.bfloat16 else 1e-4)


@pytest.mark.real
def test_photographs_end_to_end_agree_one_by_one(tmp_path, ckpt, faces_data):
    bench = bench_in(tmp_path, faces_data, ckpt)
    agreements = bench_photos(bench).agreement
    for name, files, fewest in (("photographs", 4, 2), ("chips", 3, 3)):
        agreement = agreements[name]
        assert agreement["files"] == files and agreement["other_status"] == 0
        assert agreement["faces"] >= fewest
        assert agreement["largest_difference"] < 1e-3


@pytest.mark.real
def test_pictures_are_unpacked_evenly_and_once(tmp_path, ckpt, faces_data):
    bench = bench_in(tmp_path, faces_data, ckpt)
    chips = bench.chips(12)
    assert len(chips) == 12 == len(set(chips))
    assert {Path(chip).name.split("_")[2] for chip in chips} <= set("0123")
    assert bench.chips(12) == chips
    assert len(bench.crops(12, 56)) == 12


def test_suppression_keeps_the_best_of_overlapping_boxes():
    boxes = torch.tensor([[0., 0, 99, 99], [5, 5, 104, 104], [200, 0, 299, 99],
                          [20, 20, 40, 40]]).numpy()
    scores = torch.tensor([1., 2, 3, 0.5]).numpy()
    assert baseline.suppress(boxes, scores, 0.7).tolist() == [2, 1, 3]
    assert baseline.suppress(boxes, scores, 0.7, of_smaller=True).tolist() == [2, 1]
    assert baseline.suppress(boxes[:0], scores[:0], 0.7).tolist() == []


def test_same_faces_counts_faces_of_both_procedures():
    plain = [boxes_of((0, 0, 50, 50), (100, 0, 150, 50)), boxes_of(), boxes_of((0, 0, 9, 9))]
    ours = [boxes_of((1, 0, 51, 50)), boxes_of((0, 0, 9, 9)), boxes_of()]
    agreement = same_faces(ours, plain)
    assert (agreement["faces"], agreement["plain_faces"], agreement["same"]) == (2, 3, 1)
    assert agreement["landmarks_apart_px"] == 1


def test_same_labels_separates_near_ties_from_clear_differences(tmp_path):
    ours, plain = tmp_path / "predictions.csv", tmp_path / "plain.csv"
    rows = [("a.jpg", "ok", .70, .30), ("b.jpg", "ok", .51, .49), ("c.jpg", "ok", .8, .2),
            ("d.jpg", "no_face", "", "")]
    plain_rows = [("a.jpg", "ok", .71, .29), ("b.jpg", "ok", .49, .51), ("c.jpg", "ok", .2, .8),
                  ("d.jpg", "ok", .9, .1)]
    for path, table, head in ((ours, rows, ["face", "confidence"]), (plain, plain_rows, [])):
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "status", "p_A", "p_B", "ethnicity", *head])
            writer.writerows((*row, "", *[""] * len(head)) for row in table)
    agreement = same_labels(ours, plain)
    counts = {name: n for name, n in agreement.items() if name != "largest_difference"}
    assert counts == {"files": 4, "faces": 3, "other_status": 1, "other_label": 2, "near_ties": 1}
    assert agreement["largest_difference"] == pytest.approx(0.6)
    assert [bar.met for bar in agreement_bars("x", agreement)] == [False, False, False]


def test_two_agreements_are_combined():
    first = {"files": 4, "other_label": 1, "largest_difference": 0.1}
    both = both_agreements(first, {"files": 3, "other_label": 0, "largest_difference": 0.2})
    assert both == {"files": 7, "other_label": 1, "largest_difference": 0.2}


def test_procedures_take_turns_after_a_warm_up():
    called = []
    procedures = {name: (lambda items, name=name: called.append((name, len(items))), list(range(n)))
                  for name, n in (("fast", 6), ("slow", 3))}
    fast, slow = take_turns("case", procedures, 3, torch.device("cpu"), warm=2)
    assert called == [("fast", 2), ("slow", 2)] + [("fast", 6), ("slow", 3)] * 3
    assert (fast.n, slow.n, len(fast.seconds)) == (6, 3, 3)
    assert Figure("case", "fast", 6, [5.0, 1.0, 2.0]).rate == 3.0


def test_peak_memory_counts_a_command_and_its_children():
    code = "x = bytearray(80_000_000); import time; time.sleep(0.6)"
    nested = ("import subprocess, sys; x = bytearray(60_000_000); "
              f"subprocess.run([sys.executable, '-c', {code!r}])")
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is read from Linux's /proc")
    assert 133 < peak_of_tree([sys.executable, "-c", nested]) < 200


def test_main_prints_bars_and_writes_json(tmp_path, ckpt, monkeypatch, capsys):
    for archive in ("UTKFace.tar", "wild.tar"):
        tarfile.open(tmp_path / archive, "w").close()
    figures = [Figure("case", "ours", 8, [1.0, 2.0, 3.0]), Figure("case", "plain", 2, [4.0])]
    result = Result(figures)
    result.compare("ratio", *figures, 10.0)
    monkeypatch.setitem(run.ENTRIES, "start", lambda bench: result)
    # A lambda cannot be sent to another process.
    monkeypatch.setattr(run, "call_alone", lambda function, *args: function(*args))
    out = tmp_path / "results.json"
    run.main(["--only", "start", "--data", str(tmp_path), "--ckpt", ckpt, "--out", str(out)])
    assert "| ratio | at least 10 | 8 | **no** |" in capsys.readouterr().out
    content = json.loads(out.read_text())
    assert content["results"]["start"]["bars"][0]["met"] is False
    assert content["results"]["start"]["figures"][0]["per_second"] == 4.0
    assert {"machine", "versions", "size", "command"} <= set(content)


def test_an_entry_runs_in_another_process(tmp_path, ckpt):
    bench = bench_in(tmp_path, tmp_path, ckpt)
    assert call_alone(os.getpid) != os.getpid()
    sent = pickle.loads(pickle.dumps(bench))
    assert sent.checkpoint.spec == bench.checkpoint.spec and sent.sizes == bench.sizes


def test_missing_data_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--data", str(tmp_path)])
    assert end.value.code == 2 and "--data" in capsys.readouterr().err
