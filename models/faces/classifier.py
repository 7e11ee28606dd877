"""FaceSpec and FaceClassifier: views (n, 3, S, S) uint8 -> logits (n, C)."""
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchvision.models import resnet18


@dataclass(frozen=True)
class FaceSpec:
    """All that turns a photograph into the classifier's input, and its output into names; it travels in the checkpoint.

    window: edges (x0, y0, x1, y1), in template pixels, of the part of the template the network sees.
    mean, std: of RGB values scaled to 0..1.
    chip_size: side of pictures that lie on this very template as they come, and are not aligned; None where the only
    finished crops are those of the usual template.
    """
    classes: tuple[str, ...]
    template: tuple[tuple[float, float], ...]
    window: tuple[float, float, float, float]
    input_size: int
    mean: tuple[float, float, float] = field(default=(0.5, 0.5, 0.5))
    std: tuple[float, float, float] = field(default=(0.5, 0.5, 0.5))
    chip_size: int | None = None

    @property
    def chip_geometry(self) -> tuple[int, tuple] | None:
        """(side, template) of those pictures."""
        return self.chip_size and (self.chip_size, self.template)


def empty_resnet18(n_classes: int) -> nn.Module:
    """torchvision's ResNet-18 as names and shapes alone, on the meta device: no time goes into drawing weights."""
    with torch.device("meta"):
        return resnet18(weights=None, num_classes=n_classes)


class FaceClassifier(nn.Module):
    """torchvision's ResNet-18 on bytes, which it normalises by its spec's mean and std, here and nowhere else."""

    def __init__(self, spec: FaceSpec, weights: dict[str, Tensor] | None = None):
        """weights: all of the ResNet-18's, copied; without them it starts as torchvision draws it."""
        super().__init__()
        self.spec = spec
        if weights is None:
            self.backbone = resnet18(weights=None, num_classes=len(spec.classes))
        else:
            self.backbone = empty_resnet18(len(spec.classes)).to_empty(device="cpu")
            self.backbone.load_state_dict(weights)
        scale = 1 / (255 * torch.tensor(spec.std))
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-torch.tensor(spec.mean) / torch.tensor(spec.std)).view(3, 1, 1),
                             persistent=False)

    def forward(self, views: Tensor) -> Tensor:
        """views (n, 3, S, S) uint8, or float in 0..255 (training mixes pictures) -> logits (n, C). n may be 0."""
        if len(views) == 0:
            return self.backbone.fc.weight.new_zeros(0, len(self.spec.classes))
        return self.backbone((views * self.scale + self.shift).contiguous(memory_format=torch.channels_last))
