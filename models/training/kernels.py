"""Faster training of the same network: number format, convolutions for a CPU, CUDA graphs."""
import copy
import gc
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from models.faces.classifier import FaceClassifier


def choose_amp_dtype(model: FaceClassifier, input_size: int,
                     device: torch.device) -> torch.dtype | None:
    """bfloat16 on CUDA, and on a CPU where it is faster in a short trial of the network; or None.

    None is float32. A CPU with AMX or AVX512_BF16 trains 1.5 to 2.2 times as fast in bfloat16; one
    with plain AVX-512 is slower in it.
    """
    if device.type == "cuda":
        return torch.bfloat16
    views = torch.zeros(16, 3, input_size, input_size, dtype=torch.uint8)
    trial = copy.deepcopy(model)
    seconds = {None: math.inf, torch.bfloat16: math.inf}
    for dtype in list(seconds) * 3:                             # the first round warms up
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            trial(views).float().sum().backward()
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return min(seconds, key=lambda dtype: seconds[dtype])


class WeightGradientByTaps(torch.autograd.Function):
    """conv2d whose weight gradient is one matrix product per kernel tap (position in the kernel).

    oneDNN parallelises that gradient over pixels. In the last layers, of 512 channels on maps of
    3 x 3 or 4 x 4, it needs five times as long in bfloat16: a third of a training step at 72 px, a
    tenth at 104.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, stride: tuple, padding: tuple) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(maps, weight, None, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        maps, weight = ctx.saved_tensors
        maps_gradient = conv2d_input(maps.shape, weight, gradient, ctx.stride, ctx.padding)
        height, width = gradient.shape[2:]
        (stride_y, stride_x), (top, left) = ctx.stride, ctx.padding
        padded = F.pad(maps, (left, left, top, top)).permute(0, 2, 3, 1)        # (B, h, w, inputs)
        pixels = gradient.permute(1, 0, 2, 3).flatten(1)                        # (outputs, B h' w')
        weight_gradient = torch.empty_like(weight)
        for y in range(weight.shape[2]):
            for x in range(weight.shape[3]):
                tap = padded[:, y:y + stride_y * (height - 1) + 1:stride_y,
                             x:x + stride_x * (width - 1) + 1:stride_x]
                weight_gradient[:, :, y, x] = pixels @ tap.flatten(0, 2)
        return maps_gradient, weight_gradient, None, None


class SmallMapConv2d(nn.Conv2d):
    """A convolution without bias that uses WeightGradientByTaps under autocast on a CPU."""

    def forward(self, maps: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(maps)
        dtype = torch.get_autocast_dtype("cpu")
        return WeightGradientByTaps.apply(maps.to(dtype), self.weight.to(dtype), self.stride,
                                          self.padding)


def replace_small_map_convolutions(model: FaceClassifier) -> None:
    """Replaces the convolutions of layer4 by SmallMapConv2d with the same weights."""
    for module in list(model.backbone.layer4.modules()):
        for name, conv in module.named_children():
            if isinstance(conv, nn.Conv2d):
                geometry: dict[str, Any] = {"kernel_size": conv.kernel_size,
                                            "stride": conv.stride, "padding": conv.padding}
                fast = SmallMapConv2d(conv.in_channels, conv.out_channels, bias=False,
                                      device="meta", **geometry)
                fast.weight = conv.weight
                setattr(module, name, fast)


class CapturedNetwork(nn.Module):
    """A model in training whose full batches run, forward and backward, as CUDA graphs.

    Training is launch-bound: the GPU finishes the hundreds of small kernels faster than the CPU
    launches them one by one. The graphs are for one input size and batch size.
    """

    def __init__(self, model: FaceClassifier, input_size: int, amp_dtype: torch.dtype | None,
                 batch_size: int):
        super().__init__()
        gc.collect()                # only the collector frees the graphs of an earlier input size
        self.model, self.batch_size = model.train(), batch_size
        buffers = [buffer.clone() for buffer in model.buffers()]
        views = torch.zeros(batch_size, 3, input_size, input_size, device=model.scale.device)
        autocast = torch.autocast("cuda", amp_dtype, enabled=amp_dtype is not None,
                                  cache_enabled=False)
        with autocast, torch.backends.cudnn.flags(True, benchmark=True):
            # a shallow copy: the graphs use the model's own parameters
            self.captured = torch.cuda.make_graphed_callables(copy.copy(model), (views,))
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)     # the capture updated batch norm's statistics with zeros

    def forward(self, views: Tensor) -> Tensor:
        network: Any = self.captured if len(views) == self.batch_size else self.model
        return network(views)


def accelerate(model: FaceClassifier, input_size: int, amp_dtype: torch.dtype | None,
               batch_size: int) -> nn.Module:
    """The network that a single process calls in training: the model, or on CUDA its graphs."""
    if model.scale.device.type == "cuda":
        return CapturedNetwork(model, input_size, amp_dtype, batch_size)
    return model
