"""FaceSpec and FaceClassifier: views (n, 3, S, S) uint8 -> logits (n, C)."""
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import ResNet

from models.faces.align import Template, Window


@dataclass(frozen=True)
class FaceSpec:
    """The classifier's input and the names of its outputs, as stored in a checkpoint.

    template: target positions of the landmarks.
    window: edges (x0, y0, x1, y1), in template pixels, of the network's input.
    mean, std: of RGB values scaled to 0..1.
    chip_size: pictures of this width and height show the whole of this template and are not
    aligned; None if there are no such pictures, only crops of the ArcFace template.
    """
    classes: tuple[str, ...]
    template: Template
    window: Window
    input_size: int
    mean: tuple[float, float, float] = field(default=(0.5, 0.5, 0.5))
    std: tuple[float, float, float] = field(default=(0.5, 0.5, 0.5))
    chip_size: int | None = None

    @property
    def chip_geometry(self) -> tuple[int, Template] | None:
        """(chip_size, template), or None."""
        return (self.chip_size, self.template) if self.chip_size else None


def empty_resnet18(n_classes: int) -> ResNet:
    """torchvision's ResNet-18 on the meta device: names and shapes, no initialised weights."""
    with torch.device("meta"):
        return resnet18(weights=None, num_classes=n_classes)


class FaceClassifier(nn.Module):
    """torchvision's ResNet-18 for uint8 views, which it normalises by the spec's mean and std."""

    scale: Tensor
    shift: Tensor

    def __init__(self, spec: FaceSpec, weights: dict[str, Tensor] | None = None):
        """weights: a state_dict of the ResNet-18, which is copied; by default a random start."""
        super().__init__()
        self.spec = spec
        if weights is None:
            self.backbone = resnet18(weights=None, num_classes=len(spec.classes))
        else:
            self.backbone = empty_resnet18(len(spec.classes)).to_empty(device="cpu")
            self.backbone.load_state_dict(weights)
        scale = 1 / (255 * torch.tensor(spec.std))
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        shift = -torch.tensor(spec.mean) / torch.tensor(spec.std)
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)

    def forward(self, views: Tensor) -> Tensor:
        """views (n, 3, S, S), uint8 or floats of 0..255 (mixup) -> logits (n, C). n may be 0."""
        if len(views) == 0:
            return self.backbone.fc.weight.new_zeros(0, len(self.spec.classes))
        pixels = views * self.scale + self.shift
        return self.backbone(pixels.contiguous(memory_format=torch.channels_last))
