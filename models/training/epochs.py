"""One epoch of training, and one of validation, on all ranks."""
import math
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from models.faces.classifier import FaceClassifier
from models.faces.predictor import network_batch_size
from models.reports.metrics import confusion_matrix
from models.training.augmentation import mix_up
from models.training.auxiliary import AUX_OUTPUTS
from models.training.crops import Crops
from models.training.process import Process
from models.training.sampling import augmented_batches, epoch_rows
from models.training.settings import TrainingSettings
from models.training.state import TrainingState, freeze_layers, update_ema


def learning_rate(step: int, steps_per_epoch: int, settings: TrainingSettings) -> float:
    """The learning rate of a step: linear warm-up, then cosine to 0 or a tenth every 20 epochs."""
    epoch = step / steps_per_epoch
    warmup_epochs = settings.warmup_epochs
    warmup = min(1.0, (epoch + 1 / steps_per_epoch) / warmup_epochs) if warmup_epochs else 1.0
    if settings.schedule == "step":
        return settings.lr * warmup * 0.1 ** int(epoch // 20)
    return settings.lr * warmup * 0.5 * (1 + math.cos(math.pi * epoch / settings.epochs))


def training_loss(outputs: Tensor, targets: Tensor, n_classes: int,
                  settings: TrainingSettings) -> Tensor:
    """Cross-entropy of the classes plus the weighted one of each auxiliary head: (B, T) -> ().

    A target row of zeros (unknown age or gender) adds nothing to loss and gradient.
    """
    widths, weights = [n_classes], [1.0]
    if settings.aux_weight:
        widths += AUX_OUTPUTS
        weights += [settings.aux_weight] * len(AUX_OUTPUTS)
    loss = outputs.new_zeros(())
    heads = zip(weights, outputs.split(widths, 1), targets.split(widths, 1), strict=True)
    for weight, logits, target in heads:
        is_known = target.sum(1, keepdim=True)
        smooth = target.lerp(is_known / target.shape[1], settings.label_smoothing)
        loss = loss + weight * F.cross_entropy(logits, smooth)
    return loss


def take_step(training: TrainingState, network: nn.Module, views: Tensor, targets: Tensor,
              settings: TrainingSettings) -> Tensor:
    """Forward, backward and optimizer step on one batch; the detached loss ().

    network: the model, its CapturedNetwork or its DistributedDataParallel.
    """
    n_classes, dtype = len(training.model.spec.classes), training.amp_dtype
    with torch.autocast(views.device.type, dtype, enabled=dtype is not None):
        loss = training_loss(network(views).float(), targets, n_classes, settings)
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    training.optimizer.step()
    return loss.detach()


def train_one_epoch(training: TrainingState, network: nn.Module, crops: Crops, input_size: int,
                    settings: TrainingSettings, process: Process) -> float:
    """One pass over the crops; the mean loss over the pictures of all ranks.

    network: as for take_step. Raises FloatingPointError where the loss is not finite.
    """
    network.train()
    freeze_layers(training.model, settings.freeze)
    epoch, seed = training.epoch, settings.seed
    rows = epoch_rows(len(crops.labels), epoch, seed, process, crops.weights, settings.epoch_size)
    steps = math.ceil(len(rows) / settings.batch_size)
    generator = torch.Generator().manual_seed((seed * 1000 + epoch) * 1000 + process.rank)
    mixup_generator = random.Random(f"{seed} {epoch} {process.rank}")
    loss_sum, n_seen = torch.zeros((), device=process.device), 0
    batches = augmented_batches(crops, rows, input_size, settings, process.device, generator)
    bar = tqdm(batches, total=steps, leave=False, desc=f"epoch {epoch + 1}/{settings.epochs}",
               disable=not process.is_main, unit="batch")
    for step, (views, targets) in enumerate(bar):
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(epoch * steps + step, steps, settings)
        if mixup_generator.random() < settings.mixup:
            views, targets = mix_up(views, targets, mixup_generator.betavariate(0.4, 0.4))
        loss = take_step(training, network, views, targets, settings)
        update_ema(training.ema_model, training.model, settings.ema_decay, epoch * steps + step)
        loss_sum += loss * len(targets)             # stays on the device: no step waits for it
        n_seen += len(targets)
        if step % 50 == 49 and process.world_size == 1 and not math.isfinite(loss_sum.item()):
            break
    return mean_loss(loss_sum, n_seen, epoch, process)


def mean_loss(loss_sum: Tensor, n_seen: int, epoch: int, process: Process) -> float:
    """Mean of a rank's summed loss over the pictures of all ranks. Raises FloatingPointError."""
    totals = torch.stack([loss_sum.double(), torch.tensor(float(n_seen), dtype=torch.float64,
                                                          device=process.device)])
    if process.world_size > 1:
        dist.all_reduce(totals)
    if not totals.isfinite().all():
        raise FloatingPointError(f"the training loss is not finite in epoch {epoch + 1}; a lower "
                                 "--lr may help")
    return (totals[0] / totals[1].clamp(min=1)).item()


@torch.inference_mode()
def predict_logits(model: FaceClassifier, views: Tensor) -> Tensor:
    """Class logits (n, C) float32 on the CPU, without those of the auxiliary heads."""
    device, n_classes = model.scale.device, len(model.spec.classes)
    return torch.cat([model(batch.to(device))[:, :n_classes].float().cpu()
                      for batch in views.split(network_batch_size(device))])


def validate(model: FaceClassifier, views: Tensor, labels: Tensor,
             process: Process) -> tuple[float, Tensor]:
    """Mean cross-entropy and confusion matrix (C, C) int64 over the pictures of all ranks."""
    rank, world_size = process.rank, process.world_size
    if world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    logits = predict_logits(model, views[rank::world_size])
    labels_here = labels[rank::world_size].cpu()
    loss_sum = F.cross_entropy(logits, labels_here, reduction="sum").double()
    confusion = confusion_matrix(labels_here, logits.argmax(1), logits.shape[1])
    if world_size > 1:
        totals = torch.cat([loss_sum.view(1), confusion.double().flatten()]).to(process.device)
        dist.all_reduce(totals)
        loss_sum, confusion = totals[0].cpu(), totals[1:].long().view_as(confusion).cpu()
    return (loss_sum / len(labels)).item(), confusion
