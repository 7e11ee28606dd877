import csv
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

import evaluate
from models.data.faceset import faceset_digest
from models.faces.align import TEMPLATE
from models.faces.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec
from models.faces.predictor import Predictor
from models.reports.evaluation import age_band
from models.reports.metrics import calibration_error, proper_scores, reliability_bins, risk_coverage

CLASSES = ("White", "Black", "Asian", "Indian")
# close enough to be mistaken
COLOURS = ((145, 110, 110), (110, 145, 110), (110, 110, 145), (138, 138, 100))
MANIFEST = ("file", "split", "label", "class", "age", "gender", "aligned_by", "duplicate_group")


def write_crop(path, label, rng, side=48):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = rng.normal(0, 50, (side // 8, side // 8, 3)).repeat(8, 0).repeat(8, 1)
    pixels = np.array(COLOURS[label]) + noise
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A set as utk_dataset_builder.py writes it: 10 pictures of each class in val and in test."""
    root, rng = tmp_path_factory.mktemp("built") / "utk_races", np.random.default_rng(0)
    rows = []
    for split in ("val", "test"):
        for label, name in enumerate(CLASSES):
            for i in range(10):
                file = f"{split}/{label}/{i}.png"
                write_crop(root / file, label, rng)
                rows.append((file, split, label, name, 7 * i, i % 2,
                             "template" if i == 9 else "mtcnn",
                             {0: "1", 1: f"{split}2"}.get(i, "")))
    with open(root / "manifest.csv", "w", newline="") as file:
        csv.writer(file).writerows([MANIFEST, *rows])
    (root / "faceset.json").write_text(json.dumps({"classes": CLASSES, "aligned": True}))
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that separates the four colours fairly well by its last layer."""
    torch.manual_seed(0)
    spec = FaceSpec(CLASSES, TEMPLATE, (14.0, 22.0, 98.0, 106.0), 32)
    classifier = FaceClassifier(spec).eval()
    rng, views, labels = np.random.default_rng(1), [], []
    folder = tmp_path_factory.mktemp("colours")
    for label in range(4):
        for i in range(25):
            write_crop(folder / f"{label}_{i}.png", label, rng, 32)
            pixels = np.array(Image.open(folder / f"{label}_{i}.png"))
            views.append(torch.from_numpy(pixels).permute(2, 0, 1))
            labels.append(label)
    body, classifier.backbone.fc = classifier.backbone.fc, torch.nn.Identity()
    with torch.inference_mode():
        features = classifier.backbone(torch.stack(views) / 127.5 - 1).double()
    target = torch.nn.functional.one_hot(torch.tensor(labels), 4).double()
    mean, scale = features.mean(0), features.std() * 10
    design = (features - mean) / scale
    weight = torch.linalg.solve(design.T @ design + 0.01 * torch.eye(512).double(),
                                design.T @ (target - 0.25))
    body.weight.data = 3 * (weight / scale).T.float()
    body.bias.data = -3 * (mean / scale @ weight).float()
    classifier.backbone.fc = body
    path = folder / "colours.pt"
    save_checkpoint(path, Checkpoint(spec, classifier.backbone.state_dict(), None, {"epoch": 7}))
    return path


def run(built, trained, out, *more):
    evaluate.main(["--data", str(built), "--ckpt", str(trained), "--output_dir", str(out),
                   "--num_workers", "0", "--device", "cpu", *more])


def error_of(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        evaluate.main([*argv, "--num_workers", "0", "--device", "cpu"])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1
    return message


def test_names_with_dollars_are_drawn_as_they_stand(built, trained, tmp_path):
    run(built, trained, tmp_path, "--class_map", "White=$x_{$,Black=a$b$")
    figures = json.loads((tmp_path / "test_metrics.json").read_text())
    assert figures["classes"][:2] == ["$x_{$", "a$b$"]
    assert Image.open(tmp_path / "test_confusion_matrix.png").width > 400


def test_report_holds_what_scikit_learn_finds_in_the_saved_probs(built, trained, tmp_path, capsys):
    run(built, trained, tmp_path, "--save_probs", "--through_112")
    saved = np.load(tmp_path / "test_probs.npz")
    figures = json.loads((tmp_path / "test_metrics.json").read_text())
    labels, predictions = saved["labels"], saved["probs"].argmax(1)
    assert figures["n"] == 40 == len(saved["files"])
    assert 0.3 < figures["accuracy"] < 1
    assert figures["accuracy"] == pytest.approx((labels == predictions).mean())
    confusion = sklearn.metrics.confusion_matrix(labels, predictions)
    assert figures["confusion_matrix"] == confusion.tolist()
    macro_f1 = sklearn.metrics.f1_score(labels, predictions, average="macro")
    assert figures["macro_f1"] == pytest.approx(macro_f1)
    assert set(figures["per_class"]) == set(CLASSES)
    assert set(figures["per_class"]["White"]) == {"precision", "recall", "f1", "n"}
    assert figures["accuracy_ci95"][0] < figures["accuracy"] < figures["accuracy_ci95"][1]
    log_loss = sklearn.metrics.log_loss(labels, saved["probs"])
    assert figures["calibration"]["before"]["nll"] == pytest.approx(log_loss, rel=1e-4)
    assert figures["through_112"]["n"] == 40 and 0 <= figures["through_112"]["mcnemar_p"] <= 1
    for name in ("confusion_matrix", "confusion_matrix_percentage", "reliability", "risk_coverage",
                 "age_gender"):
        assert Image.open(tmp_path / f"test_{name}.png").width > 400
    said = capsys.readouterr().out
    first_line = f"Accuracy of the model on the test set: {100 * figures['accuracy']:.3f} %"
    assert first_line in said.splitlines()
    assert "no calibration" in said


def test_two_checkpoints_are_compared_on_the_same_pictures(built, trained, tmp_path, capsys):
    run(built, trained, tmp_path, "--save_probs")
    path = tmp_path / "test_probs.npz"
    saved = dict(np.load(path))
    right = saved["probs"].argmax(1) == saved["labels"]
    turned = right.nonzero()[0][:7]
    # seven right answers made wrong
    saved["probs"][turned] = np.roll(saved["probs"][turned], 1, axis=1)
    order = np.arange(40)[::-1]
    np.savez(tmp_path / "other.npz", **{key: value[order] for key, value in saved.items()})
    capsys.readouterr()
    run(built, trained, tmp_path, "--against", str(tmp_path / "other.npz"))
    found = json.loads((tmp_path / "test_metrics.json").read_text())["against"]
    assert (found["right_here_alone"], found["right_there_alone"]) == (7, 0)
    assert found["accuracy"] == pytest.approx((right.sum() - 7) / 40)
    assert found["mcnemar_p"] == 2 / 2 ** 7
    assert "McNemar p 0.0156" in capsys.readouterr().out
    np.savez(tmp_path / "fewer.npz", **{key: value[1:] for key, value in saved.items()})
    np.savez(tmp_path / "labels.npz", **saved | {"labels": saved["labels"][::-1]})
    np.savez(tmp_path / "nothing.npz", a=1)
    (tmp_path / "text.npz").write_text("no")
    for name in ("fewer", "labels", "nothing", "text", "missing"):
        with pytest.raises(SystemExit) as stopped:
            run(built, trained, tmp_path, "--against", str(tmp_path / f"{name}.npz"))
        assert stopped.value.code == 2
        assert f"--against {tmp_path / name}.npz: " in capsys.readouterr().err


def test_manifest_says_which_pictures_count_apart(built, trained, tmp_path):
    run(built, trained, tmp_path)
    figures = json.loads((tmp_path / "test_metrics.json").read_text())
    assert (figures["with_detected_face"]["n"], figures["without_detected_face"]["n"]) == (36, 4)
    assert figures["without_twin"]["n"] == 36  # group 1 lies in both splits, test2 in this alone
    assert sum(row["n"] for row in figures["age_gender"]) == 40
    hits = sum(row["accuracy"] * row["n"] for row in figures["age_gender"])
    assert hits / 40 == pytest.approx(figures["accuracy"])
    table = list(csv.DictReader((tmp_path / "test_age_gender.csv").open(newline="")))
    for row, cells in zip(figures["age_gender"], table, strict=True):
        assert [row[key] for key in ("class", "age_band", "gender")] == list(cells.values())[:3]
        low, accuracy, high = (float(cells[f"accuracy{end}"]) for end in ("_low", "", "_high"))
        assert low <= accuracy <= high
        gap = row["mean_confidence"] - row["accuracy"]
        assert row["calibration_gap"] == pytest.approx(gap)
        assert row["calibration_gap_ci95"][0] <= gap <= row["calibration_gap_ci95"][1]
        assert row["abstained"] is None and cells["abstained"] == ""  # no calibration, no threshold


def test_names_and_order_of_folders_do_not_matter(built, trained, tmp_path, capsys):
    run(built, trained, tmp_path)
    named = tmp_path / "named"
    for label, name in enumerate(("Caucasian", "African", "Asian", "Indian")):
        shutil.copytree(built / "test" / str(label), named / name)
    (named / "faceset.json").write_text(json.dumps({"aligned": True}))
    (named / "Indian" / "broken.png").write_bytes(b"no picture")
    run(named, trained, tmp_path, "--class_map", "Caucasian=White,African=Black", "--name", "named")
    first, second = (json.loads((tmp_path / f"{name}_metrics.json").read_text())
                     for name in ("test", "named"))
    assert first["confusion_matrix"] == second["confusion_matrix"]
    assert len(second["unreadable"]) == 1
    assert second["unreadable"][0].startswith("Indian/broken.png: ")
    assert "1 unreadable" in capsys.readouterr().out
    summary = {row["name"]: row
               for row in csv.DictReader((tmp_path / "summary.csv").open(newline=""))}
    assert set(summary) == {"named", "test"} and summary["named"]["without twin"] == ""
    for name, figures in (("test", first), ("named", second)):
        assert summary[name]["accuracy"] == f"{100 * figures['accuracy']:.2f}"
        least = min(row["recall"] for row in figures["per_class"].values())
        assert summary[name]["its recall"] == f"{100 * least:.1f}"
    run(named, trained, tmp_path, "--class_map", "Caucasian=White,African=Black")
    assert "Replaced the test figures of utk_races with colours.pt" in capsys.readouterr().out


def test_calibrate_adds_to_the_checkpoint_and_changes_nothing_else(built, trained, tmp_path):
    path = shutil.copy(trained, tmp_path / "copy.pt")
    before = load_checkpoint(path)
    run(built, path, tmp_path, "--calibrate")
    after = load_checkpoint(path)
    assert (after.spec, after.metadata) == (before.spec, before.metadata)
    assert all(torch.equal(after.weights[key], value) for key, value in before.weights.items())
    assert after.calibration.val_labels.tolist() == [label for label in range(4) for _ in range(10)]
    scores = json.loads((tmp_path / "val_metrics.json").read_text())["calibration"]
    assert scores["after"]["nll"] < scores["before"]["nll"]

    run(built, path, tmp_path)
    figures = json.loads((tmp_path / "test_metrics.json").read_text())
    assert set(figures["abstention"]["per_class"]) == set(CLASSES)
    assert 0 <= figures["abstention"]["abstained"] <= 1
    unanswered = sum(row["abstained"] * row["n"] for row in figures["age_gender"])
    assert unanswered == pytest.approx(figures["abstention"]["abstained"] * figures["n"])
    for scores in figures["calibration"].values():
        assert scores["ece_ci95"][0] <= scores["ece_debiased"] <= scores["ece_ci95"][1]
    assert 0.7 < figures["abstention"]["set_coverage"] <= 1

    table = tmp_path / "predictions.csv"
    probs = after.calibration.val_probs.tolist()
    header = ["file", "face", "status", "ethnicity", "confidence",
              *(f"p_{name}" for name in CLASSES)]
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([header, *([f"{i}.jpg", 0, "ok", "", "", *row]
                                              for i, row in enumerate(probs)),
                                    ["none.jpg", -1, "no_face", *[""] * 6]])
    evaluate.main(["--shares", str(table), "--ckpt", str(path), "--out_dir", str(tmp_path)])
    report = json.loads((tmp_path / "shares.json").read_text())["all"]
    assert report["n"] == 40 and set(report["methods"]) == {"raw", "adjusted", "probabilistic"}
    assert (tmp_path / "shares.png").stat().st_size > 1000
    # validation's own composition comes back
    assert report["methods"][report["default"]]["shares"] == pytest.approx([0.25] * 4, abs=1e-6)


def test_another_split_than_the_one_trained_on_is_said(built, trained, tmp_path, capsys):
    data, told = shutil.copytree(built, tmp_path / "data"), load_checkpoint(trained)
    shutil.copytree(data / "val", data / "train")
    assert not evaluate.is_other_split(told, str(data), {})  # no record of its training pictures
    told.metadata["train_files"] = {"data": faceset_digest([f"{i}.png" for i in range(10)] * 4)}
    assert not evaluate.is_other_split(told, str(data), {})
    (data / "train" / "0" / "0.png").rename(data / "train" / "0" / "new.png")
    assert evaluate.is_other_split(told, str(data), {})
    save_checkpoint(tmp_path / "told.pt", told)
    run(data, tmp_path / "told.pt", tmp_path / "out")
    assert "warning: the checkpoint was trained on another split, " in capsys.readouterr().out
    before = (tmp_path / "told.pt").read_bytes()
    with pytest.raises(SystemExit):
        run(data, tmp_path / "told.pt", tmp_path / "out", "--calibrate")
    assert "--calibrate: the checkpoint was trained on another split, " in capsys.readouterr().err
    assert (tmp_path / "told.pt").read_bytes() == before


def test_no_file_of_an_earlier_report_stays_beside_another(built, trained, tmp_path):
    run(built, trained, tmp_path, "--save_probs")
    assert (tmp_path / "test_probs.npz").exists() and (tmp_path / "test_age_gender.png").exists()
    plain = shutil.copytree(built / "test", tmp_path / "plain")
    (plain / "faceset.json").write_text(json.dumps({"classes": CLASSES, "aligned": True}))
    run(plain, trained, tmp_path)
    assert not list(tmp_path.glob("test_age_gender.*"))
    assert not (tmp_path / "test_probs.npz").exists()
    assert json.loads((tmp_path / "test_metrics.json").read_text())["split"] == ""


def test_mistakes_are_one_line_that_names_the_flag(built, trained, tmp_path, capsys):
    data = ["--data", str(built)]
    ckpt = ["--ckpt", str(trained), "--out_dir", str(tmp_path / "out")]
    martian = tmp_path / "martian"
    for label, name in enumerate((*CLASSES[:3], "Martian")):
        shutil.copytree(built / "test" / str(label), martian / name)
    assert "folder Martian matches no class" in error_of(capsys, "--data", str(martian), *ckpt)
    assert "--ckpt" in error_of(capsys, *data, "--ckpt", str(tmp_path / "absent.pt"))
    assert "--data" in error_of(capsys, "--data", str(tmp_path / "absent"), *ckpt)
    assert "no dev folder" in error_of(capsys, *data, *ckpt, "--split", "dev")
    assert "--calibrate" in error_of(capsys, *data, *ckpt, "--calibrate", "--split", "test")
    assert "--name" in error_of(capsys, *data, *ckpt, "--name", "a/b")
    assert "has no calibration" in error_of(capsys, "--shares", "absent.csv", *ckpt)
    assert "expects --ckpt" in error_of(capsys, "--shares", "absent.csv", "--out_dir",
                                        str(tmp_path / "out"))
    own = str(tmp_path / "out" / "test_probs.npz")
    assert "would replace the file" in error_of(capsys, *data, *ckpt, "--against", own)
    assert "--output_dir" in error_of(capsys, *data, "--ckpt", str(trained), "--out_dir",
                                      str(trained))
    assert not list(tmp_path.glob("out/*"))


def test_flip_averages_both_sides_alike(trained):
    predictor = Predictor(load_checkpoint(trained), torch.device("cpu"))
    views = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    averaged = predictor.logits(views, flip=True)
    assert torch.allclose(averaged, predictor.logits(views.flip(-1), flip=True), atol=1e-5)
    assert not torch.allclose(averaged, predictor.logits(views), atol=1e-5)


def test_recompressed_crops_differ_as_little_as_quality_95_allows():
    ramp = torch.arange(112).mul(2).to(torch.uint8).expand(2, 3, 112, 112)
    assert (evaluate.recompress(ramp).int() - ramp.int()).abs().max() <= 4


def test_age_bands_cover_all_ages():
    assert [age_band(age) for age in (0, 9, 10, 39, 40, 59, 60, 116)] \
        == ["0-9", "0-9", "10-19", "30-39", "40-59", "40-59", "60+", "60+"]


def test_calibration_error_of_a_perfect_forecast_is_noise_that_debiasing_takes_off():
    generator = torch.Generator().manual_seed(0)
    stated = torch.rand(20000, generator=generator)
    bins = reliability_bins(stated, torch.rand(20000, generator=generator) < stated)
    assert bins[:, 2].sum() == 20000 and (bins[1:, 0] > bins[:-1, 0]).all()
    ece, debiased = calibration_error(bins)
    assert debiased < ece < 0.02 and debiased < 0.006
    hits = torch.rand(20000, generator=generator) < stated / 2
    ece, debiased = calibration_error(reliability_bins(stated, hits))
    assert ece == pytest.approx(0.25, abs=0.01) and debiased == pytest.approx(ece, abs=0.003)
    assert calibration_error(reliability_bins(torch.zeros(0),
                                              torch.zeros(0, dtype=torch.bool))) == (0, 0)


def test_proper_scores_and_risk_by_hand():
    nll, brier = proper_scores(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0]))
    assert nll.tolist() == pytest.approx([np.log(2), 0])
    assert brier.tolist() == pytest.approx([0.5, 0])
    risk = risk_coverage(torch.tensor([0.2, 0.9, 0.5]), torch.tensor([False, True, False]))
    assert risk.tolist() == pytest.approx([0, 1 / 2, 2 / 3])


@pytest.mark.real
def test_real_photographs_are_aligned_on_the_fly_and_none_is_lost(faces_data, trained, tmp_path,
                                                                  capsys):
    kept = {}
    with tarfile.open(faces_data / "FairFace_val.tar") as tar:
        for member in tar:
            name = member.name.split("/")[-2] if member.isfile() else ""
            if name and kept.setdefault(name, 0) < 4:
                kept[name] += 1
                target = tmp_path / "FairFace_val" / name / member.name.split("/")[-1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(tar.extractfile(member).read())
    run(tmp_path / "FairFace_val", trained, tmp_path, "--class_map",
        "East_Asian=Asian,Southeast_Asian=Asian",
        "--name", "fairface_val")
    figures = json.loads((tmp_path / "fairface_val_metrics.json").read_text())
    assert figures["n"] == 20
    assert [row["n"] for row in figures["per_class"].values()] == [4, 4, 8, 4]
    assert figures["with_detected_face"]["n"] >= 14
    assert re.search(r"^Accuracy of the model on the fairface_val set: \d+\.\d{3} %$",
                     capsys.readouterr().out, re.M)
