"""One file says everything needed to label a photograph: FaceSpec, weights and calibration <-> checkpoint.

    format 1 | spec: classes, template, window, input_size, mean, std, chip_size | arch
    model (bare ResNet-18 keys, float16) | calibration: temperature, curve, bias, val_probs, val_labels (or None)
    epoch, best (its figures), args, recipe, versions, for the reader; train_files, a digest of each set's file names

Only tensors and plain Python values, so it loads with weights_only=True. Lightning checkpoints of the two PUBLISHED
layouts are read too, uncalibrated; what they hold beside tensors and plain values is passed over, never run.
"""
import math
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from models.faces.align import CHIP_LANDMARKS, TEMPLATE, TEMPLATE_SIZE, WHOLE_TEMPLATE
from models.faces.calibration import Calibration
from models.faces.classifier import FaceClassifier, FaceSpec, empty_resnet18
from models.running.files import atomic_write

FORMAT = 1
CHIP_SIZE = 200
# Landmarks of an average 200 x 200 UTKFace chip as a template of 112, of which the whole chip is WHOLE_TEMPLATE.
CHIP_TEMPLATE = tuple(tuple((v + 0.5) * TEMPLATE_SIZE / CHIP_SIZE - 0.5 for v in point) for point in CHIP_LANDMARKS)
# First part of the keys in a published Lightning checkpoint -> what its network is fed and answers. "model.": the
# whole crop. "resnet.": the chip resized to 128, of which the middle 104; in pixels of the template 10.5 to 101.5.
PUBLISHED = {
    "model.": FaceSpec(("African", "Asian", "Caucasian", "Indian"), TEMPLATE, WHOLE_TEMPLATE, 112),
    "resnet.": FaceSpec(("White", "Black", "Asian", "Indian"), CHIP_TEMPLATE, (10.5, 10.5, 101.5, 101.5), 104,
                        chip_size=CHIP_SIZE),
}
EXPECTED = (f"wanted format {FORMAT} of this project, or a Lightning checkpoint with a state_dict of "
            + " or ".join(f"{prefix}conv1.weight ... {prefix}fc.bias" for prefix in PUBLISHED))
RESAVE = ("holds objects that are not read, for they could run code; where you trust the file: python -c \"import "
          "torch; torch.save({'state_dict': torch.load('FILE', weights_only=False)['state_dict']}, 'NEW')\"")


class CheckpointError(Exception):
    """A file that is no usable checkpoint; the message says which part is wrong."""


@dataclass
class Checkpoint:
    """A loaded checkpoint. `metadata` holds the rest: epoch, best, args, recipe, versions, train_files.

    is_lightning: it came from a Lightning file, in which no calibration can be kept.
    """
    spec: FaceSpec
    weights: dict[str, Tensor]
    calibration: Calibration | None = None
    metadata: dict = field(default_factory=dict)
    is_lightning: bool = False

    def classifier(self, device: torch.device) -> FaceClassifier:
        """The network, in eval mode and float32, on the device."""
        return FaceClassifier(self.spec, self.weights).eval().to(device, memory_format=torch.channels_last)

    def probs(self, logits: Tensor) -> Tensor:
        """logits (n, C) -> probabilities (n, C) float32, calibrated where the checkpoint knows how."""
        return self.calibration.probs(logits) if self.calibration else logits.float().softmax(1)


def save_atomically(content: dict, path: str | Path) -> None:
    """torch.save: the file is whole or not there at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as beside:
        torch.save(content, beside)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint; floating-point weights are kept in half precision, 22 MB for a ResNet-18."""
    model = {key: value.detach().cpu().half() if value.is_floating_point() else value.detach().cpu()
             for key, value in checkpoint.weights.items()}
    calibration = checkpoint.calibration and dict(vars(checkpoint.calibration),
                                                  val_probs=checkpoint.calibration.val_probs.cpu(),
                                                  val_labels=checkpoint.calibration.val_labels.cpu())
    save_atomically({"format": FORMAT, "spec": asdict(checkpoint.spec), "arch": "resnet18", "model": model,
                     "calibration": calibration, **checkpoint.metadata,
                     "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}}, path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and verifies a checkpoint of this project or of a PUBLISHED layout; its weights in float32.

    Of "model." checkpoints the input is the whole 112 x 112 crop. Of "resnet." checkpoints it is the middle of a
    200 x 200 chip: pictures of exactly that size are taken as chips and not aligned; photographs are aligned to the
    average chip, and finished crops of the usual template are mapped to it.
    Raises CheckpointError with what is wrong.
    """
    content = read_tensors(path)
    if isinstance(content, dict) and "format" not in content and isinstance(content.get("state_dict"), dict):
        return read_lightning(content)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{EXPECTED}; found {describe(content)}")
    if content.get("arch") != "resnet18":
        raise CheckpointError(f"its arch is {content.get('arch')!r}, wanted 'resnet18'")
    spec = read_spec(content.get("spec"))
    model = read_weights(spec, content.get("model"))
    calibration = read_calibration(content.get("calibration"), len(spec.classes))
    about = {key: value for key, value in content.items()
             if key not in ("format", "spec", "arch", "model", "calibration")}
    return Checkpoint(spec, model, calibration, about)


def read_calibration(fields, n_classes: int) -> Calibration | None:
    """The Calibration in a checkpoint, if it holds one. Raises CheckpointError."""
    if not fields:
        return None
    try:
        calibration = Calibration(**fields)
        numbers = [float(value) for value in (calibration.temperature, calibration.curve, *calibration.bias)]
        n_faces, n_columns = calibration.val_probs.shape
        labels = calibration.val_labels.shape
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"its calibration is not this project's ({error})") from None
    if (not all(map(math.isfinite, numbers)) or numbers[0] <= 0 or numbers[1] < 0 or labels != (n_faces,)
            or not len(calibration.bias) == n_columns == n_classes):
        raise CheckpointError(f"its calibration is none of {n_classes} classes: temperature {numbers[0]}, curve "
                              f"{numbers[1]}, {len(calibration.bias)} biases, probabilities {n_faces} x {n_columns}")
    return calibration


def read_lightning(content: dict) -> Checkpoint:
    """The Checkpoint in a Lightning checkpoint of a PUBLISHED layout. Raises CheckpointError."""
    weights = content["state_dict"]
    prefix = next((prefix for prefix in PUBLISHED if f"{prefix}conv1.weight" in weights), None)
    if prefix is None:
        raise CheckpointError(f"{EXPECTED}; found a state_dict of {describe(weights)}")
    spec = PUBLISHED[prefix]
    model = read_weights(spec, {str(key).removeprefix(prefix): value for key, value in weights.items()})
    about = {"epoch": content["epoch"]} if isinstance(content.get("epoch"), int) else {}
    return Checkpoint(spec, model, metadata=about, is_lightning=True)


def describe(content) -> str:
    """What a file holds, in a few words: its first keys, or its type."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if "format" in content:
        return f"format {content['format']!r}"
    keys = [str(key) for key in content]
    return ", ".join(keys[:3]) + (f", ... ({len(keys)} keys)" if len(keys) > 3 else "") if keys else "no keys"


class IgnoredObject:
    """Stands for a class or function that a file names: takes whatever it is given, and does nothing."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def read_tensors(path: str | Path):
    """torch.load of plain values and tensors alone. Raises CheckpointError, never runs code from the file."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            return read_past_objects(path, error)
    except FileNotFoundError:
        raise CheckpointError("no such file") from None
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        message = str(error).partition("WeightsUnpickler error: ")[2] or str(error) or type(error).__name__
        reason = (message.strip() or type(error).__name__).splitlines()[0].partition(". Please")[0]
        raise CheckpointError(f"cannot be read as a checkpoint ({reason})") from None
    except (EOFError, LookupError, ValueError, TypeError, AttributeError):              # what any bytes can lead to
        raise CheckpointError("cannot be read as a checkpoint (torch.save did not write it)") from None


def read_past_objects(path: str | Path, refusal: pickle.UnpicklingError):
    """A Lightning checkpoint that weights_only refuses for its hyper-parameters: they become IgnoredObject objects.

    weights_only looks names up and imports nothing, so standing in for every name it does not know is safe. Raises
    `refusal` for any other file, and CheckpointError, which says what to do, where the objects can't be passed over.
    """
    try:
        names = get_unsafe_globals_in_checkpoint(path)
    except (ValueError, pickle.UnpicklingError):                # torch.save of old, or none of its files
        raise (CheckpointError(RESAVE) if "Unsupported global" in str(refusal) else refusal) from None
    try:
        with safe_globals([(IgnoredObject, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(RESAVE) from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise refusal
    return content


def read_spec(fields) -> FaceSpec:
    """The FaceSpec in a checkpoint's `spec`. Raises CheckpointError naming the field that is missing or wrong."""
    if not isinstance(fields, dict):
        raise CheckpointError("it has no spec")
    for name in ("classes", "template", "window", "input_size", "mean", "std"):
        if name not in fields:
            raise CheckpointError(f"its spec has no {name}")
    spec = FaceSpec(tuple(fields["classes"]), tuple(map(tuple, fields["template"])), tuple(fields["window"]),
                    fields["input_size"], tuple(fields["mean"]), tuple(fields["std"]), fields.get("chip_size"))
    if len(spec.window) != 4 or not (spec.window[0] < spec.window[2] and spec.window[1] < spec.window[3]):
        raise CheckpointError(f"its spec's window {spec.window} is not (x0, y0, x1, y1)")
    return spec


def read_weights(spec: FaceSpec, model) -> dict[str, Tensor]:
    """The weights in float32. Raises CheckpointError unless they are a ResNet-18's with one output per class."""
    if not isinstance(model, dict):
        raise CheckpointError("it has no model")
    wanted = empty_resnet18(len(spec.classes)).state_dict()
    for key, value in wanted.items():
        if not isinstance(model.get(key), Tensor):
            raise CheckpointError(f"its model has no {key}")
        if model[key].shape != value.shape:
            raise CheckpointError(f"its model's {key} is {tuple(model[key].shape)}, wanted {tuple(value.shape)}")
    if extra := sorted(set(model) - set(wanted)):
        raise CheckpointError(f"its model has an unknown {extra[0]}")
    return {key: value.float() if value.is_floating_point() else value for key, value in model.items()}
