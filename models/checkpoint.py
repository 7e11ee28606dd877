"""One file says everything needed to label a photograph: FaceSpec, weights and calibration <-> checkpoint.

    format 1 | spec: classes, template, window, input_size, mean, std | arch | model (bare ResNet-18 keys, float16)
    calibration: temperature, bias, val_probs, val_labels (or None) | epoch, metrics, args, versions, for the reader

Only tensors and plain Python values, so it loads with weights_only=True.
"""
import os
import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from models.calibration import Calibration
from models.classifier import FaceClassifier, FaceSpec

FORMAT = 1


class CheckpointError(Exception):
    """A file that is no usable checkpoint; the message says which part is wrong."""


@dataclass
class Checkpoint:
    """A loaded checkpoint. `about` holds what is there for the reader: epoch, metrics, args, versions."""
    spec: FaceSpec
    model: dict[str, Tensor]
    calibration: Calibration | None = None
    about: dict = field(default_factory=dict)

    def classifier(self, device: torch.device) -> FaceClassifier:
        """The network, in eval mode and float32, on the device."""
        classifier = FaceClassifier(self.spec)
        classifier.backbone.load_state_dict(self.model)
        return classifier.eval().to(device, memory_format=torch.channels_last)

    def probs(self, logits: Tensor) -> Tensor:
        """logits (n, C) -> probabilities (n, C) float32, calibrated where the checkpoint knows how."""
        return self.calibration.probs(logits) if self.calibration else logits.float().softmax(1)


def save_atomically(content: dict, path: str | Path) -> None:
    """torch.save beside the place and a move into it: the file is whole or not there at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(content, beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint; floating-point weights are kept in half precision, 22 MB for a ResNet-18."""
    model = {key: value.detach().cpu().half() if value.is_floating_point() else value.detach().cpu()
             for key, value in checkpoint.model.items()}
    calibration = checkpoint.calibration and dict(vars(checkpoint.calibration),
                                                  val_probs=checkpoint.calibration.val_probs.cpu(),
                                                  val_labels=checkpoint.calibration.val_labels.cpu())
    save_atomically({"format": FORMAT, "spec": asdict(checkpoint.spec), "arch": "resnet18", "model": model,
                     "calibration": calibration, **checkpoint.about,
                     "versions": {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}}, path)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads and verifies a checkpoint; its weights in float32. Raises CheckpointError with what is wrong."""
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"not a checkpoint of format {FORMAT} of this project")
    if content.get("arch") != "resnet18":
        raise CheckpointError(f"its arch is {content.get('arch')!r}, wanted 'resnet18'")
    spec = read_spec(content.get("spec"))
    model = {key: value.float() if value.is_floating_point() else value for key, value in content["model"].items()}
    check_weights(spec, model)
    calibration = content.get("calibration")
    about = {key: value for key, value in content.items()
             if key not in ("format", "spec", "arch", "model", "calibration")}
    return Checkpoint(spec, model, Calibration(**calibration) if calibration else None, about)


def read_tensors(path: str | Path):
    """torch.load of plain values and tensors alone. Raises CheckpointError, never runs code from the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError("no such file") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot be read as a checkpoint ({reason})") from None


def read_spec(fields) -> FaceSpec:
    """The FaceSpec in a checkpoint's `spec`. Raises CheckpointError naming the field that is missing or wrong."""
    if not isinstance(fields, dict):
        raise CheckpointError("it has no spec")
    for name in ("classes", "template", "window", "input_size", "mean", "std"):
        if name not in fields:
            raise CheckpointError(f"its spec has no {name}")
    spec = FaceSpec(tuple(fields["classes"]), tuple(map(tuple, fields["template"])), tuple(fields["window"]),
                    fields["input_size"], tuple(fields["mean"]), tuple(fields["std"]))
    if len(spec.window) != 4 or not (spec.window[0] < spec.window[2] and spec.window[1] < spec.window[3]):
        raise CheckpointError(f"its spec's window {spec.window} is not (x0, y0, x1, y1)")
    return spec


def check_weights(spec: FaceSpec, model: dict[str, Tensor]) -> None:
    """Raises CheckpointError where keys or shapes are not those of a ResNet-18 with one output per class."""
    wanted = FaceClassifier(spec).backbone.state_dict()
    for key, value in wanted.items():
        if key not in model:
            raise CheckpointError(f"its model has no {key}")
        if model[key].shape != value.shape:
            raise CheckpointError(f"its model's {key} is {tuple(model[key].shape)}, wanted {tuple(value.shape)}")
    if extra := sorted(set(model) - set(wanted)):
        raise CheckpointError(f"its model has an unknown {extra[0]}")
