"""The three networks of MTCNN, and layers that make them faster on a CPU."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LANES = 16                      # floats per vector instruction of a CPU; channels are padded to it


def build_pnet() -> nn.Sequential:
    """P-Net: (B, 3, h, w) float32 -> (B, 5, h', w'), the face logit and four offsets per cell."""
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
    """O-Net: (n, 3, 48, 48) float32 -> (n, 15), the face logit, four box offsets and the landmarks.

    The landmarks are five x, then five y, in fractions of the box.
    """
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.PReLU(32), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(32, 64, 3), nn.PReLU(64), nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Conv2d(64, 64, 3), nn.PReLU(64), nn.MaxPool2d(2, 2, ceil_mode=True),
        nn.Conv2d(64, 128, 2), nn.PReLU(128), nn.Flatten(),
        nn.Linear(1152, 256), nn.PReLU(256),
        nn.Linear(256, 15))


class CellHead(nn.Conv2d):
    """A 1 x 1 convolution, computed as a matrix product: (B, C, h, w) -> (outputs, B, h, w)."""

    def forward(self, maps: Tensor) -> Tensor:
        cells = maps.permute(0, 2, 3, 1)
        assert self.bias is not None
        outputs = torch.addmm(self.bias[:, None], self.weight.flatten(1), cells.flatten(0, 2).T)
        return outputs.unflatten(1, cells.shape[:3])


class MaxPool(nn.MaxPool2d):
    """Max-pooling with stride 2 and ceil_mode; on a CPU first over rows, then over columns.

    PyTorch's implementation also computes the indices of the maxima, which takes up to four times
    as long.
    """

    def forward(self, maps: Tensor) -> Tensor:
        if maps.is_cuda:
            return super().forward(maps)
        assert isinstance(self.kernel_size, int)
        for axis in (2, 3):
            end = 2 * math.ceil((maps.shape[axis] - self.kernel_size) / 2) + 1
            before = (slice(None),) * axis
            first, *others = (maps[(*before, slice(k, k + end, 2))]
                              for k in range(self.kernel_size))
            maps = first.clone()
            for other in others:                    # may be shorter than the first at the edge
                covered = maps.narrow(axis, 0, other.shape[axis])
                torch.maximum(covered, other, out=covered)
        return maps


def with_cpu_layers(net: nn.Sequential) -> nn.Sequential:
    """An equivalent network of layers that are faster on a CPU; P-Net's output is (5, B, h', w').

    Channels of zeros between the convolutions fill whole vectors of LANES.
    """
    layers: list[nn.Module] = []
    n_padded = 0                        # channels of zeros in the input of the next layer
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            n_added = 0 if layer.kernel_size == (1, 1) else -layer.out_channels % LANES
            layers.append(pad_convolution(layer, n_padded, n_added))
            n_padded = n_added
        elif isinstance(layer, nn.PReLU) and n_padded:
            padded = nn.PReLU(layer.num_parameters + n_padded)
            padded.weight = nn.Parameter(F.pad(layer.weight, (0, n_padded)))
            layers.append(padded)
        elif isinstance(layer, nn.MaxPool2d):
            layers.append(MaxPool(layer.kernel_size, layer.stride, ceil_mode=True))
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


def pad_convolution(layer: nn.Conv2d, n_inputs: int, n_outputs: int) -> nn.Conv2d:
    """A convolution with additional channels of zero weights; a CellHead if its kernel is 1 x 1."""
    assert layer.bias is not None
    kind = CellHead if layer.kernel_size == (1, 1) else nn.Conv2d
    height, width = layer.kernel_size
    padded = kind(layer.in_channels + n_inputs, layer.out_channels + n_outputs, (height, width))
    padded.weight = nn.Parameter(F.pad(layer.weight, (0, 0, 0, 0, 0, n_inputs, 0, n_outputs)))
    padded.bias = nn.Parameter(F.pad(layer.bias, (0, n_outputs)))
    return padded


def normalise_pixels(pixels: Tensor) -> Tensor:
    """Float pixels of 0 to 255 scaled to the networks' input range, -1 to 1; in place."""
    return pixels.sub_(127.5).div_(128)
