"""train.py: the laws of its steps, and small runs of the command."""
import copy
import csv
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, draw_crop
from PIL import Image
from torchvision.models import ResNet18_Weights, resnet18

import train
from models.data import splits
from models.data.faceset import read_faceset
from models.faces.align import TEMPLATE, crop_views
from models.faces.checkpoint import Checkpoint, load_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec
from models.training import (
    augmentation,
    auxiliary,
    crops,
    distillation,
    epochs,
    kernels,
    sampling,
    state,
)
from models.training.crops import Crops
from models.training.flags import choose_settings
from models.training.process import Process
from models.training.settings import RECIPES, TrainingSettings

WINDOW = (14, 24, 98, 108)
SMALL = TrainingSettings(window=WINDOW, input_sizes=((0.5, 32), (1.0, 40)), warmup_epochs=1,
                         ema_decay=0.9)
CPU = Process(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def small_recipe(monkeypatch):
    """The default recipe at small input sizes, in float32 without the trial of formats."""
    monkeypatch.setitem(RECIPES, "default", SMALL)
    monkeypatch.setattr(state, "choose_amp_dtype", lambda *_: None)
    monkeypatch.setattr(train, "RESUME_INTERVAL", 0)


def write_manifest(root) -> None:
    """The builder's manifest.csv of a drawn set: ages and genders, two of them unknown."""
    people = [(0, 0), (4, 1), (5, 0), (70, 1), (116, 0), ("", ""), (30, 3), (26, 1), (25, 0),
              (9, 0)]
    rows = ["file,split,label,class,age,gender,aligned_by,duplicate_group"]
    rows += [f"train/{label}/{label}_{i}.png,train,{label},x,{age},{gender},mtcnn,"
             for label in range(4) for i, (age, gender) in enumerate(people)]
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")


def run(*argv: str) -> None:
    train.main([*argv, "--device", "cpu", "--workers", "0"])


def weights(path) -> dict:
    return load_checkpoint(path).weights


def test_plain_views_are_the_window_up_to_shift_and_flip():
    crops = torch.full((3, 3, 112, 112), 90, dtype=torch.uint8)
    views = augmentation.random_views(crops, WINDOW, 48, True, torch.Generator().manual_seed(0))
    assert views.shape == (3, 3, 48, 48) and views.min() >= 0 and views.max() <= 255
    plain = augmentation.random_views(crops, WINDOW, 48, False, torch.Generator().manual_seed(0))
    assert torch.allclose(plain, torch.full_like(plain, 90.0))


def test_each_picture_gets_its_own_draw_and_a_seed_repeats_it():
    crops = torch.randint(0, 256, (1, 3, 112, 112), dtype=torch.uint8).expand(4, -1, -1, -1)
    first, again = (augmentation.random_views(crops, WINDOW, 48, True,
                                              torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert (first[0] - first[1]).abs().mean() > 5


def test_more_pictures_than_are_warped_at_a_time_keep_their_order():
    crops = torch.arange(2 * augmentation.CPU_CHUNK + 3,
                         dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 112, 112)
    views = augmentation.random_views(crops, WINDOW, 8, False, torch.Generator().manual_seed(0))
    assert torch.allclose(views, crops[:, :, :8, :8].float())


def test_a_quarter_of_the_pictures_lose_a_rectangle_of_one_colour():
    generator = torch.Generator().manual_seed(0)
    black = torch.zeros(400, 3, 40, 40)
    erased = augmentation.random_erase(black.clone(), generator)
    holes = (erased.amax((1, 2, 3)) > 0).nonzero()[:, 0]
    assert 70 < len(holes) < 130
    for view in erased[holes[:20]]:
        hole = view.sum(0) > 0
        height, width = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == height * width and 3 <= height <= 21 and 3 <= width <= 21
        assert len(view[:, hole].unique(dim=1).T) == 1
    # of one picture, none is chosen most of the time
    for _ in range(10):
        assert augmentation.random_erase(black[:1].clone(), generator).shape == (1, 3, 40, 40)


def test_a_warp_without_change_is_crop_views(monkeypatch):
    monkeypatch.setattr(augmentation, "uniform", lambda n, *_: torch.zeros(n))
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(size))          # no flip
    crops = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    views = augmentation.random_views(crops, WINDOW, 84, False, torch.Generator())
    assert (views.round() - crop_views(crops, WINDOW, 84).float()).abs().max() <= 1


def test_learning_rate_warms_up_and_ends_at_nothing():
    rates = [epochs.learning_rate(step, 10, replace(SMALL, epochs=5)) for step in range(50)]
    assert rates[0] == pytest.approx(0.0001, rel=1e-3)
    assert max(rates) <= 0.001 and rates[-1] < 0.00001
    published = RECIPES["published"]
    assert epochs.learning_rate(19 * 10, 10, published) == 0.001
    assert epochs.learning_rate(20 * 10, 10, published) == pytest.approx(0.0001)


def test_mix_up_keeps_the_sum_of_targets():
    views, targets = torch.rand(4, 3, 8, 8), torch.eye(4)
    mixed, mixed_targets = augmentation.mix_up(views, targets, 0.7)
    assert torch.allclose(mixed[1], 0.7 * views[1] + 0.3 * views[0])
    assert torch.allclose(mixed_targets.sum(1), torch.ones(4))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 2, 0)])
def test_the_gradient_by_taps_is_that_of_the_convolution(kernel, stride, padding):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, 8, 7, 6, generator=generator, requires_grad=True)
    weight = torch.randn(12, 8, kernel, kernel, generator=generator, requires_grad=True)
    geometry = (stride, stride), (padding, padding)
    plain = torch.nn.functional.conv2d(maps, weight, None, *geometry)
    ours = kernels.WeightGradientByTaps.apply(maps, weight, *geometry)
    assert torch.equal(plain, ours)
    towards = torch.randn(plain.shape, generator=generator)
    for expected, found in zip(torch.autograd.grad(plain, (maps, weight), towards),
                               torch.autograd.grad(ours, (maps, weight), towards), strict=True):
        assert torch.allclose(expected, found, atol=1e-4)


def test_age_and_gender_come_from_the_manifest_and_the_unknown_is_zeros(drawn_set):
    write_manifest(drawn_set)
    faces = read_faceset(drawn_set, "train")
    ages, genders = auxiliary.aux_targets(faces).split((9, 2), 1)
    assert ages[:10].sum(1).tolist() == [1, 1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert ages[:10].argmax(1).tolist() == [0, 0, 1, 8, 8, 0, 4, 4, 3, 1] and len(ages) == 40
    assert genders[:4].argmax(1).tolist() == [0, 1, 0, 1] and genders[5:7].sum() == 0
    (drawn_set / "manifest.csv").unlink()
    assert not auxiliary.aux_targets(faces).any()


def test_what_is_unknown_moves_nothing_and_the_classes_count_once():
    recipe, generator = SMALL, torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 15, generator=generator).requires_grad_()
    targets = torch.cat([torch.eye(4)[[0, 1, 2, 3, 0, 1]], torch.zeros(6, 11)], 1)
    alone = torch.nn.functional.cross_entropy(outputs[:, :4], targets[:, :4],
                                              label_smoothing=recipe.label_smoothing)
    loss = epochs.training_loss(outputs, targets, 4, recipe)
    assert torch.allclose(loss, alone)
    assert not torch.autograd.grad(loss, outputs)[0][:, 4:].any()
    # the age band of one picture
    targets[2, 4 + 3] = 1
    assert torch.allclose(epochs.training_loss(outputs[:, :4], targets[:, :4], 4,
                                               replace(recipe, aux_weight=0.0)), alone)
    more = epochs.training_loss(outputs, targets, 4, recipe)
    smooth = 0.95 * targets[2, 4:13] + 0.05 / 9
    assert torch.allclose(more - loss, -0.2 * (smooth * outputs[2, 4:13].log_softmax(0)).sum() / 6,
                          atol=1e-6)


def test_the_wide_head_keeps_the_classes_and_is_not_saved(drawn_set, tmp_path, small_recipe):
    model = FaceClassifier(FaceSpec(("a", "b", "c", "d"), TEMPLATE, WINDOW, 40))
    views = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    before = model.eval().backbone.fc.weight.clone()
    said = model(views)
    auxiliary.add_aux_heads(model)
    assert torch.allclose(model(views)[:, :4], said, atol=1e-6) and model(views).shape == (2, 15)
    assert torch.equal(auxiliary.class_weights(model)["fc.weight"], before)
    run("--data", str(drawn_set), "--out", str(tmp_path / "a.pt"), "--epochs", "1", "--vis_dir",
        str(tmp_path))
    assert weights(tmp_path / "a.pt")["fc.weight"].shape == (4, 512)


def test_average_follows_the_weights():
    average, model = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    torch.nn.init.constant_(model.weight, 3.0)
    state.update_ema(average, model, 0.9, step=10_001)
    # its turn comes in every fourth step
    assert torch.equal(average.weight, torch.ones(2))
    state.update_ema(average, model, 0.9, step=10_000)
    assert torch.allclose(average.weight, torch.full((2,), 3 - 2 * 0.9 ** 4))


def test_persons_are_never_divided(tmp_path):
    for label, name in enumerate(("Black", "White")):
        for person in range(12):
            folder = tmp_path / name / f"p{person}"
            folder.mkdir(parents=True)
            for i in range(3):
                draw_crop(label, i, 24).save(folder / f"{i}.png")
    faces = read_faceset(tmp_path)
    first, held = splits.hold_out(faces, 0.25, seed=1)
    people = [{file.rsplit("/", 1)[0] for file in part.files} for part in (first, held)]
    assert not people[0] & people[1] and len(people[1]) == 6 and len(held) == 18
    assert set(held.labels.tolist()) == {0, 1}


def test_a_csv_list_keeps_people_together_and_no_picture_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(splits, "group_duplicate_files", None)
    rows = [(f"/people/{label}{person}/{i}.jpg", label) for label in "AB" for person in range(9)
            for i in range(3)]
    # one person, two labels
    rows += [("/people/both/0.jpg", "A"), ("/people/both/1.jpg", "B")]
    (tmp_path / "list.csv").write_text("image,class\n" + "".join(
        f"{image},{label}\n" for image, label in rows))
    first, held = splits.hold_out(read_faceset(tmp_path / "list.csv"), 0.5, seed=2)
    people = [{file.split("/")[2] for file in part.files} for part in (first, held)]
    assert not people[0] & people[1] and "both" in people[0] and len(held) == 2 * 4 * 3


@pytest.fixture
def repeated_set(tmp_path):
    """Two classes of 12 pictures, some resized or copied; unreadable: one; two labels: one."""
    root = tmp_path / "repeated"
    for label, name in enumerate(("Black", "White")):
        (root / name).mkdir(parents=True)
        for i in range(12):
            blots = np.random.default_rng([label, i]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(blots).resize((64, 64), Image.Resampling.BICUBIC)
            picture.save(root / name / f"{i:02d}.png")
            if i < 5:
                picture.resize((48, 48)).save(root / name / f"again_{i:02d}.jpg")
            elif i < 7:
                picture.save(root / name / f"again_{i:02d}.png")
        (root / name / "broken.png").write_bytes(b"no picture")
    Image.open(root / "Black" / "11.png").save(root / "White" / "disputed_b.png")
    return root


def test_what_cannot_be_read_and_what_shows_no_face_is_told(repeated_set, capsys):
    faces = read_faceset(repeated_set)
    loaded = crops.load_crops([faces], ["train the set"], crops.CropLoading(40, num_workers=0), CPU)
    said = capsys.readouterr().out
    assert said.count("left out: ") == 2 and "left out: Black/broken.png: unreadable" in said
    assert f"train the set: no face detected in {len(faces) - 2} of {len(faces)} pictures" in said
    assert len(loaded.pixels) == len(loaded.paths) == len(faces) - 2
    assert all(crop.any() for crop in loaded.pixels)


def test_equal_pictures_are_on_one_side(repeated_set):
    faces = read_faceset(repeated_set)
    for seed in range(6):
        first, held = splits.hold_out(faces, 0.4, seed)
        sides = [{file[:6] + file[-6:-4] for file in part.files} for part in (first, held)]
        assert not sides[0] & sides[1] and sorted(first.files + held.files) == sorted(faces.files)
        # of two labels: never validated on
        assert {"Black/11.png", "White/disputed_b.png"} <= set(first.files)
        assert set(held.labels.tolist()) == {0, 1}
    backwards = faces.subset(list(range(len(faces)))[::-1])
    assert sorted(splits.hold_out(backwards, 0.4, 5)[1].files) == sorted(held.files)


def test_other_ranks_take_the_split_of_the_first(repeated_set, monkeypatch):
    faces, sent = read_faceset(repeated_set), []
    monkeypatch.setattr(splits, "broadcast_from_rank0",
                        lambda groups: sent.append(groups) or sent[0])
    first = splits.hold_out(faces, 0.4, 1, rank=0)
    # they look at no picture
    monkeypatch.setattr(splits, "group_duplicate_files", None)
    other = splits.hold_out(faces, 0.4, 1, rank=1)
    assert [part.files for part in first] == [part.files for part in other] and sent[1] is None


def batches_of(n: int, rank: int) -> list:
    """The batches of 5 of a rank of two, of n pictures whose colour is their label."""
    pixels = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    data = Crops(pixels, torch.arange(n), torch.eye(n), [""] * n)
    settings = replace(RECIPES["published"], batch_size=5)
    rows = sampling.epoch_rows(n, 3, settings.seed, Process(rank, 2, CPU.device))
    return list(sampling.augmented_batches(data, rows, 4, settings, CPU.device, torch.Generator()))


@pytest.mark.parametrize("viewed", [1, 10])
def test_every_picture_once_an_epoch_over_two_ranks(viewed, monkeypatch):
    # a batch of 5 at a time, or two as on a GPU
    monkeypatch.setitem(sampling.AUGMENTED_AT_ONCE, "cpu", viewed)
    seen = []
    for rank in range(2):
        batches = batches_of(20, rank)
        assert [len(views) for views, _ in batches] == [5, 5]
        for views, targets in batches:
            assert torch.allclose(views[:, 0, 0, 0], targets.argmax(1).float(), atol=1e-4)
            seen += targets.argmax(1).tolist()
    assert sorted(seen) == list(range(20))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2023 * 1000 + 3)).tolist()
    assert seen == order[::2] + order[1::2]


def test_a_last_picture_alone_is_no_batch():
    """Batch norm has no statistics of one."""
    assert [len(views) for views, _ in batches_of(22, 0)] == [5, 5]


@pytest.mark.parametrize("every", [0, math.inf])
def test_resume_gives_the_run_that_never_stopped(every, drawn_set, tmp_path, small_recipe,
                                                 monkeypatch):
    """From the epoch before the interrupt, or from the first, all that is saved of short epochs."""
    monkeypatch.setattr(train, "RESUME_INTERVAL", every)
    write_manifest(drawn_set)
    run("--data", str(drawn_set), "--out", str(tmp_path / "a.pt"), "--epochs", "4", "--vis_dir",
        str(tmp_path))
    straight = (tmp_path / "a.log.jsonl").read_text().splitlines()
    assert (tmp_path / "a_validation_loss.png").stat().st_size > 5000

    real = train.finish_epoch

    def killed_after_two(training, *rest):
        real(training, *rest)
        if training.epoch == 2:
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "finish_epoch", killed_after_two)
    common = ["--data", str(drawn_set), "--out", str(tmp_path / "b.pt"), "--epochs", "4",
              "--vis_dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        run(*common)
    monkeypatch.setattr(train, "finish_epoch", real)
    monkeypatch.setitem(RECIPES, "default", replace(SMALL, aux_weight=0.0))
    # an older train.py's default
    with pytest.raises(SystemExit) as refused:
        run(*common, "--resume")
    assert refused.value.code == 2
    monkeypatch.setitem(RECIPES, "default", SMALL)
    run(*common, "--resume")
    for key, value in weights(tmp_path / "a.pt").items():
        assert torch.equal(value, weights(tmp_path / "b.pt")[key]), key
    resumed = (tmp_path / "b.log.jsonl").read_text().splitlines()
    assert [json.loads(line)["train_loss"] for line in resumed] == [json.loads(line)["train_loss"]
                                                                    for line in straight]
    assert not (tmp_path / "b.resume.pt").exists()


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_capturing_a_network_leaves_no_trace(monkeypatch):
    """The capture's effect on batch norm is undone; the network itself stands in for its graphs."""
    whole = []

    def capture(model, samples):
        model(*samples)
        model.forward = lambda views: (whole.append(len(views))
                                       or FaceClassifier.forward(model, views))
        return model
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    model = FaceClassifier(FaceSpec(("a", "b"), TEMPLATE, WINDOW, 40))
    before = copy.deepcopy(model.state_dict())
    network = kernels.CapturedNetwork(model, 40, torch.bfloat16, 6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    views = torch.rand(6, 3, 40, 40) * 255
    # a short batch is none of the captured ones
    for n in (6, 4):
        network(views[:n]).sum().backward()
    assert whole == [6] and model.backbone.bn1.num_batches_tracked == 2
    assert all(weight.grad is not None for weight in model.parameters())


def test_it_learns_and_the_checkpoint_says_everything(drawn_set, tmp_path, small_recipe):
    run("--data", str(drawn_set), "--out", str(tmp_path / "a.pt"), "--epochs", "6", "--batch_size",
        "16",
        "--vis_dir", str(tmp_path))
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint.spec == FaceSpec(("White", "Black", "Asian", "Indian"), TEMPLATE, WINDOW, 40)
    assert checkpoint.calibration.val_labels.shape == (16,)
    rows = [json.loads(line) for line in (tmp_path / "a.log.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[0]["input_size"] == 32 and rows[-1]["input_size"] == 40
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert checkpoint.metadata["best"]["val_accuracy"] == max(r["val_accuracy"] for r in rows
                                                              if r["input_size"] == 40)


def test_initialising_from_a_checkpoint(drawn_set, tmp_path, small_recipe):
    run("--data", str(drawn_set), "--out", str(tmp_path / "a.pt"), "--epochs", "1", "--vis_dir",
        str(tmp_path))
    model = FaceClassifier(load_checkpoint(tmp_path / "a.pt").spec)
    state.initialise(model, str(tmp_path / "a.pt"))
    assert torch.equal(model.backbone.fc.weight, weights(tmp_path / "a.pt")["fc.weight"])


def test_a_head_of_other_classes_is_not_taken_over(drawn_set, tmp_path, small_recipe):
    run("--data", str(drawn_set), "--out", str(tmp_path / "a.pt"), "--epochs", "1", "--vis_dir",
        str(tmp_path))
    start = load_checkpoint(tmp_path / "a.pt")
    model = FaceClassifier(replace(start.spec, classes=start.spec.classes[::-1]))
    state.initialise(model, str(tmp_path / "a.pt"))
    assert torch.equal(model.backbone.conv1.weight, start.weights["conv1.weight"])
    assert not torch.equal(model.backbone.fc.weight, start.weights["fc.weight"])


def test_initialising_from_imagenet_takes_all_but_the_head(monkeypatch):
    """torchvision's file has no batch counters and a head of a thousand classes."""
    file = {key: value for key, value in resnet18(num_classes=1000).state_dict().items()
            if "num_batches" not in key}
    monkeypatch.setattr(type(ResNet18_Weights.IMAGENET1K_V1), "get_state_dict",
                        lambda *args, **kwargs: file)
    model = FaceClassifier(FaceSpec(("a", "b"), TEMPLATE, WINDOW, 40))
    head = model.backbone.fc.weight.clone()
    state.initialise(model, "imagenet")
    assert torch.equal(model.backbone.layer4[1].bn2.running_var, file["layer4.1.bn2.running_var"])
    assert torch.equal(model.backbone.conv1.weight, file["conv1.weight"])
    assert torch.equal(model.backbone.fc.weight, head)


def write_opinions(path, pictures) -> torch.Tensor:
    """A table in another order of pictures and classes; its probabilities (n, 4) in their order."""
    probs = torch.eye(4)[torch.arange(len(pictures)) % 4] * 0.6 + 0.1
    rows = [[*map(str, row[::-1]), picture]
            for picture, row in zip(pictures, probs.tolist(), strict=True)]
    names = ["p_Indian", "p_Asian", "p_Black", "p_White", "image"]
    path.write_text("\n".join(map(",".join, [names, *rows[::-1]])) + "\n")
    return probs


def test_teachers_make_up_a_share_of_the_targets(drawn_set, tmp_path, small_recipe, monkeypatch):
    """A checkpoint and a table together: the geometric mean of what they say."""
    write_manifest(drawn_set)
    common = ["--data", str(drawn_set), "--vis_dir", str(tmp_path)]
    run(*common, "--out", str(tmp_path / "teacher.pt"), "--epochs", "6", "--batch_size", "16")
    seen, real = [], train.run_epochs
    monkeypatch.setattr(train, "run_epochs", lambda run, training, crops, val: (
        seen.append(crops), real(run, training, crops, val)))
    faces = read_faceset(drawn_set, "train")
    # relative to the table
    table = write_opinions(drawn_set / "said.csv", faces.files)
    run(*common, "--out", str(tmp_path / "pupil.pt"), "--epochs", "2", "--teacher",
        str(tmp_path / "teacher.pt"),
        str(drawn_set / "said.csv"))
    one_hot = torch.nn.functional.one_hot(seen[0].labels, 4).float()
    said = distillation.teacher_probabilities(load_checkpoint(tmp_path / "teacher.pt"),
                                              seen[0].pixels, CPU)
    both = (said * table).sqrt()
    both = both / both.sum(1, keepdim=True)
    assert torch.allclose(seen[0].targets[:, :4], one_hot.lerp(both, SMALL.teacher_share),
                          atol=1e-5)
    assert torch.equal(seen[0].targets[:, 4:], auxiliary.aux_targets(faces))
    assert (said - one_hot).abs().max() > 0.01


def test_a_network_that_saw_other_pictures_of_the_set_is_warned_of(drawn_set, tmp_path,
                                                                   small_recipe, capsys):
    common = ["--data", str(drawn_set), "--vis_dir", str(tmp_path), "--epochs", "1"]
    run(*common, "--out", str(tmp_path / "first.pt"))
    run(*common, "--out", str(tmp_path / "same.pt"), "--init", str(tmp_path / "first.pt"))
    assert "warning" not in capsys.readouterr().out
    (drawn_set / "train" / "0" / "0_0.png").rename(drawn_set / "val" / "0" / "0_0_moved.png")
    run(*common, "--out", str(tmp_path / "other.pt"), "--init", str(tmp_path / "first.pt"))
    warning = f"warning: --init {tmp_path / 'first.pt'} was trained on another selection"
    assert warning in capsys.readouterr().out


def test_a_teacher_sees_its_own_window_and_template(monkeypatch):
    """Views of a teacher on another template are those that evaluate.py shows it."""
    spec = FaceSpec(("a", "b"), tuple((x + 7, y - 5) for x, y in TEMPLATE), WINDOW, 40)
    torch.manual_seed(0)
    teacher = Checkpoint(spec, FaceClassifier(spec).backbone.state_dict())
    shown = []
    monkeypatch.setattr(distillation, "Predictor", lambda *_: SimpleNamespace(
        probs=lambda views, flip: shown.append(views) or torch.full((len(views), 2), 0.5)))
    pixels = torch.stack([torch.from_numpy(np.array(draw_crop(k, k))).permute(2, 0, 1)
                          for k in range(4)])
    distillation.teacher_probabilities(teacher, pixels, CPU)
    assert torch.equal(shown[0], crop_views(pixels, WINDOW, 40, spec.template))
    assert not torch.equal(shown[0], crop_views(pixels, WINDOW, 40))


def test_small_maps_in_bfloat16_give_the_same_gradients():
    torch.manual_seed(0)
    plain = FaceClassifier(FaceSpec(("a", "b"), TEMPLATE, WINDOW,
                                    48)).to(memory_format=torch.channels_last)
    fast = copy.deepcopy(plain)
    kernels.replace_small_map_convolutions(fast)
    assert fast.state_dict().keys() == plain.state_dict().keys()
    assert sum(isinstance(module, kernels.SmallMapConv2d) for module in fast.modules()) == 5
    views = torch.randint(0, 256, (8, 3, 48, 48), dtype=torch.uint8)
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16):
            model(views).float().square().sum().backward()
    pairs = zip(plain.backbone.layer4.named_parameters(), fast.backbone.layer4.parameters(),
                strict=True)
    for (name, expected), found in pairs:
        assert found.grad.dtype == torch.float32
        assert (found.grad - expected.grad).norm() < 0.02 * expected.grad.norm(), name


def test_a_teacher_of_other_classes_is_an_error(drawn_set, tmp_path, small_recipe, capsys):
    run("--data", str(drawn_set), "--out", str(tmp_path / "a.pt"), "--epochs", "1", "--vis_dir",
        str(tmp_path))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run("--data", str(drawn_set), "--class_map", "White=Pale", "--out", str(tmp_path / "b.pt"),
            "--teacher",
            str(tmp_path / "a.pt"))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "its classes are White, Black, Asian, Indian; --data has Pale" in error


@pytest.mark.parametrize("content, error", [
    (None, "No such file"), ("image,label\n", "it has no column p_Asian"),
    ("image,p_White,p_Black,p_Asian,p_Indian\nx.png,1,0,0\n", "it cannot be read"),
    ("image,p_White,p_Black,p_Asian,p_Indian\nx.png,nan,0,0,1\n",
     "line 2 has no image, or its prob"),
    ("image,p_White,p_Black,p_Asian,p_Indian\nx.png,1,0,0,0\n", "it has no row for"),
])
def test_a_table_that_cannot_teach_is_one_line(drawn_set, tmp_path, small_recipe, capsys, content,
                                               error):
    table = tmp_path / "said.csv"
    if content:
        table.write_text(content)
    with pytest.raises(SystemExit) as stop:
        run("--data", str(drawn_set), "--out", str(tmp_path / "b.pt"), "--vis_dir", str(tmp_path),
            "--teacher",
            str(table))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and f"--teacher {table}: {error}" in last
    assert not (tmp_path / "b.pt").exists()


def test_another_flag_is_not_mixed_into_a_resumed_run(drawn_set, tmp_path, small_recipe,
                                                      monkeypatch, capsys):
    def killed(training, *rest):
        real(training, *rest)
        raise KeyboardInterrupt
    real = train.finish_epoch
    monkeypatch.setattr(train, "finish_epoch", killed)
    common = ["--data", str(drawn_set), "--out", str(tmp_path / "b.pt"), "--vis_dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        run(*common)
    with pytest.raises(SystemExit):
        run(*common, "--resume", "--lr", "0.01")
    assert "begun with another --lr (0.001, now 0.01)" in capsys.readouterr().err
    state = torch.load(tmp_path / "b.resume.pt", weights_only=True)
    torch.save(state | {"world_size": 2}, tmp_path / "b.resume.pt")
    with pytest.raises(SystemExit):
        run(*common, "--resume")
    assert "begun with another number of processes (2, now 1)" in capsys.readouterr().err


def test_impatience_before_the_final_size_still_gives_a_checkpoint(drawn_set, tmp_path,
                                                                   small_recipe):
    run("--data", str(drawn_set), "--out", str(tmp_path / "a.pt"), "--epochs", "6", "--patience",
        "1", "--vis_dir",
        str(tmp_path))
    assert load_checkpoint(tmp_path / "a.pt").metadata["epoch"] >= 4


def test_classes_that_the_first_set_lacks_are_an_error(drawn_set, tmp_path, capsys):
    (tmp_path / "more" / "Martian").mkdir(parents=True)
    (tmp_path / "more" / "White").mkdir()
    for label, name in enumerate(("Martian", "White")):
        draw_crop(label, 1).save(tmp_path / "more" / name / "a.png")
    with pytest.raises(SystemExit):
        run("--data", str(drawn_set), str(tmp_path / "more"), "--out", str(tmp_path / "a.pt"))
    assert "folder Martian matches no class" in capsys.readouterr().err


def test_every_hyperparameter_is_a_flag_and_a_recipe_is_its_default():
    """Each field of the settings can be set alone; the others keep the recipe's values."""
    values = {"window": "20,30,100,110", "input_sizes": "48:0.4,64", "schedule": "step",
              "choose": "last", "calibrate_on": "mixture",
              "teacher_missing": "skip", "freeze": "layer1"}
    for recipe, defaults in RECIPES.items():
        for name, value in asdict(defaults).items():
            flags = [f"--{name}", values.get(name, "1")]
            if name == "augment":
                flags = ["--no-augment" if value else "--augment"]
            _, args = train.parse_args(["--recipe", recipe, *flags])
            settings = choose_settings(args.recipe, vars(args))
            assert replace(settings, **{name: value}) == defaults
            assert getattr(settings, name) == getattr(args, name) is not None
    assert settings.input_sizes == ((1.0, 104),)


def test_input_sizes_of_the_epochs():
    _, args = train.parse_args(["--input_sizes", "72:0.2,88:0.5,104", "--window", "16,30,96,110"])
    assert choose_settings("default", vars(args)) == RECIPES["default"]
    sizes = [RECIPES["default"].input_size_at(epoch) for epoch in range(30)]
    assert sizes == [72] * 6 + [88] * 9 + [104] * 15
    assert [replace(SMALL, epochs=1).input_size_at(0)] == [40]


def test_commands_of_the_experiments_are_valid():
    with open(ROOT / "visualizations" / "experiments.csv", newline="") as file:
        commands = [row["command"] for row in csv.DictReader(file)]
    commands = [shlex.split(command) for command in commands
                if command.startswith("python train.py ")]
    assert len(commands) > 10
    for words in commands:
        train.parse_args(["cpu" if word == "cuda" else word for word in words[2:]])


@pytest.mark.parametrize(("argv", "said"), [
    (["--data", "nowhere"], "--data: nowhere: no such folder"),
    (["--init", "nowhere.pt", "--data", "DRAWN"], "--init nowhere.pt: no such file"),
    (["--teacher", "nowhere.pt", "--data", "DRAWN"], "--teacher nowhere.pt: no such file"),
    (["--teacher", "OUT", "--data", "DRAWN"], "--out would replace it"),
    (["--resume", "--data", "DRAWN"], "--resume: there is no"),
    (["--epochs", "0"], "--epochs: expects an integer of at least 1"),
    (["--window", "16,30,96,100"], "--window: expects the edges X0,Y0,X1,Y1 of a square"),
    (["--input_sizes", "72:0.5,88:0.2,104"], "--input_sizes: expects SIZE:SHARE"),
    (["--weight_decay", "-1"], "--weight_decay: expects a number of at least 0"),
    (["--lr", "minus"], "--lr: expects a number above 0"),
    (["--data", "DRAWN", "--class_map", "White=Black,Asian"], "--class_map: expects FROM=TO"),
])
def test_mistakes_are_one_line_and_exit_2(argv, said, drawn_set, tmp_path, capsys):
    out = str(tmp_path / "c.pt")
    argv = [{"DRAWN": str(drawn_set), "OUT": out}.get(word, word) for word in argv] + ["--out", out]
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and error.count("\n") == 1


def test_an_earlier_checkpoint_is_not_lost(drawn_set, tmp_path, capsys):
    (tmp_path / "a.pt").write_bytes(b"precious")
    with pytest.raises(SystemExit):
        run("--data", str(drawn_set), "--out", str(tmp_path / "a.pt"))
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "a.pt").read_bytes() == b"precious"


def test_a_loss_that_is_not_finite_stops_the_run(drawn_set, tmp_path, small_recipe, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--data", str(drawn_set), "--out", str(tmp_path / "a.pt"), "--lr", "1e30", "--vis_dir",
            str(tmp_path))
    assert stop.value.code == 1 and "not finite" in capsys.readouterr().err


def test_two_ranks_by_torchrun(drawn_set, tmp_path):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(ROOT / "train.py"),
         "--data", str(drawn_set), str(drawn_set / "train"), "--out", str(tmp_path / "a.pt"),
         "--epochs",
         "1", "--device", "cpu", "--workers", "0", "--vis_dir", str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=170)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "a.log.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and math.isfinite(rows[0]["train_loss"])
    assert load_checkpoint(tmp_path / "a.pt").calibration is not None
