"""The classifier as it is shipped: views -> logits -> calibrated probabilities, fast on a CPU."""
import itertools

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.faces.checkpoint import Checkpoint


class Predictor:
    """The network of one checkpoint, ready for inference on a device.

    Batch norm is fused into the convolutions. On a CPU with AMX or AVX512_BF16 the convolutions
    run in bfloat16, two to four times as fast as in float32; other CPUs would be slower. The input
    and the last layer stay float32, because logits of 8 significant bits would make different
    faces look like repeated pictures. docs/performance.md states how far the numbers differ.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.spec, self.device = checkpoint, checkpoint.spec, device
        network = fuse_batch_norm(checkpoint.classifier(device))
        self.network = network.to(memory_format=torch.channels_last)
        capabilities = torch.cpu.get_capabilities()
        has_bfloat16 = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
        self.bfloat16 = device.type == "cpu" and has_bfloat16
        if self.bfloat16:
            convert_convolutions(self.network.get_submodule("backbone"))

    @torch.inference_mode()
    def logits(self, views: Tensor, flip: bool = False) -> Tensor:
        """Logits (n, C) float32 of views (n, 3, S, S) uint8; n may be 0.

        With flip, the mean of the logits of the views and of their mirror images.
        """
        logits = self.network(views)
        return (logits + self.network(views.flip(3))) / 2 if flip else logits

    @torch.inference_mode()
    def probs(self, views: Tensor, flip: bool = False) -> Tensor:
        """Calibrated probabilities (n, C) float32 on the CPU of views (n, 3, S, S) uint8."""
        return self.checkpoint.probs(self.logits(views, flip)).cpu()


def convert_convolutions(backbone: nn.Module) -> None:
    """Makes every convolution of a ResNet bfloat16, in place; its input and head stay float32."""
    input_layer, head = backbone.get_submodule("conv1"), backbone.get_submodule("fc")
    input_layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16(),))
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            module.bfloat16()


def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """The model, in place, with each convolution and the batch norm that follows it fused."""
    for module in list(model.modules()):
        for (name, first), (next_name, second) in itertools.pairwise(list(module.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(first, second))
                setattr(module, next_name, nn.Identity())
    return model


def network_batch_size(device: torch.device) -> int:
    """Default number of views in one call of a network: what a CPU's caches hold, or 256."""
    return 256 if device.type == "cuda" else 16
