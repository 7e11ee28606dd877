"""Published Lightning checkpoints, written by a real Trainer: their logits equal torchvision's."""
import argparse
import json
import os
import shutil
from pathlib import Path

import lightning
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, draw_crop
from PIL import Image
from torchvision import transforms
from torchvision.models import resnet18

import evaluate
import infer
from models.faces.align import (
    CHIP_LANDMARKS,
    TEMPLATE,
    WHOLE_TEMPLATE,
    align_faces,
    crop_views,
    fit_similarity,
)
from models.faces.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec
from models.faces.mtcnn import MTCNN
from models.faces.pipeline import FacePolicy, ViewSpec, align_photos
from models.faces.predictions import read_predictions
from models.running import cli

SAMPLES = ROOT / "facesets" / "samples"
DOCUMENTED = {
    "model": transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    ),
    "resnet": transforms.Compose(
        [
            transforms.Resize(128),
            transforms.CenterCrop(104),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    ),
}
INPUT_SIZES = {"model": 112, "resnet": 200}


class Trap:
    """An object that creates a file when its pickle is executed."""

    def __init__(self, path: Path, call):
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (f"touch {self.path}" if self.call is os.system else str(self.path),)

    def __deepcopy__(self, memo):
        return self


def touch(path: str) -> None:
    Path(path).touch()


class Published(lightning.LightningModule):
    """A ResNet-18 under the name `part`, with hyperparameters of many kinds."""

    def __init__(self, part: str, args: argparse.Namespace, trap, outputs: int = 4):
        super().__init__()
        self.save_hyperparameters()
        setattr(self, part, resnet18(num_classes=outputs))

    def network(self):
        return getattr(self, self.hparams.part)

    def training_step(self, batch, index):
        return F.cross_entropy(self.network()(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


def train_and_save(module: Published, path: Path) -> None:
    """One training step of a Trainer, which then writes its checkpoint."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = torch.randn(8, 3, 32, 32), torch.arange(8) % module.hparams.outputs
    trainer.fit(
        module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch), batch_size=8)
    )
    with (
        torch.no_grad()
    ):  # subtracts the mean feature in the last layer, so that predictions differ
        network = module.network().eval()
        last, network.fc = network.fc, torch.nn.Identity()
        features = network(torch.stack([picture_of(module.hparams.part, i)[1] for i in range(4)]))
        last.weight *= 20
        last.bias.copy_(-last.weight @ features.mean(0))
        network.fc = last
    trainer.save_checkpoint(path)


def picture_of(part: str, label: int, seed: int = 0) -> tuple[Image.Image, torch.Tensor]:
    """An aligned picture of the size that the layout documents, and its documented input (3, S, S).

    A chip has no noise at the finest scale, where two ways of reducing it differ.
    """
    size = INPUT_SIZES[part]
    if size == 112:
        picture = draw_crop(label, seed)
    else:
        picture = draw_crop(label, seed, size // 4).resize((size, size))
    return picture, DOCUMENTED[part](picture)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, tuple[Path, torch.nn.Module]]:
    """For both layouts: the Lightning file and its network."""
    folder, files = tmp_path_factory.mktemp("lightning"), {}
    for part in DOCUMENTED:
        torch.manual_seed(0)
        module = Published(
            part, argparse.Namespace(lr=0.1, data=Path("/faces")), Trap(folder / "executed", touch)
        )
        train_and_save(module, folder / f"{part}.ckpt")
        files[part] = folder / f"{part}.ckpt", module.network()
    return files


@pytest.fixture(autouse=True)
def no_code_is_executed(published):
    """No test may execute code of a checkpoint."""
    yield
    assert not (published["model"][0].parent / "executed").exists()


@torch.inference_mode()
def logits_of(network, inputs: torch.Tensor) -> torch.Tensor:
    return network(inputs)


def bytes_of(picture: Image.Image) -> torch.Tensor:
    return transforms.functional.pil_to_tensor(picture)[None]


def face_chip() -> Image.Image:
    """200 x 200 pixels of the sample photograph."""
    with Image.open(SAMPLES / "astronaut.jpg") as photo:
        width, height = photo.size
        return photo.convert("RGB").resize((512, 512 * height // width)).crop((130, 0, 330, 200))


# ----------------------------------------------------------------------------------- what is loaded
@pytest.mark.parametrize("part, classes", [("model", ("African", "Asian", "Caucasian", "Indian")),
                                           ("resnet", ("White", "Black", "Asian", "Indian"))])
def test_logits_of_a_layout_equal_those_of_its_documented_input(published, part, classes):
    path, network = published[part]
    with pytest.raises(Exception, match="Weights only"):
        torch.load(path, weights_only=True)                     # the fixture has refused objects
    checkpoint = load_checkpoint(path)
    spec, classifier = checkpoint.spec, checkpoint.classifier(torch.device("cpu"))
    assert (
        spec.classes == classes
        and checkpoint.calibration is None
        and checkpoint.metadata == {"epoch": 1}
    )
    assert checkpoint.weights.keys() == network.state_dict().keys()
    pictures, inputs = zip(*(picture_of(part, label) for label in range(4)), strict=True)
    reference = logits_of(network, torch.stack(inputs))
    shown = TEMPLATE if part == "model" else spec.template
    views = crop_views(
        torch.cat([bytes_of(picture) for picture in pictures]),
        spec.window,
        spec.input_size,
        spec.template,
        shown,
    )
    logits = logits_of(classifier, views)
    exact = logits_of(classifier, (torch.stack(inputs) + 1) * 127.5)
    assert torch.allclose(exact, reference, atol=1e-3)
    assert torch.allclose(
        logits, reference, atol=1e-3 if part == "model" else 0.1 * reference.std().item()
    )
    assert len(set(reference.argmax(1).tolist())) > 1


def test_three_ways_from_a_chip_to_the_network_agree(published):
    """As a chip, aligned by the mean landmarks, and from a crop of the ArcFace template."""
    spec, chip = load_checkpoint(published["resnet"][0]).spec, face_chip()
    reference = (DOCUMENTED["resnet"](chip) + 1) * 127.5
    pixels = bytes_of(chip)
    face = (
        pixels,
        torch.tensor([[200, 200]]),
        torch.zeros(1, dtype=torch.int64),
        torch.tensor([CHIP_LANDMARKS]),
    )
    direct = crop_views(pixels, spec.window, spec.input_size, spec.template, spec.template)[
        0
    ].float()
    aligned = align_faces(*face, spec.window, spec.input_size, spec.template)[0].float()
    assert (direct - aligned).abs().max() <= 1
    assert (
        direct - reference
    ).abs().mean() < 2  # grey levels: two ways of reducing 200 to 128 pixels
    crop = align_faces(*face, WHOLE_TEMPLATE, 448)
    by_crop = crop_views(crop, spec.window, spec.input_size, spec.template)[0].float()
    assert (by_crop - direct).abs().mean() < 5  # no similarity maps one template to the other
    wrong = crop_views(pixels, spec.window, spec.input_size, spec.template)[0].float()
    assert (wrong - direct).abs().mean() > 10  # a chip is not a crop of the ArcFace template


def test_chips_of_a_labelled_set_are_chips_unless_it_is_aligned(published, tmp_path):
    spec, chip = load_checkpoint(published["resnet"][0]).spec, face_chip()
    chip.save(tmp_path / "chip.png")
    for is_aligned, crop_template in ((False, spec.template), (True, TEMPLATE)):
        view = ViewSpec(spec.window, spec.input_size, spec.template,
                        None if is_aligned else spec.chip_geometry)
        policy = FacePolicy("central", "mean_landmarks", "never" if is_aligned else "auto")
        batch, = align_photos([str(tmp_path / "chip.png")], MTCNN(), view, policy)
        expected = crop_views(bytes_of(chip), spec.window, spec.input_size, spec.template,
                              crop_template)
        row, = batch.rows
        assert row.aligned_by == "crop" and torch.equal(batch.views, expected)


def test_the_chip_template_is_scaled_to_112_pixels(published):
    spec = load_checkpoint(published["resnet"][0]).spec
    M = fit_similarity(torch.tensor([CHIP_LANDMARKS]), torch.tensor(spec.template))[0]
    assert torch.allclose(M[:, :2], torch.eye(2) * 112 / 200, atol=1e-5)
    corners = (M[:, :2] @ torch.tensor([[-0.5, 199.5], [-0.5, 199.5]]) + M[:, 2:]).tolist()
    assert corners == [pytest.approx([-0.5, 111.5], abs=1e-4)] * 2       # the edges of the chip


def test_a_spec_with_chips_is_saved_and_loaded(published, tmp_path):
    checkpoint = load_checkpoint(published["resnet"][0])
    save_checkpoint(tmp_path / "own.pt", checkpoint)
    loaded = load_checkpoint(tmp_path / "own.pt")
    assert loaded.spec == checkpoint.spec
    assert loaded.spec.chip_geometry == (200, checkpoint.spec.template)
    assert checkpoint.is_lightning and not loaded.is_lightning


def test_the_classifier_keeps_its_own_copy_of_the_weights(published):
    checkpoint = load_checkpoint(published["model"][0])
    before = {key: value.clone() for key, value in checkpoint.weights.items()}
    classifier = checkpoint.classifier(torch.device("cpu")).train()
    classifier(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)).sum().backward()
    torch.optim.SGD(classifier.parameters(), lr=1.0).step()
    assert all(torch.equal(checkpoint.weights[key], value) for key, value in before.items())


# ----------------------------------------------------------------------------------------- refusals
def test_objects_that_cannot_be_ignored_are_explained_in_a_line(tmp_path):
    trap = Trap(tmp_path / "executed", os.system)
    torch.save(
        {
            "state_dict": resnet18(num_classes=4).state_dict(prefix="model."),
            "hyper_parameters": trap,
        },
        tmp_path / "trap.ckpt",
    )
    with pytest.raises(
        CheckpointError, match="if you trust the file, save its weights: python -c"
    ) as refusal:
        load_checkpoint(tmp_path / "trap.ckpt")
    assert "\n" not in str(refusal.value) and not trap.path.exists()


def test_objects_are_ignored_only_in_lightning_files(tmp_path):
    spec = FaceSpec(("a", "b"), TEMPLATE, WHOLE_TEMPLATE, 32)
    save_checkpoint(
        tmp_path / "own.pt",
        Checkpoint(
            spec,
            FaceClassifier(spec).backbone.state_dict(),
            metadata={"args": Trap(tmp_path / "executed", touch)},
        ),
    )
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint .*touch"):
        load_checkpoint(tmp_path / "own.pt")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content, found",
    [
        (
            {"state_dict": {"backbone.conv1.weight": torch.zeros(1)}},
            "found a state_dict of backbone.conv1.weight",
        ),
        ({"state_dict": {}}, "found a state_dict of no keys"),
        (
            {"conv1.weight": 1, "bn1.weight": 2, "bn1.bias": 3, "fc.bias": 4},
            r"found conv1.weight, bn1.weight, bn1.bias, ... \(4 keys\)",
        ),
        ({"format": 7}, "found format 7"),
        ([1, 2], "found a list"),
    ],
)
def test_an_unknown_layout_is_refused_with_the_expected_ones(tmp_path, content, found):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=found) as refusal:
        load_checkpoint(tmp_path / "other.ckpt")
    for expected in (
        "format 1",
        "model.conv1.weight ... model.fc.bias",
        "resnet.conv1.weight ... resnet.fc.bias",
    ):
        assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_network_of_another_shape_is_refused(tmp_path):
    content = {"state_dict": resnet18(num_classes=7).state_dict(prefix="model.")}
    torch.save(content, tmp_path / "seven.ckpt")
    with pytest.raises(CheckpointError, match=r"fc.weight is \(7, 512\), expected \(4, 512\)"):
        load_checkpoint(tmp_path / "seven.ckpt")
    del content["state_dict"]["model.bn1.bias"]
    torch.save(content, tmp_path / "less.ckpt")
    with pytest.raises(CheckpointError, match="has no bn1.bias"):
        load_checkpoint(tmp_path / "less.ckpt")
    weights = resnet18(num_classes=4).state_dict(prefix="model.") | {"loss.weight": torch.ones(4)}
    torch.save({"state_dict": weights}, tmp_path / "more.ckpt")
    with pytest.raises(CheckpointError, match="unknown loss.weight"):
        load_checkpoint(tmp_path / "more.ckpt")


# ----------------------------------------------------------------------------------------- commands
def label(path: Path, source: Path, out: Path, *flags) -> dict[str, dict[str, str]]:
    """Rows of predictions.csv by file."""
    infer.main(
        [
            "--ckpt",
            str(path),
            "--input_dir",
            str(source),
            "--output_dir",
            str(out),
            "--device",
            "cpu",
            "--num_workers",
            "0",
            *flags,
        ]
    )
    return {row["file"]: row for row in read_predictions(out / "predictions.csv")}


@pytest.mark.parametrize("part", DOCUMENTED)
def test_infer_labels_the_sample_and_finished_pictures(published, tmp_path, capsys, part):
    path, network = published[part]
    source = tmp_path / "in"
    shutil.copytree(SAMPLES, source)
    names = load_checkpoint(path).spec.classes
    picture, inputs = picture_of(part, 2)
    picture.save(source / "finished.png")
    rows = label(path, source, tmp_path / "out", "--min_confidence", "0.0")
    assert {row["status"] for row in rows.values()} == {"ok"} and rows["astronaut.jpg"]["x1"]
    assert rows["finished.png"]["x1"] == "" and {row["set"] for row in rows.values()} == {""}
    reference = logits_of(network, inputs[None]).softmax(1)[0]
    assert [float(rows["finished.png"][f"p_{name}"]) for name in names] == pytest.approx(
        reference.tolist(), abs=0.05
    )
    assert rows["finished.png"]["ethnicity"] == names[reference.argmax()]
    (source / "astronaut.jpg").unlink()
    unaligned = label(path, source, tmp_path / "never", "--align", "never", "--visualize")[
        "finished.png"
    ]
    assert float(unaligned["confidence"]) == pytest.approx(
        float(rows["finished.png"]["confidence"]), abs=1e-5
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        label(path, source, tmp_path / "doubt", "--target_error", "0.1")
    line = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and line.count("\n") == 1
        and "--target_error" in line
        and "not calibrated" in line
    )


@pytest.fixture
def utk_named(tmp_path) -> Path:
    """Aligned crops in folders White, Black, Asian and Indian."""
    for number, name in enumerate(("White", "Black", "Asian", "Indian")):
        (tmp_path / "named" / name).mkdir(parents=True)
        for i in range(3):
            picture_of("model", number, i)[0].save(tmp_path / "named" / name / f"{i}.png")
    return tmp_path / "named"


def figures_of(path: Path, data: Path, out: Path, *flags) -> dict:
    evaluate.main(
        [
            "--ckpt",
            str(path),
            "--data",
            str(data),
            "--out_dir",
            str(out),
            "--device",
            "cpu",
            "--workers",
            "0",
            "--name",
            "named",
            *flags,
        ]
    )
    return json.loads((out / "named_metrics.json").read_text())


def test_class_map_reports_across_vocabularies(published, utk_named, tmp_path, monkeypatch, capsys):
    path, network = published["model"]
    expected = dict.fromkeys([(a, b) for a in ("White", "Black", "Asian", "Indian")
                            for b in ("Black", "Asian", "White", "Indian")], 0)
    order = (
        "Black",
        "Asian",
        "White",
        "Indian",
    )  # African, Asian, Caucasian, Indian of the network
    for number, name in enumerate(("White", "Black", "Asian", "Indian")):
        for i in range(3):
            prediction = logits_of(network, picture_of("model", number, i)[1][None]).argmax().item()
            expected[name, order[prediction]] += 1
    with pytest.raises(SystemExit):
        figures_of(path, utk_named, tmp_path / "out")
    assert (
        "matches no class of the checkpoint (African, Asian, Caucasian, Indian)"
        in capsys.readouterr().err
    )
    first = figures_of(
        path, utk_named, tmp_path / "out", "--class_map", "Caucasian=White,African=Black"
    )
    assert "no calibration" in capsys.readouterr().out
    assert first["classes"] == list(order)
    assert first["confusion_matrix"] == [[expected[a, b] for b in order] for a in order]
    for name in ("draw_confusion", "draw_reliability", "draw_risk"):
        monkeypatch.setattr(evaluate, name, lambda *args: None)
    second = figures_of(
        path, utk_named, tmp_path / "out", "--class_map", "White=Caucasian,Black=African"
    )
    assert second["classes"] == ["African", "Asian", "Caucasian", "Indian"]
    assert second["confusion_matrix"] == first["confusion_matrix"]


def test_class_map_does_not_rename_a_class_to_an_existing_one():
    classes = ("White", "Black", "East_Asian", "Southeast_Asian")
    assert evaluate.report_classes(classes, None) == classes
    assert evaluate.report_classes(classes, {"White": "Black", "Black": "White"}) == classes
    assert (
        evaluate.report_classes(classes, {"East_Asian": "Asian", "Southeast_Asian": "Asian"})
        == classes
    )
    assert evaluate.report_classes(classes, {"Caucasian": "White", "Black": "African"})[:2] == (
        "White",
        "African",
    )


def test_calibrating_leaves_the_lightning_file_alone(published, utk_named, tmp_path, monkeypatch):
    path = Path(shutil.copy(published["model"][0], tmp_path / "theirs.ckpt"))
    before = path.read_bytes()
    for name in ("draw_confusion", "draw_reliability", "draw_risk"):
        monkeypatch.setattr(evaluate, name, lambda *args: None)
    shutil.copytree(utk_named, tmp_path / "split" / "val")
    figures_of(path, tmp_path / "split", tmp_path / "out", "--calibrate", "--class_map",
               "Caucasian=White,African=Black")
    calibrated = load_checkpoint(tmp_path / "theirs_calibrated.pt")
    assert path.read_bytes() == before and len(calibrated.calibration.val_labels) == 12
    assert calibrated.spec == load_checkpoint(path).spec


@pytest.mark.parametrize("command", [infer, evaluate])
def test_the_default_checkpoint_is_found_from_any_folder(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = (
        infer.build_parser().parse_args(["--output_dir", "out"])
        if command is infer
        else evaluate.parse_args([])[1]
    )
    assert Path(args.ckpt).parent == ROOT / "checkpoints" and Path(args.ckpt).is_file()
    with pytest.raises(SystemExit):
        command.main(["--help"])
    help_text = capsys.readouterr().out
    assert cli.CHECKPOINT_NAME in " ".join(help_text.split()) and str(ROOT) not in help_text


def test_a_file_of_another_kind_is_refused_with_a_reason():
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint \(\w.*\)"):
        load_checkpoint(ROOT / "README.md")
