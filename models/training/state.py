"""The state of a training run: weights, EMA, optimizer and progress; its start and resume files."""
import copy
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.faces.checkpoint import CheckpointError, load_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec
from models.running.ranks import broadcast_from_rank0
from models.training.auxiliary import add_aux_heads
from models.training.kernels import choose_amp_dtype, replace_small_map_convolutions
from models.training.settings import TrainingSettings

EMA_INTERVAL = 4        # steps between two EMA updates, which cost a fiftieth of a step on a CPU
PROGRESS = ("amp_dtype", "epoch", "best", "stale_epochs", "lowest_loss")


@dataclass
class TrainingState:
    """All that changes in training; a resume file holds all but `saved_at`."""
    model: FaceClassifier                   # on the device, not wrapped
    ema_model: FaceClassifier               # EMA of its weights
    optimizer: torch.optim.Optimizer
    amp_dtype: torch.dtype | None           # None trains in float32
    epoch: int = 0                          # finished epochs
    best: dict | None = None                # figures of the epoch in the checkpoint
    stale_epochs: int = 0                   # epochs since the validation loss fell
    lowest_loss: float = math.inf
    saved_at: float = -math.inf             # time.monotonic of the last resume file

    def state_dict(self) -> dict:
        """Tensors and plain values that `load_state_dict` restores."""
        return {"model": self.model.backbone.state_dict(), "optimizer": self.optimizer.state_dict(),
                "ema_model": self.ema_model.backbone.state_dict(),
                **{name: getattr(self, name) for name in PROGRESS}}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.model.backbone.load_state_dict(state["model"])
        self.ema_model.backbone.load_state_dict(state["ema_model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in PROGRESS:
            setattr(self, name, state[name])


def start_training(spec: FaceSpec, settings: TrainingSettings, init: str,
                   device: torch.device) -> TrainingState:
    """Model, EMA and optimizer at epoch 0; the seed makes them equal on all ranks.

    init: as for `initialise`. Raises CheckpointError.
    """
    torch.manual_seed(settings.seed)
    model = FaceClassifier(spec)
    initialise(model, init)
    if settings.aux_weight:
        add_aux_heads(model)
    freeze_layers(model, settings.freeze)
    replace_small_map_convolutions(model)
    model = model.to(device).to(memory_format=torch.channels_last)
    amp_dtype = choose_amp_dtype(model, settings.input_sizes[0][1], device)
    return TrainingState(model, copy.deepcopy(model).eval(), make_optimizer(model, settings),
                         broadcast_from_rank0(amp_dtype))


def freeze_layers(model: FaceClassifier, last: str) -> None:
    """Freezes the backbone up to and including layer `last`: weights and batch-norm statistics.

    '' freezes nothing. The backward pass ends at the last frozen layer, which saves time.
    """
    names = [name for name, _ in model.backbone.named_children()]
    for name in names[:names.index(last) + 1] if last else ():
        getattr(model.backbone, name).eval().requires_grad_(False)


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """AdamW with weight decay on convolutions and the last layer, not on norms and biases."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": decayed, "weight_decay": settings.weight_decay},
                              {"params": plain, "weight_decay": 0.0}], lr=settings.lr, fused=True)


def initialise(model: FaceClassifier, init: str) -> None:
    """Loads pretrained weights: init is 'random' (none), 'imagenet' or a checkpoint file.

    The head of a checkpoint is used if its classes are the same. Raises CheckpointError for an
    unusable file, and where the ImageNet weights cannot be downloaded.
    """
    if init == "random":
        return
    if init == "imagenet":
        pretrained = imagenet_weights()
    else:
        start = load_checkpoint(init)
        has_same_classes = start.spec.classes == model.spec.classes
        pretrained = {key: value for key, value in start.weights.items()
                      if has_same_classes or not key.startswith("fc.")}
    own = model.backbone.state_dict()
    # torchvision's file has no batch counters, and a head of a thousand classes
    usable = {key: value for key, value in pretrained.items()
              if key in own and value.shape == own[key].shape}
    model.backbone.load_state_dict(own | usable)


def imagenet_weights() -> dict[str, torch.Tensor]:
    """torchvision's ImageNet weights of ResNet-18. Raises CheckpointError."""
    from torchvision.models import ResNet18_Weights
    try:
        return ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
    except OSError as error:
        raise CheckpointError(
            f"torchvision's weights could not be downloaded ({error}); save "
            f"{ResNet18_Weights.IMAGENET1K_V1.url} in {torch.hub.get_dir()}/checkpoints") from None


@torch.no_grad()
def update_ema(ema_model: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """EMA of weights and batch-norm statistics: ema <- decay * ema + (1 - decay) * model.

    It is updated in every EMA_INTERVAL-th step, by the decay of so many steps. In the first
    thousand steps the decay is at most (step + 1) / (step + 10): the random start fades quickly.
    AveragedModel cannot do that: its decay is fixed, and it averages and truncates batch counters.
    """
    if step % EMA_INTERVAL:
        return
    decay = min(decay ** EMA_INTERVAL, (step + 1) / (step + 10))
    pairs = list(zip(ema_model.state_dict().values(), model.state_dict().values(), strict=True))
    float_pairs = [pair for pair in pairs if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)(*map(list, zip(*float_pairs, strict=True)), None)
    for average, value in pairs:
        if not average.is_floating_point():             # batch norm's counters of batches
            average.copy_(value)
