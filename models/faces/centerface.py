"""CenterFace face detection, batched: one pass of a small network that predicts faces as points.

Xu, Yan, Sun, Yang, Hu, "CenterFace: Joint Face Detection and Alignment Using Face as Point", 2019.
The backbone is MobileNetV2, a neck adds its feature maps up to stride 4, and one head predicts
score, size, offset and landmarks of each cell. The weights are those of
github.com/Star-Clouds/CenterFace, centerface_bnmerged.onnx, trained on WIDER FACE
(checkpoints/centerface.LICENSE.txt). CenterFace finds faces that MTCNN misses, but its landmarks
are coarser; models.faces.second_look places them by MTCNN's O-Net.
"""
from pathlib import Path

import torch
from torch import Tensor, nn

from models.faces.boxes import nms_in_groups
from models.faces.mtcnn import Faces, logit

WEIGHTS = Path(__file__).resolve().parent.parent.parent / "checkpoints" / "centerface.pt"
STRIDE = 4                      # pixels of a cell of the output
DIVISOR = 32                    # stride of the deepest feature map: sizes are multiples of it
# Expansion, channels, blocks and stride of the first block of each stage
# (Sandler et al., "MobileNetV2", 2018, table 2).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
          (6, 160, 3, 2), (6, 320, 1, 1))
NECK_STAGES = (1, 2, 4, 6)      # stages whose maps enter the neck: strides 4, 8, 16 and 32
NECK = 24                       # channels of the neck
# Face logit; log of height and width in cells; offset y, x; landmarks y, x.
HEAD = 1 + 2 + 2 + 10


class InvertedResidual(nn.Module):
    """1 x 1 expansion, 3 x 3 depthwise convolution and 1 x 1 projection, with a shortcut where the
    shapes agree."""

    def __init__(self, n_inputs: int, n_outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = n_inputs * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers = [nn.Conv2d(n_inputs, hidden, 1), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(
            *layers, nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden), nn.ReLU(inplace=True),
            nn.Conv2d(hidden, n_outputs, 1))
        self.has_shortcut = stride == 1 and n_inputs == n_outputs

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.layers(maps) if self.has_shortcut else self.layers(maps)


class CenterFaceNetwork(nn.Module):
    """Pixels (b, 3, h, w) float32, RGB of 0 to 255 -> cells (b, HEAD, h / 4, w / 4).

    h and w are multiples of DIVISOR.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(inplace=True))
        self.stages, n_inputs = nn.ModuleList(), 32
        for expansion, n_outputs, n_blocks, stride in STAGES:
            first = InvertedResidual(n_inputs, n_outputs, stride, expansion)
            others = [InvertedResidual(n_outputs, n_outputs, 1, expansion)
                      for _ in range(n_blocks - 1)]
            self.stages.append(nn.Sequential(first, *others))
            n_inputs = n_outputs
        self.laterals = nn.ModuleList(nn.Conv2d(STAGES[stage][1], NECK, 1) for stage in NECK_STAGES)
        self.upsamples = nn.ModuleList(nn.ConvTranspose2d(NECK, NECK, 2, 2)
                                       for _ in NECK_STAGES[1:])
        self.smooth = nn.Conv2d(NECK, NECK, 3, 1, 1)
        self.head = nn.Conv2d(NECK, HEAD, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.stem(pixels)
        stage_maps: list[Tensor] = []
        for i, stage in enumerate(self.stages):
            maps = stage(maps)
            if i in NECK_STAGES:
                stage_maps.append(maps)
        *finer, maps = (lateral(maps).relu_()
                        for lateral, maps in zip(self.laterals, stage_maps, strict=True))
        for upsample, lateral in zip(reversed(self.upsamples), reversed(finer), strict=True):
            maps = upsample(maps).relu_() + lateral
        return self.head(self.smooth(maps).relu_())


class CenterFace(nn.Module):
    """Detects faces in a batch of images, on the device of its parameters.

    threshold: minimum score; nms_threshold: maximum IoU between two boxes of an image.
    """

    def __init__(self, weights: str | Path = WEIGHTS, *, threshold: float = 0.3,
                 nms_threshold: float = 0.3) -> None:
        super().__init__()
        self.threshold, self.nms_threshold = threshold, nms_threshold
        self.network = CenterFaceNetwork()
        state = torch.load(weights, map_location="cpu", weights_only=True)
        self.network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    @torch.backends.cudnn.flags(True, allow_tf32=False)
    def detect(self, pixels: Tensor) -> Faces:
        """Faces of pixels (b, 3, h, w) float32, RGB of 0 to 255; b may be 0.

        h and w are multiples of DIVISOR. Boxes may extend beyond the image. Landmarks are coarse.
        """
        return self.decode(self.network(pixels.contiguous(memory_format=torch.channels_last)))

    def decode(self, cells: Tensor) -> Faces:
        """Faces of the cells (b, HEAD, h, w) above the threshold, after NMS."""
        is_face = cells[:, 0] > logit(self.threshold)
        image, row, column = is_face.nonzero(as_tuple=True)
        values = cells[image, :, row, column]                                           # (n, HEAD)
        extent = values[:, 1:3].exp() * STRIDE                                  # height, width
        centre = (torch.stack([row, column], 1) + values[:, 3:5] + 0.5) * STRIDE - 0.5      # y, x
        corner = centre - extent / 2
        points = corner[:, None] + extent[:, None] * values[:, 5:].unflatten(1, (5, 2))     # y, x
        boxes = torch.cat([corner.flip(1), (corner + extent).flip(1)], 1)
        rows = nms_in_groups(boxes, values[:, 0], image, self.nms_threshold)
        rows = rows[values[rows, 0].argsort(descending=True, stable=True)]
        rows = rows[image[rows].argsort(stable=True)]
        return Faces(boxes[rows], values[rows, 0].sigmoid(), points[rows].flip(2), image[rows])
