"""Checkpoints: FaceSpec, weights and calibration in one file, which is all that labelling needs.

    format        1
    spec          classes, template, window, input_size, mean, std, chip_size
    arch          "resnet18"
    model         float16 weights with torchvision's names
    calibration   temperature, curve, bias, val_probs, val_labels; or None
    epoch, best (its metrics), args, recipe, versions: information about the training
    train_files   a digest of the file names of each training set

A checkpoint holds only tensors and plain Python values, so it loads with weights_only=True.
Lightning checkpoints of the two PUBLISHED layouts are read too, without calibration; other objects
in them are ignored and their code is never executed.
"""
import math
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from models.faces.align import CHIP_LANDMARKS, TEMPLATE, TEMPLATE_SIZE, WHOLE_TEMPLATE, Template
from models.faces.calibration import Calibration
from models.faces.classifier import FaceClassifier, FaceSpec, empty_resnet18
from models.running.files import atomic_write

FORMAT = 1
CHIP_SIZE = 200
# Mean landmarks of a 200 x 200 UTKFace chip, scaled to a template of 112 pixels: the whole chip is
# WHOLE_TEMPLATE.
CHIP_TEMPLATE: Template = tuple(((x + 0.5) * TEMPLATE_SIZE / CHIP_SIZE - 0.5,
                                 (y + 0.5) * TEMPLATE_SIZE / CHIP_SIZE - 0.5)
                                for x, y in CHIP_LANDMARKS)
# Prefix of the keys in a published Lightning checkpoint -> FaceSpec of its network. The input of
# "model." is the whole crop. The input of "resnet." is the central 104 pixels of the chip resized
# to 128, which are 10.5 to 101.5 in template pixels.
PUBLISHED = {
    "model.": FaceSpec(classes=("African", "Asian", "Caucasian", "Indian"), template=TEMPLATE,
                       window=WHOLE_TEMPLATE, input_size=112),
    "resnet.": FaceSpec(classes=("White", "Black", "Asian", "Indian"), template=CHIP_TEMPLATE,
                        window=(10.5, 10.5, 101.5, 101.5), input_size=104, chip_size=CHIP_SIZE),
}
LAYOUTS = " or ".join(f"{prefix}conv1.weight ... {prefix}fc.bias" for prefix in PUBLISHED)
EXPECTED = (f"expected format {FORMAT} of this project, or a Lightning checkpoint with a "
            f"state_dict of {LAYOUTS}")
RESAVE = ("has objects that are not loaded, because they could run code; if you trust the file, "
          "save its weights: python -c \"import torch; torch.save({'state_dict': "
          "torch.load('FILE', weights_only=False)['state_dict']}, 'NEW')\"")


class CheckpointError(Exception):
    """A file that is not a usable checkpoint; the message names the part that is wrong."""


@dataclass
class Checkpoint:
    """A loaded checkpoint. metadata: epoch, best, args, recipe, versions, train_files.

    is_lightning: loaded from a Lightning file, which cannot store a calibration.
    """
    spec: FaceSpec
    weights: dict[str, Tensor]
    calibration: Calibration | None = None
    metadata: dict = field(default_factory=dict)
    is_lightning: bool = False

    def classifier(self, device: torch.device) -> FaceClassifier:
        """The network, in eval mode and float32, on the device."""
        classifier = FaceClassifier(self.spec, self.weights).eval().to(device)
        return classifier.to(memory_format=torch.channels_last)

    def probs(self, logits: Tensor) -> Tensor:
        """logits (n, C) -> probabilities (n, C) float32, calibrated if there is a calibration."""
        return self.calibration.probs(logits) if self.calibration else logits.float().softmax(1)


def save_atomically(content: dict, path: str | Path) -> None:
    """torch.save of a file that is written completely or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary_path:
        torch.save(content, temporary_path)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint with floating-point weights in half precision, 22 MB for a ResNet-18."""
    weights = {key: value.detach().cpu() for key, value in checkpoint.weights.items()}
    model = {key: value.half() if value.is_floating_point() else value
             for key, value in weights.items()}
    calibration = checkpoint.calibration and dict(
        vars(checkpoint.calibration), val_probs=checkpoint.calibration.val_probs.cpu(),
        val_labels=checkpoint.calibration.val_labels.cpu())
    versions = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    save_atomically({"format": FORMAT, "spec": asdict(checkpoint.spec), "arch": "resnet18",
                     "model": model, "calibration": calibration, **checkpoint.metadata,
                     "versions": versions}, path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A verified checkpoint of this project or of a PUBLISHED layout, with float32 weights.

    The input of "model." checkpoints is the whole 112 x 112 crop. The input of "resnet."
    checkpoints is the centre of a 200 x 200 chip: pictures of exactly this size are chips and not
    aligned, photographs are aligned to the mean chip, and crops of the ArcFace template are mapped
    to it.
    Raises CheckpointError.
    """
    content = read_tensors(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{EXPECTED}; found {describe(content)}")
    if "format" not in content and isinstance(content.get("state_dict"), dict):
        return read_lightning(content)
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{EXPECTED}; found {describe(content)}")
    if content.get("arch") != "resnet18":
        raise CheckpointError(f"its arch is {content.get('arch')!r}, expected 'resnet18'")
    spec = read_spec(content.get("spec"))
    weights = read_weights(spec, content.get("model"))
    calibration = read_calibration(content.get("calibration"), len(spec.classes))
    metadata = {key: value for key, value in content.items()
                if key not in ("format", "spec", "arch", "model", "calibration")}
    return Checkpoint(spec, weights, calibration, metadata)


def read_calibration(fields: Any, n_classes: int) -> Calibration | None:
    """The Calibration of a checkpoint, or None. Raises CheckpointError."""
    if not fields:
        return None
    try:
        calibration = Calibration(**fields)
        temperature, curve = float(calibration.temperature), float(calibration.curve)
        numbers = [temperature, curve, *map(float, calibration.bias)]
        n_faces, n_columns = calibration.val_probs.shape
        labels_shape = calibration.val_labels.shape
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"its calibration is not this project's ({error})") from None
    n_bias = len(calibration.bias)
    has_valid_numbers = all(map(math.isfinite, numbers)) and temperature > 0 and curve >= 0
    has_valid_shapes = labels_shape == (n_faces,) and n_bias == n_columns == n_classes
    if not (has_valid_numbers and has_valid_shapes):
        raise CheckpointError(f"its calibration does not fit {n_classes} classes: temperature "
                              f"{temperature}, curve {curve}, {n_bias} biases, probabilities "
                              f"{n_faces} x {n_columns}")
    return calibration


def read_lightning(content: dict) -> Checkpoint:
    """The Checkpoint of a Lightning checkpoint of a PUBLISHED layout. Raises CheckpointError."""
    state_dict = content["state_dict"]
    prefix = next((prefix for prefix in PUBLISHED if f"{prefix}conv1.weight" in state_dict), None)
    if prefix is None:
        raise CheckpointError(f"{EXPECTED}; found a state_dict of {describe(state_dict)}")
    spec = PUBLISHED[prefix]
    weights = read_weights(spec, {str(key).removeprefix(prefix): value
                                  for key, value in state_dict.items()})
    metadata = {"epoch": content["epoch"]} if isinstance(content.get("epoch"), int) else {}
    return Checkpoint(spec, weights, metadata=metadata, is_lightning=True)


def describe(content: Any) -> str:
    """A short description of a file's content: its first keys, or its type."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if "format" in content:
        return f"format {content['format']!r}"
    keys = [str(key) for key in content]
    if not keys:
        return "no keys"
    return ", ".join(keys[:3]) + (f", ... ({len(keys)} keys)" if len(keys) > 3 else "")


class IgnoredObject:
    """Stand-in for a class or function named in a file: accepts any arguments, does nothing."""

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_tensors(path: str | Path) -> Any:
    """torch.load of tensors and plain values, without running code. Raises CheckpointError."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            return read_ignoring_objects(path, error)
    except FileNotFoundError:
        raise CheckpointError("no such file") from None
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        message = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        reason = (message.strip() or type(error).__name__).splitlines()[0].partition(". Please")[0]
        raise CheckpointError(f"cannot be read as a checkpoint ({reason})") from None
    except (EOFError, LookupError, ValueError, TypeError, AttributeError):  # of arbitrary bytes
        raise CheckpointError("cannot be read as a checkpoint (not a torch.save file)") from None


def read_ignoring_objects(path: str | Path, refusal: pickle.UnpicklingError) -> Any:
    """A Lightning checkpoint that weights_only refuses, with IgnoredObject for its hyperparameters.

    weights_only looks names up without importing anything, so a stand-in for every unknown name is
    safe. Raises `refusal` for other files, and CheckpointError with a remedy if objects cannot be
    ignored.
    """
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, pickle.UnpicklingError):        # PyTorch's old file format, or not its file
        if "Unsupported global" in str(refusal):
            raise CheckpointError(RESAVE) from None
        raise refusal from None
    try:
        with safe_globals([(IgnoredObject, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(RESAVE) from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise refusal
    return content


def read_spec(fields: Any) -> FaceSpec:
    """The FaceSpec of a checkpoint. Raises CheckpointError that names a missing or wrong field."""
    if not isinstance(fields, dict):
        raise CheckpointError("it has no spec")
    for name in ("classes", "template", "window", "input_size", "mean", "std"):
        if name not in fields:
            raise CheckpointError(f"its spec has no {name}")
    spec = FaceSpec(classes=tuple(fields["classes"]),
                    template=tuple(map(tuple, fields["template"])),
                    window=tuple(fields["window"]), input_size=fields["input_size"],
                    mean=tuple(fields["mean"]), std=tuple(fields["std"]),
                    chip_size=fields.get("chip_size"))
    if len(spec.window) != 4 or not (spec.window[0] < spec.window[2]
                                     and spec.window[1] < spec.window[3]):
        raise CheckpointError(f"its spec's window {spec.window} is not (x0, y0, x1, y1)")
    return spec


def read_weights(spec: FaceSpec, model: Any) -> dict[str, Tensor]:
    """Weights in float32. Raises CheckpointError unless they fit a ResNet-18 for the classes."""
    if not isinstance(model, dict):
        raise CheckpointError("it has no model")
    expected = empty_resnet18(len(spec.classes)).state_dict()
    for key, value in expected.items():
        if not isinstance(model.get(key), Tensor):
            raise CheckpointError(f"its model has no {key}")
        if model[key].shape != value.shape:
            raise CheckpointError(f"its model's {key} is {tuple(model[key].shape)}, expected "
                                  f"{tuple(value.shape)}")
    if unknown := sorted(set(model) - set(expected)):
        raise CheckpointError(f"its model has an unknown {unknown[0]}")
    return {key: value.float() if value.is_floating_point() else value
            for key, value in model.items()}
