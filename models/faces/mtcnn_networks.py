"""faces/mtcnn_networks"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LANES = 16                      # floats that a CPU's vector instructions take at once: channels are padded to these


def build_pnet() -> nn.Sequential:
    """P-Net: (B, 3, h, w) float32 -> (B, 5, h', w'), the face logit and four box offsets of each cell."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.PReLU(10), nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.Conv2d(10, 16, 3), nn.PReLU(16),
        nn.Conv2d(16, 32, 3), nn.PReLU(32),
        nn.Conv2d(32, 5, 1))


def build_rnet() -> nn.Sequential:
    """R-Net: (n, 3, 24, 24) float32 -> (n, 5), the face logit and four box offsets."""
    return nn.Sequential(
        nn.Conv2d(3, 28, 3), nn.PReLU(28), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(28, 48, 3), nn.PReLU(48), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(48, 64, 2), nn.PReLU(64), nn.Flatten(),
        nn.Linear(576, 128), nn.PReLU(128),
        nn.Linear(128, 5))


def build_onet() -> nn.Sequential:
    """O-Net: (n, 3, 48, 48) float32 -> (n, 15), the face logit, four box offsets, five x and five y of landmarks."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.PReLU(32), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(32, 64, 3), nn.PReLU(64), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(64, 64, 3), nn.PReLU(64), nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.Conv2d(64, 128, 2), nn.PReLU(128), nn.Flatten(),
        nn.Linear(1152, 256), nn.PReLU(256),
        nn.Linear(256, 15))


class CellHead(nn.Conv2d):
    """A 1 x 1 convolution as what it is, a matrix product: (B, C, h, w) -> (outputs, B, h, w)."""

    def forward(self, maps: Tensor) -> Tensor:
        cells = maps.permute(0, 2, 3, 1)
        outputs = torch.addmm(self.bias[:, None], self.weight.flatten(1), cells.flatten(0, 2).T)
        return outputs.unflatten(1, cells.shape[:3])


class MaxPool(nn.MaxPool2d):
    """Max-pooling in steps of 2 whose last windows may reach over the edge; on a CPU by rows, then by columns.

    PyTorch's own also notes where each maximum was, which takes up to four times as long.
    """

    def forward(self, maps: Tensor) -> Tensor:
        if maps.is_cuda:
            return super().forward(maps)
        for before in ((slice(None),) * 2, (slice(None),) * 3):
            end = 2 * math.ceil((maps.shape[len(before)] - self.kernel_size) / 2) + 1
            first, *others = (maps[(*before, slice(k, k + end, 2))] for k in range(self.kernel_size))
            maps = first.clone()
            for other in others:
                part = maps.narrow(len(before), 0, other.shape[len(before)])
                torch.maximum(part, other, out=part)
        return maps


def with_cpu_layers(net: nn.Sequential) -> nn.Sequential:
    """The same network with layers that a CPU computes sooner; what P-Net gives is (5, B, h', w') then.

    Between its convolutions channels of zeros make up whole vectors of LANES.
    """
    layers, extra = [], 0                                           # extra: channels added to what comes in
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            out, into = layer.weight.shape[:2]
            kind, more = (CellHead, 0) if layer.kernel_size == (1, 1) else (nn.Conv2d, -out % LANES)
            padded = kind(into + extra, out + more, layer.kernel_size)
            padded.weight = nn.Parameter(F.pad(layer.weight, (0, 0, 0, 0, 0, extra, 0, more)))
            padded.bias = nn.Parameter(F.pad(layer.bias, (0, more)))
            layer, extra = padded, more
        elif isinstance(layer, nn.PReLU) and extra:
            slopes, layer = layer.weight, nn.PReLU(layer.num_parameters + extra)
            layer.weight = nn.Parameter(F.pad(slopes, (0, extra)))
        elif isinstance(layer, nn.MaxPool2d):
            layer = MaxPool(layer.kernel_size, layer.stride, ceil_mode=True)
        layers.append(layer)
    return nn.Sequential(*layers)


def normalise_pixels(pixels: Tensor) -> Tensor:
    """Float pixels of 0 to 255 as the networks want them, -1 to 1; in place."""
    return pixels.sub_(127.5).div_(128)
