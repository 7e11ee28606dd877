"""Labelled faces -> checkpoint: trains a ResNet-18 and keeps the epoch that validation likes best.

Reads   --data: folders that utk_dataset_builder.py made, any folders of class folders, or CSV lists (image, class).
Writes  --out (weights, spec and calibration), <out stem>.log.jsonl (a line an epoch), <out stem>.resume.pt (for
        --resume; removed at the end) and visualizations/validation_loss.png.

    python train.py --data data/utk_races --out checkpoints/mine.pt
    torchrun --nproc_per_node=2 train.py --data data/utk_races --out checkpoints/mine.pt
"""
import bisect
import copy
import csv
import gc
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from models.data.faceset import GENDERS, FaceSet, FaceSetError, faceset_digest, read_manifest
from models.data.splits import read_training_sets
from models.faces.align import TEMPLATE, TEMPLATE_SIZE, WHOLE_TEMPLATE, crop_views, sample_views, template_pixels
from models.faces.calibration import fit_calibration
from models.faces.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_atomically, save_checkpoint
from models.faces.classifier import FaceClassifier, FaceSpec
from models.faces.labelled import align_set
from models.faces.mtcnn import MTCNN
from models.faces.pipeline import Predictor, network_batch
from models.reports.metrics import confusion_matrix
from models.running import cli
from models.running.files import atomic_write
from models.running.ranks import broadcast_from_rank0, init_distributed, per_local_rank, shutdown_distributed

MIN_FACE_SIZE = 40      # pixels, in pictures that are no finished crops: their face is large, as the builder's is
VAL_CROP = 224          # resolution at which validation crops are kept: the builder's own
TEACHER_SHARE = 0.7     # of each target that comes from --teacher; the label makes up the rest
VIEWED = {"cpu": 1, "cuda": 1024}   # pictures whose views are made in one call, whole batches: a GPU waits for calls
BLURRED = 16            # pictures at most that are blurred alike
WARPED = 16             # crops that a CPU makes floats and warps at a time: more would not stay in its caches
AGES = (0, 5, 10, 18, 26, 34, 44, 56, 70)   # lower ends of the age bands that are learnt, years
RESUME_EVERY = 20       # seconds, at least, between two resume files: each takes as long as a GPU's epoch
AVERAGE_EVERY = 4       # steps between two updates of the weight average, which take a fiftieth of a step on a CPU


@dataclass(frozen=True)
class Recipe:
    """How to train. sizes: input side for each share of the epochs, the last one is that of the checkpoint."""
    window: tuple[float, float, float, float]
    sizes: tuple[tuple[float, int], ...]    # (share of the epochs up to which it holds, input side)
    schedule: str                           # 'cosine' over all steps after warm-up, or 'step': a tenth every 20 epochs
    warmup_epochs: float
    weight_decay: float                     # decoupled from Adam's gradient, on weights of two dimensions or more
    label_smoothing: float
    mixup: float                            # share of the batches that are mixed, Beta(0.4, 0.4)
    average: float                          # decay of the weight average per step; 0 keeps the plain weights
    side: float                             # weight of the losses of age and gender, learnt too where they are known
    augment: bool                           # geometry, colour, blur and erasing; else random shift and flip alone
    choose: str                             # 'best' epoch on validation, or the 'last' one


# Chosen on validation; visualizations/experiments.csv has what else was tried.
DEFAULT = Recipe((16, 30, 96, 110), ((0.2, 72), (0.5, 88), (1.0, 104)), "cosine", 2, 0.05, 0.05, 0.3, 0.998,
                 0.2, True, "best")
RECIPES = {
    "default": DEFAULT,
    # A second run from the weights of a first one (--init), at a larger input; made for --epochs 12 --lr 0.0005.
    "refine": replace(DEFAULT, sizes=((0.34, 104), (1.0, 128)), warmup_epochs=1, side=0.0),
    # EthnicityRecognition-UTKFaces: chip at 128, random crop of 104 and flip, Adam, StepLR(20), last epoch.
    "published": Recipe((20, 34, 93.2, 107.2), ((1.0, 104),), "step", 0, 0.0, 0.0, 0.0, 0.0, 0.0, False, "last"),
}


# ---------------------------------------------------------------------------------------------------------- the data
@dataclass
class Crops:
    """A set in memory: whole-template crops (N, 3, R, R) uint8, their labels (N,) int64, and targets (N, T) float32.

    A target is what training aims at: the label as a one-hot row, or mixed with what teachers say; then,
    where a recipe asks for them, age band and gender as one-hot rows too, zeros where they are unknown.
    paths: where the pictures lie, absolute.
    """
    crops: Tensor
    labels: Tensor
    targets: Tensor
    paths: list[str]

    def to(self, device: torch.device) -> "Crops":
        """The same on a device."""
        return Crops(self.crops.to(device), self.labels.to(device), self.targets.to(device), self.paths)


def side_targets(faces: FaceSet) -> Tensor:
    """Age band and gender of a set's pictures as one-hot rows (N, 9 + 2); zeros where its manifest.csv has none."""
    targets = torch.zeros(len(faces), len(AGES) + len(GENDERS))
    manifest = read_manifest(faces.root, faces.files)
    for row, file in enumerate(faces.files if manifest else ()):
        age, gender = manifest[file]["age"] or "", manifest[file]["gender"]
        if age.isdecimal():
            targets[row, bisect.bisect_right(AGES, int(age)) - 1] = 1
        if gender in GENDERS:
            targets[row, len(AGES) + int(gender)] = 1
    return targets


def load_crops(sets: list[FaceSet], resolution: int, args, what: str, side: bool = False) -> Crops:
    """Every picture of the sets as a whole-template crop, aligned on the fly where it is no finished crop.

    side: the targets hold age and gender too.
    """
    crops, labels, paths = [], [], []
    targets = [F.one_hot(faces.labels, len(faces.classes)).float() for faces in sets]
    if side:
        targets = [torch.cat([its, side_targets(faces)], 1) for its, faces in zip(targets, sets, strict=True)]
    detector = MTCNN(min_face_size=MIN_FACE_SIZE).to(args.device)
    for i, faces in enumerate(sets):
        part = torch.empty(len(faces), 3, resolution, resolution, dtype=torch.uint8)
        good, n_faceless = torch.ones(len(faces), dtype=torch.bool), 0
        for batch in align_set(faces.paths(), faces.is_aligned, detector, WHOLE_TEMPLATE, resolution, workers=args.workers,
                               progress=f"{what} {args.data[i]}" if args.rank == 0 else None):
            part[batch.positions] = batch.views
            n_faceless += len(batch.positions) if batch.aligned_by == "template" else 0
            for position, status, reason in batch.failures:
                good[position] = False
                tqdm.write(f"left out: {faces.files[position]}: {status}: {reason}")
        if n_faceless and args.rank == 0:
            print(f"{what} {args.data[i]}: no face was found in {n_faceless} of {len(faces)} pictures; "
                  "they are aligned by the mean landmarks of the others")
        crops.append(part if good.all() else part[good])
        labels.append(faces.labels[good])
        targets[i] = targets[i][good]
        paths += [os.path.abspath(path) for path, kept in zip(faces.paths(), good.tolist(), strict=True) if kept]
    return Crops(crops[0] if len(crops) == 1 else torch.cat(crops), torch.cat(labels), torch.cat(targets), paths)


def read_teacher(path: str, spec: FaceSpec, train: list[FaceSet], val: list[FaceSet], args) -> Checkpoint | dict:
    """A checkpoint of --teacher, or what a table says; one that cannot teach these sets ends the run."""
    try:
        teacher = read_opinions(path, spec.classes) if path.endswith(".csv") else load_checkpoint(path)
    except (CheckpointError, TableError) as error:
        args.parser.error(f"--teacher {path}: {error}")
    if isinstance(teacher, Checkpoint):
        if teacher.spec.classes != spec.classes:
            args.parser.error(f"--teacher {path}: it knows {', '.join(teacher.spec.classes)}; "
                              f"--data has {', '.join(spec.classes)}")
        return teacher
    wanted, unwanted = ([os.path.abspath(file) for faces in sets for file in faces.paths()] for sets in (train, val))
    unknown = next((file for file in wanted if file not in teacher), None)
    if unknown:
        args.parser.error(f"--teacher {path}: it says nothing of {unknown}")
    known = next((file for file in unwanted if file in teacher), None)
    if known:
        args.parser.error(f"--teacher {path}: it learnt from {known}, which is validated on here; make it with the "
                          "same --data, --class_map, --val_share and --seed")
    return teacher


class TableError(Exception):
    """A CSV that is no table of probabilities; the message says why."""


def read_opinions(path: str, classes: tuple[str, ...]) -> dict[str, list[float]]:
    """Probabilities by absolute path of a CSV with columns image (relative to the CSV, or absolute) and p_<class>...

    An empty list for pictures whose cells are empty: they could not be read. Raises TableError.
    """
    columns, said = [f"p_{name}" for name in classes], {}
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            missing = {"image", *columns} - set(reader.fieldnames or ())
            if missing:
                raise TableError(f"it has no column {min(missing)}")
            for row in reader:
                probs = [float(row[name]) for name in columns] if any(row[name] for name in columns) else []
                if not row["image"] or probs and not (min(probs) >= 0 and abs(sum(probs) - 1) < 0.01):
                    raise TableError(f"line {reader.line_num} has no image, or its probabilities do not add up to 1")
                said[os.path.abspath(Path(path).parent / row["image"])] = probs
    except OSError as error:
        raise TableError(error.strerror) from None
    except (csv.Error, TypeError, ValueError) as error:
        raise TableError(f"it cannot be read ({error})") from None
    return said


def learn_from(teachers: list[Checkpoint | dict], train: Crops, args) -> None:
    """Mixes TEACHER_SHARE of what the teachers say, the geometric mean of their probabilities, into the targets."""
    logs = []
    for path, teacher in zip(args.teacher, teachers, strict=True):
        if isinstance(teacher, Checkpoint):
            said = teach(teacher, train.crops, args)
        else:
            unread = next((file for file in train.paths if not teacher[file]), None)
            if unread:
                args.parser.error(f"--teacher {path}: it says nothing of {unread}")
            said = torch.tensor([teacher[file] for file in train.paths])
        logs.append(said.clamp(min=1e-6).log())
    mean = torch.stack(logs).mean(0).softmax(1)
    train.targets[:, :mean.shape[1]].lerp_(mean, TEACHER_SHARE)


def teach(teacher: Checkpoint, crops: Tensor, args) -> Tensor:
    """Probabilities (N, C) float32 of a teacher, the mean of four views: its window and a tighter one, and mirrored.

    Averaging over views makes it better than the teacher alone; a network that learns from it needs one view. The
    biases of its calibration, which favour classes that err, are left out: the pupil's own will do that.
    """
    if teacher.calibration:
        unbiased = replace(teacher.calibration, bias=(0.0,) * len(teacher.spec.classes))
        teacher = replace(teacher, calibration=unbiased)
    predictor, spec = Predictor(teacher, args.device), teacher.spec
    inset = 0.04 * (spec.window[2] - spec.window[0])
    tight = tuple(edge + inset * sign for edge, sign in zip(spec.window, (1, 1, -1, -1), strict=True))
    probs = torch.empty(len(crops), len(spec.classes))
    batches = torch.arange(len(crops)).split(network_batch(args.device))
    for rows in tqdm(batches, desc="teacher", disable=args.rank != 0, unit="batch"):
        some = crops[rows].to(args.device)
        views = [crop_views(some, window, spec.input_size, spec.template) for window in (spec.window, tight)]
        probs[rows] = sum(predictor.probs(view, flip=True) for view in views) / 2
    return probs


def views_of(crops: Tensor, window: tuple, side: int, device: torch.device) -> Tensor:
    """Window of many crops, cut on a device a few at a time: (N, 3, R, R) uint8 -> (N, 3, side, side) uint8 there."""
    views = torch.empty(len(crops), 3, side, side, dtype=torch.uint8, device=device)
    for part, target in zip(crops.split(256), views.split(256), strict=True):
        target.copy_(crop_views(part.to(device), window, side))
    return views


def shrink(crops: Tensor, resolution: int) -> Tensor:
    """Crops at a smaller resolution, without aliasing."""
    return crops if crops.shape[-1] <= resolution else views_of(crops, WHOLE_TEMPLATE, resolution, crops.device)


def working_resolution(window: tuple, side: int) -> int:
    """Resolution of training crops for an input side: 1.25 crop pixels a view pixel keep one bilinear warp sharp."""
    return math.ceil(1.25 * side * TEMPLATE_SIZE / (window[2] - window[0]))


# ------------------------------------------------------------------------------------------------------ augmentation
def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(n,) float32 draws between two bounds."""
    return low + (high - low) * torch.rand(n, generator=generator)


def chosen(n: int, share: float, generator: torch.Generator) -> Tensor:
    """Positions (k,) int64 of the pictures of n that are drawn, each with probability `share`."""
    return (torch.rand(n, generator=generator) < share).nonzero().squeeze(1)


def random_views(crops: Tensor, window: tuple, side: int, augment: bool, generator: torch.Generator) -> Tensor:
    """One warp holds window, shift, scale, rotation, stretch and flip, a fresh draw per picture.

    crops (B, 3, R, R) uint8 -> views (B, 3, side, side) float32 in 0..255. Without `augment`, flip and the shifts of a
    random crop of 104 from 128 alone. All draws are the CPU's: nothing waits for a GPU.
    """
    n = len(crops)
    flip = 1 - 2 * (torch.rand(n, generator=generator) < 0.5).float()
    reach = 5.0 if augment else 12 / 104 * (window[2] - window[0])                          # template pixels
    shift = torch.stack([uniform(n, -reach, reach, generator), uniform(n, -reach, reach, generator)], -1)
    linear = torch.zeros(n, 2, 2)
    linear[:, 0, 0], linear[:, 1, 1] = flip, 1.0
    if augment:
        angle = uniform(n, -12, 12, generator) * (math.pi / 180)
        zoom, stretch = uniform(n, -0.16, 0.16, generator).exp(), uniform(n, -0.06, 0.06, generator).exp()
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        turn = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
        linear = turn @ torch.diag_embed(torch.stack([flip * stretch, 1 / stretch], -1))
    centre = torch.tensor([(window[0] + window[2]) / 2 - 0.5, (window[1] + window[3]) / 2 - 0.5])
    warp = torch.cat([linear, (centre + shift - linear @ centre)[:, :, None]], 2)
    to_crop = template_pixels(warp, crops.shape[-1] / TEMPLATE_SIZE)
    few = WARPED if crops.device.type == "cpu" else max(1, n)
    views = torch.cat([sample_views(some.float(), its, window, side)
                       for some, its in zip(crops.split(few), to_crop.split(few), strict=True)])
    return random_erase(random_blur(random_colour(views, generator), generator), generator) if augment else views


def random_colour(views: Tensor, generator: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation and white balance of each picture, one in fourteen grey.

    All four together are one 3 x 3 matrix and a shift per picture.
    """
    n = len(views)
    saturation = uniform(n, 0.6, 1.4, generator)
    saturation[torch.rand(n, generator=generator) < 0.07] = 0
    gains = uniform(3 * n, -0.06, 0.06, generator).exp().view(n, 3, 1)
    contrast = uniform(n, -0.3, 0.3, generator).exp().view(n, 1, 1)
    brightness = uniform(n, -25, 25, generator).view(n, 1, 1)
    pixels = views.flatten(2)                                                       # (n, 3, side * side)
    mean = pixels.mean((1, 2), keepdim=True)
    kept = saturation.view(n, 1, 1)
    matrix = contrast * gains * (kept * torch.eye(3) + (1 - kept) / 3)
    matrix, lost, brightness = (part.to(views.device, non_blocking=True) for part in (matrix, 1 - contrast, brightness))
    shift = (mean * lost + brightness).expand(n, 3, 1)
    return torch.baddbmm(shift, matrix, pixels).clamp_(0, 255).view_as(views)


def random_blur(views: Tensor, generator: torch.Generator) -> Tensor:
    """One picture in seven shown at a lower resolution, as small faces are in other people's photographs."""
    side = views.shape[-1]
    for few in chosen(len(views), 0.15, generator).to(views.device, non_blocking=True).split(BLURRED):
        if len(few):
            low = int(side * uniform(1, 0.3, 0.8, generator).item())
            small = F.interpolate(views[few], size=low, mode="bilinear", antialias=True)
            views[few] = F.interpolate(small, size=side, mode="bilinear")
    return views


def random_erase(views: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of the pictures lose one rectangle, of a tenth to a half of each side, to one random colour."""
    few = chosen(len(views), 0.25, generator)
    n, side = len(few), views.shape[-1]
    size = uniform(2 * n, 0.1, 0.5, generator).view(n, 2) * side
    start = torch.rand(n, 2, generator=generator) * (side - size)
    at = torch.arange(side)
    rows = (at >= start[:, :1]) & (at < start[:, :1] + size[:, :1])
    columns = (at >= start[:, 1:]) & (at < start[:, 1:] + size[:, 1:])
    colour = uniform(3 * n, 0, 255, generator).view(n, 3, 1, 1)
    few, rows, columns, colour = (part.to(views.device, non_blocking=True) for part in (few, rows, columns, colour))
    hole = (rows[:, :, None] & columns[:, None, :])[:, None]
    views[few] = torch.where(hole, colour, views[few])
    return views


def mix_up(views: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Each picture and its target mixed with its neighbour's, `share` of its own.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018.
    """
    return views.lerp(views.roll(1, 0), 1 - share), targets.lerp(targets.roll(1, 0), 1 - share)


# ---------------------------------------------------------------------------------------------------------- the loop
@dataclass
class Training:
    """All that changes while training: but for `saved`, all that a resume file holds."""
    model: FaceClassifier                   # on the device, bare
    average: FaceClassifier                 # moving average of its weights: the one that is validated and saved
    optimizer: torch.optim.Optimizer
    amp_dtype: torch.dtype | None           # None trains in float32
    epoch: int = 0                          # epochs finished
    best: dict | None = None                # figures of the epoch in the checkpoint
    stale: int = 0                          # epochs since validation loss fell
    lowest_loss: float = math.inf
    saved: float = -math.inf                # when the resume file was written, seconds of time.monotonic

    def state(self) -> dict:
        """Tensors and plain values that `restore` takes back."""
        return {"model": self.model.backbone.state_dict(), "average": self.average.backbone.state_dict(),
                "optimizer": self.optimizer.state_dict(), "amp_dtype": self.amp_dtype, "epoch": self.epoch,
                "best": self.best, "stale": self.stale, "lowest_loss": self.lowest_loss}

    def restore(self, state: dict) -> None:
        """Goes on from a saved state."""
        self.model.backbone.load_state_dict(state["model"])
        self.average.backbone.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("amp_dtype", "epoch", "best", "stale", "lowest_loss"):
            setattr(self, name, state[name])


class WeightGradientByTaps(torch.autograd.Function):
    """conv2d whose weight gradient is a matrix product for each of the kernel's taps.

    oneDNN shares that gradient's work out by pixels. In the last layers, of 512 channels on maps of 3 x 3 or 4 x 4, it
    takes five times as long in bfloat16: a third of a training step at 72 px, a tenth at 104.
    """

    @staticmethod
    def forward(ctx, maps: Tensor, weight: Tensor, stride: tuple, padding: tuple) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(maps, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        maps, weight = ctx.saved_tensors
        of_maps = torch.nn.grad.conv2d_input(maps.shape, weight, gradient, ctx.stride, ctx.padding)
        rows, columns = gradient.shape[2:]
        (down, across), (top, left) = ctx.stride, ctx.padding
        padded = F.pad(maps, (left, left, top, top)).permute(0, 2, 3, 1)                    # (B, h, w, inputs)
        pixels = gradient.permute(1, 0, 2, 3).flatten(1)                                    # (outputs, B h' w')
        of_weight = torch.empty_like(weight)
        for y in range(weight.shape[2]):
            for x in range(weight.shape[3]):
                seen = padded[:, y:y + down * (rows - 1) + 1:down, x:x + across * (columns - 1) + 1:across]
                of_weight[:, :, y, x] = pixels @ seen.flatten(0, 2)
        return of_maps, of_weight, None, None


class SmallMapConv2d(nn.Conv2d):
    """A convolution without bias that takes WeightGradientByTaps where a CPU trains in bfloat16."""

    def forward(self, maps: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return super().forward(maps)
        dtype = torch.get_autocast_dtype("cpu")
        return WeightGradientByTaps.apply(maps.to(dtype), self.weight.to(dtype), self.stride, self.padding)


def speed_up_small_maps(model: FaceClassifier) -> None:
    """Makes the last layers' convolutions SmallMapConv2d, with the weights they have."""
    for module in list(model.backbone.layer4.modules()):
        for name, conv in module.named_children():
            if isinstance(conv, nn.Conv2d):
                fast = SmallMapConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                                      bias=False, device="meta")
                fast.weight = conv.weight
                setattr(module, name, fast)


def start_training(spec: FaceSpec, recipe: Recipe, args) -> Training:
    """Model, average and optimizer at epoch 0; the same on every rank, for the seed is."""
    torch.manual_seed(args.seed)
    model = FaceClassifier(spec)
    initialise(model, args.init)
    if recipe.side:
        widen_head(model)
    speed_up_small_maps(model)
    model = model.to(args.device, memory_format=torch.channels_last)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": recipe.weight_decay},
                                   {"params": plain, "weight_decay": 0.0}], lr=args.lr, fused=True)
    return Training(model, copy.deepcopy(model).eval(), optimizer,
                    broadcast_from_rank0(fastest_format(model, recipe, args.device)))


def initialise(model: FaceClassifier, init: str) -> None:
    """Weights to start from: 'random' leaves torchvision's, 'imagenet', or a checkpoint; its head if of our classes.

    Raises CheckpointError for a file that is none, and where ImageNet weights cannot be had.
    """
    if init == "random":
        return
    if init == "imagenet":
        from torchvision.models import ResNet18_Weights
        try:
            weights = ResNet18_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
        except OSError as error:
            url = ResNet18_Weights.IMAGENET1K_V1.url
            raise CheckpointError(f"torchvision's weights could not be downloaded ({error}); fetch {url} elsewhere and "
                                  f"put it into {torch.hub.get_dir()}/checkpoints") from None
    else:
        start = load_checkpoint(init)
        same = start.spec.classes == model.spec.classes
        weights = {key: value for key, value in start.weights.items() if same or not key.startswith("fc.")}
    own = model.backbone.state_dict()           # torchvision's file has no batch counters, and a head of a thousand
    model.backbone.load_state_dict({key: weights[key] if key in weights and weights[key].shape == value.shape else value
                                    for key, value in own.items()})


def widen_head(model: FaceClassifier) -> None:
    """Gives the last layer outputs for age and gender behind those of the classes, which stay as they are."""
    classes = model.backbone.fc
    wide = nn.Linear(classes.in_features, classes.out_features + len(AGES) + len(GENDERS))
    with torch.no_grad():
        wide.weight[:classes.out_features], wide.bias[:classes.out_features] = classes.weight, classes.bias
    model.backbone.fc = wide


def class_weights(model: FaceClassifier) -> dict[str, Tensor]:
    """The network's weights without the outputs of widen_head, which no one asks for once it is trained."""
    n_classes = len(model.spec.classes)
    return {key: value[:n_classes] if key.startswith("fc.") else value
            for key, value in model.backbone.state_dict().items()}


def fastest_format(model: FaceClassifier, recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """bfloat16 on CUDA, and on a CPU where it beats float32 in a quick check of the network itself; None is float32.

    A CPU with AMX or AVX512_BF16 trains 1.5 to 2.2 times as fast in bfloat16; one with plain AVX-512 is slower in it.
    """
    if device.type == "cuda":
        return torch.bfloat16
    views = torch.zeros(16, 3, recipe.sizes[0][1], recipe.sizes[0][1], dtype=torch.uint8)
    trial = copy.deepcopy(model)
    seconds = {None: math.inf, torch.bfloat16: math.inf}
    for dtype in list(seconds) * 3:                                     # the first round only warms up
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            trial(views).float().sum().backward()
        seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    return min(seconds, key=seconds.get)


def learning_rate(step: int, steps_per_epoch: int, epochs: int, recipe: Recipe, peak: float) -> float:
    """The rate of one step: warm-up from nothing, then cosine to nothing or a tenth every 20 epochs."""
    epoch = step / steps_per_epoch
    warm = min(1.0, (epoch + 1 / steps_per_epoch) / recipe.warmup_epochs) if recipe.warmup_epochs else 1.0
    if recipe.schedule == "step":
        return peak * warm * 0.1 ** int(epoch // 20)
    return peak * warm * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def train_batches(data: Crops, epoch: int, recipe: Recipe, side: int, generator: torch.Generator,
                  args) -> Iterator[tuple[Tensor, Tensor]]:
    """(views (B, 3, side, side) float32, targets (B, T) float32) of this rank's share of one epoch, on the device."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(args.seed * 1000 + epoch))
    order = order[:len(order) // args.world_size * args.world_size][args.rank::args.world_size]
    at_once = max(1, VIEWED[args.device.type] // args.batch_size) * args.batch_size
    for rows in order.to(data.crops.device).split(at_once):
        crops, targets = (part.index_select(0, rows).to(args.device, non_blocking=True)
                          for part in (data.crops, data.targets))
        views = random_views(crops, recipe.window, side, recipe.augment, generator)
        for batch in zip(views.split(args.batch_size), targets.split(args.batch_size), strict=True):
            if len(batch[0]) > 1:                                   # batch norm has no statistics of a single picture
                yield batch


def training_loss(outputs: Tensor, targets: Tensor, n_classes: int, recipe: Recipe) -> Tensor:
    """Cross-entropy of the classes and, weighted by recipe.side, of age and gender: outputs, targets (B, T) -> ().

    What is unknown, a target of zeros, costs nothing and moves nothing.
    """
    parts = (n_classes, len(AGES), len(GENDERS)) if recipe.side else (n_classes,)
    loss = outputs.new_zeros(())
    weights = (1.0, recipe.side, recipe.side)[:len(parts)]
    for weight, some, aim in zip(weights, outputs.split(parts, 1), targets.split(parts, 1), strict=True):
        known = aim.sum(1, keepdim=True)
        smooth = aim.lerp(known / aim.shape[1], recipe.label_smoothing)
        loss = loss + weight * F.cross_entropy(some, smooth)
    return loss


class CapturedNetwork(nn.Module):
    """A model in training whose whole batches of one side run, forward and backward, as CUDA graphs.

    Started one by one, its hundreds of small operations take longer than the GPU needs for them.
    """

    def __init__(self, model: FaceClassifier, side: int, amp_dtype: torch.dtype | None, batch_size: int):
        super().__init__()
        gc.collect()                                                # graphs of another side lie in a circle
        self.model, self.batch_size = model.train(), batch_size
        before = [buffer.clone() for buffer in model.buffers()]
        views = torch.zeros(batch_size, 3, side, side, device=model.scale.device)
        autocast = torch.autocast("cuda", amp_dtype, enabled=amp_dtype is not None, cache_enabled=False)
        with autocast, torch.backends.cudnn.flags(True, benchmark=True):
            self.captured = torch.cuda.make_graphed_callables(copy.copy(model), (views,))   # of the same parameters
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)                                     # batch-norm's statistics have seen the zeros

    def forward(self, views: Tensor) -> Tensor:
        return self.captured(views) if len(views) == self.batch_size else self.model(views)


def quickest_network(training: Training, side: int, args) -> nn.Module:
    """What a lone process calls in an epoch at one input side: the model itself, or its CUDA graphs."""
    if args.device.type == "cuda":
        return CapturedNetwork(training.model, side, training.amp_dtype, args.batch_size)
    return training.model


def take_step(training: Training, network: nn.Module, views: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """Forward, backward and the optimizer's step on one batch; its loss (), which no gradient follows.

    network: as quickest_network gives it, or the model's DistributedDataParallel.
    """
    with torch.autocast(views.device.type, training.amp_dtype, enabled=training.amp_dtype is not None):
        loss = training_loss(network(views).float(), targets, len(training.model.spec.classes), recipe)
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    training.optimizer.step()
    return loss.detach()


def train_one_epoch(training: Training, network: nn.Module, data: Crops, recipe: Recipe, side: int, args) -> float:
    """One pass over the data; the mean loss of all ranks' samples. Raises FloatingPointError where it is not finite.

    network: as for take_step.
    """
    network.train()
    epoch = training.epoch
    steps = math.ceil(len(data.labels) // args.world_size / args.batch_size)
    generator = torch.Generator().manual_seed((args.seed * 1000 + epoch) * 1000 + args.rank)
    chance = random.Random(f"{args.seed} {epoch} {args.rank}")
    loss_sum, seen = torch.zeros((), device=args.device), 0
    bar = tqdm(train_batches(data, epoch, recipe, side, generator, args), total=steps, leave=False,
               desc=f"epoch {epoch + 1}/{args.epochs}", disable=args.rank != 0, unit="batch")
    for step, (views, targets) in enumerate(bar):
        for group in training.optimizer.param_groups:
            group["lr"] = learning_rate(epoch * steps + step, steps, args.epochs, recipe, args.lr)
        if chance.random() < recipe.mixup:
            views, targets = mix_up(views, targets, chance.betavariate(0.4, 0.4))
        loss = take_step(training, network, views, targets, recipe)
        update_average(training.average, training.model, recipe.average, epoch * steps + step)
        loss_sum += loss * len(targets)                             # stays on the device: the loop never waits for it
        seen += len(targets)
        if step % 50 == 49 and args.world_size == 1 and not math.isfinite(loss_sum.item()):
            break
    totals = torch.stack([loss_sum.double(), torch.tensor(float(seen), dtype=torch.float64, device=args.device)])
    if args.world_size > 1:
        dist.all_reduce(totals)
    if not totals.isfinite().all():
        raise FloatingPointError(f"the training loss is not finite in epoch {epoch + 1}; a lower --lr may help")
    return (totals[0] / totals[1].clamp(min=1)).item()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float, step: int) -> None:
    """average <- decay * average + (1 - decay) * model, over weights and batch-norm statistics alike.

    In every AVERAGE_EVERY-th step, by so many steps' decay. In the first thousand steps the decay of an update is
    (step + 1) / (step + 10), so that the random start is forgotten.
    """
    if step % AVERAGE_EVERY:
        return
    decay = min(decay ** AVERAGE_EVERY, (step + 1) / (step + 10))
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    get_ema_multi_avg_fn(decay)(*map(list, zip(*floats, strict=True)), None)        # one call, not a hundred
    for mean, value in pairs:
        if not mean.is_floating_point():                            # batch-norm's counters
            mean.copy_(value)


@torch.inference_mode()
def predict(model: FaceClassifier, views: Tensor, args) -> Tensor:
    """Logits (n, C) float32 of this rank's share of the views, pictures rank, rank + world_size, ..."""
    mine = views[args.rank::args.world_size]
    n_classes = len(model.spec.classes)
    return torch.cat([model(part.to(args.device))[:, :n_classes].float().cpu()
                      for part in mine.split(network_batch(args.device))])


def validate(model: FaceClassifier, views: Tensor, labels: Tensor, args) -> tuple[float, Tensor]:
    """Mean cross-entropy and confusion matrix (C, C) int64 over all ranks: every picture counts once."""
    if args.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    logits, mine = predict(model, views, args), labels[args.rank::args.world_size].cpu()
    loss_sum = F.cross_entropy(logits, mine, reduction="sum").double()
    confusion = confusion_matrix(mine, logits.argmax(1), logits.shape[1])
    if args.world_size > 1:
        totals = torch.cat([loss_sum.view(1), confusion.double().flatten()]).to(args.device)
        dist.all_reduce(totals)
        loss_sum, confusion = totals[0].cpu(), totals[1:].long().view_as(confusion).cpu()
    return (loss_sum / len(labels)).item(), confusion


# ------------------------------------------------------------------------------------------------------- the command
def side_of(epoch: int, epochs: int, recipe: Recipe) -> int:
    """Input side of an epoch, counted from 0."""
    return next(side for share, side in recipe.sizes if epoch < round(share * epochs) or share == 1.0)


def run_epochs(training: Training, recipe: Recipe, train: Crops, val: Crops, args) -> None:
    """Trains from training.epoch to the last one, writing log, checkpoint and resume file."""
    shared = DistributedDataParallel(training.model, broadcast_buffers=False) if args.world_size > 1 else None
    side = None
    while training.epoch < args.epochs and training.stale < args.patience:
        if side != side_of(training.epoch, args.epochs, recipe):
            side = side_of(training.epoch, args.epochs, recipe)
            crops = train.to(args.device) if args.on_device else train
            crops = replace(crops, crops=shrink(crops.crops, working_resolution(recipe.window, side)))
            val_views = views_of(val.crops, recipe.window, side, args.device)
            network = None                                          # what it holds is free before the next is made
            network = shared or quickest_network(training, side, args)
        start = time.perf_counter()
        train_loss = train_one_epoch(training, network, crops, recipe, side, args)
        seconds = time.perf_counter() - start
        validated = training.average if recipe.average else training.model.eval()
        val_loss, confusion = validate(validated, val_views, val.labels, args)
        training.epoch += 1
        figures = {"epoch": training.epoch, "train_loss": train_loss, "val_loss": val_loss,
                   "val_accuracy": confusion.trace().item() / confusion.sum().item(),
                   "lr": training.optimizer.param_groups[0]["lr"], "input_size": side, "seconds": seconds,
                   "images_per_second": len(train.labels) / seconds}
        finish_epoch(training, validated, figures, recipe, args)


def finish_epoch(training: Training, validated: FaceClassifier, figures: dict, recipe: Recipe, args) -> None:
    """Prints and logs an epoch; saves its weights if they are the best at the final input size; in time all of it."""
    final = figures["input_size"] == validated.spec.input_size
    if final:                                                       # smaller inputs only lead up to it
        training.stale = 0 if figures["val_loss"] < training.lowest_loss else training.stale + 1
        training.lowest_loss = min(training.lowest_loss, figures["val_loss"])
    better = training.best is None or figures["val_accuracy"] > training.best["val_accuracy"]
    keep = final and (better or recipe.choose == "last")
    if keep:
        training.best = figures
    if args.rank != 0:
        return
    print(f"epoch {figures['epoch']:3d}/{args.epochs}  {figures['input_size']} px  train loss "
          f"{figures['train_loss']:.4f}  val loss {figures['val_loss']:.4f}  val accuracy "
          f"{100 * figures['val_accuracy']:.2f} %  lr {figures['lr']:.6f}  {figures['seconds']:.0f} s  "
          f"{figures['images_per_second']:.0f} images/s{'  *' if keep else ''}", flush=True)
    with open(args.log, "a") as log:
        log.write(json.dumps(figures) + "\n")
    if keep:
        about = {"epoch": figures["epoch"], "best": figures, "args": args.shown, "recipe": asdict(recipe),
                 "train_files": args.train_files}
        save_checkpoint(args.out, Checkpoint(validated.spec, class_weights(validated), None, about))
    if time.monotonic() - training.saved >= RESUME_EVERY:
        state = training.state() | {"args": args.shown, "recipe": asdict(recipe), "world_size": args.world_size}
        save_atomically(state, args.resume_file)
        training.saved = time.monotonic()


def forget_unfinished(log: Path, epoch: int) -> None:
    """Drops the log's lines after an epoch: a run that was stopped repeats the epochs since its resume file."""
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    log.write_text("".join(line for line in lines if json.loads(line)["epoch"] <= epoch))


def calibrate(val: Crops, args) -> Checkpoint:
    """Fits the saved checkpoint's calibration to the validation crops and saves it again."""
    checkpoint = load_checkpoint(args.out)
    views = views_of(val.crops, checkpoint.spec.window, checkpoint.spec.input_size, args.device)
    logits = predict(checkpoint.classifier(args.device), views, args)
    checkpoint.calibration = fit_calibration(logits, val.labels)
    save_checkpoint(args.out, checkpoint)
    return checkpoint


def draw_losses(log: Path, path: Path) -> None:
    """Training and validation loss, and validation accuracy, by epoch."""
    from matplotlib.figure import Figure
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    left.plot(epochs, [row["train_loss"] for row in rows], color="tab:blue",
              label="train loss (augmented pictures, all that is learnt)")
    left.plot(epochs, [row["val_loss"] for row in rows], label="validation loss", color="tab:orange")
    left.set_xlabel("epoch")
    left.set_ylabel("cross-entropy")
    right = left.twinx()
    right.plot(epochs, [100 * row["val_accuracy"] for row in rows], label="validation accuracy", color="tab:green")
    right.set_ylabel("validation accuracy, %")
    for previous, row in zip(rows, rows[1:], strict=False):
        if row["input_size"] != previous["input_size"]:
            left.axvline(row["epoch"] - 0.5, color="grey", linewidth=0.8, linestyle=":")
            left.annotate(f"{row['input_size']} px", (row["epoch"] - 0.4, left.get_ylim()[1]), va="top", fontsize=8)
    lines = left.get_lines()[:2] + right.get_lines()
    figure.legend(lines, [line.get_label() for line in lines], loc="outside lower center", ncols=3)
    with atomic_write(path) as beside:
        figure.savefig(beside, dpi=120, format="png")


def parse_args(argv: list[str] | None = None):
    """Every default, and the mistakes that can be told before anything slow starts."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", nargs="+", default=["data/utk_races"],
                        help="folders or CSV lists (image, class); several are trained on together")
    parser.add_argument("--class_map", type=cli.class_map, default={}, metavar="FROM=TO,...", help="rename classes")
    parser.add_argument("--out", default="checkpoints/resnet18_utk.pt")
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="default",
                        help="refine goes on from --init, with --epochs 12 --lr 0.0005; published is the plain one of "
                             "EthnicityRecognition-UTKFaces")
    parser.add_argument("--epochs", type=cli.positive_int, default=30)
    parser.add_argument("--batch_size", type=cli.positive_int, default=64, help="pictures per process and step")
    parser.add_argument("--lr", type=cli.positive_float, default=0.001)
    parser.add_argument("--patience", type=cli.positive_int, default=20,
                        help="stop after so many epochs at the last input size without a lower validation loss")
    parser.add_argument("--val_share", type=cli.fraction, default=0.06,
                        help="validation share of a set without a val folder: whole persons, or whole photographs")
    parser.add_argument("--seed", type=cli.non_negative_int, default=2023)
    parser.add_argument("--init", default="random", metavar="random|imagenet|FILE")
    parser.add_argument("--teacher", nargs="+", metavar="FILE",
                        help="to learn from as well: checkpoints of the same classes, or tables of all of --data by "
                             f"facesets/second_opinion.py (.csv); what they say makes up {TEACHER_SHARE} of a target")
    parser.add_argument("--resume", action="store_true", help="go on after the last epoch that was saved")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint of an earlier run")
    cli.add_device(parser)
    parser.add_argument("--workers", type=cli.non_negative_int, default=cli.worker_count(), help="decoding processes")
    parser.add_argument("--vis_dir", default="visualizations", help="where validation_loss.png goes")
    args = parser.parse_args(argv)
    args.shown = {name: str(value) if name == "device" else value for name, value in vars(args).items()}
    args.parser, args.out, args.teacher = parser, Path(args.out), args.teacher or []
    args.log = args.out.with_suffix(".log.jsonl")
    args.resume_file = args.out.with_suffix(".resume.pt")
    return args


def check_outputs(args) -> None:
    """Refuses to lose an earlier run, or to go on with one that was never begun or was begun otherwise."""
    cli.output_folder(args.parser, "--out", args.out.parent)
    cli.output_folder(args.parser, "--vis_dir", args.vis_dir)
    for teacher in args.teacher:
        if Path(teacher).resolve() == args.out.resolve():
            args.parser.error(f"--teacher {teacher}: --out would replace it")
    if not args.resume:
        cli.refuse_existing(args.parser, "--out", [args.out, args.resume_file], args.overwrite)
        return
    if not args.resume_file.is_file():
        args.parser.error(f"--resume: there is no {args.resume_file} to go on from")
    state = torch.load(args.resume_file, map_location="cpu", weights_only=True, mmap=True)
    begun = state["args"]
    for name in ("data", "class_map", "recipe", "epochs", "batch_size", "lr", "val_share", "seed", "init", "teacher"):
        if begun.get(name) != args.shown[name]:
            args.parser.error(f"--resume: {args.resume_file} was begun with another --{name} "
                              f"({begun.get(name)}, now {args.shown[name]})")
    if state.get("world_size") != args.world_size:
        args.parser.error(f"--resume: {args.resume_file} was begun by another number of processes "
                          f"({state.get('world_size')}, now {args.world_size})")
    if state.get("recipe") != asdict(RECIPES[args.recipe]):
        args.parser.error(f"--resume: {args.resume_file} was begun when --recipe {args.recipe} was another; "
                          "--overwrite begins anew")


def warn_of_seen(teachers: list[Checkpoint | dict], args) -> None:
    """Says so where a network to go on from, or to learn from, may have been trained on pictures validated on here."""
    networks = [("--teacher", path, teacher) for path, teacher in zip(args.teacher, teachers, strict=True)
                if isinstance(teacher, Checkpoint)]
    if args.init not in ("random", "imagenet"):
        networks.append(("--init", args.init, load_checkpoint(args.init)))
    for flag, path, network in networks:
        seen = network.metadata.get("train_files")
        if seen and not set(args.train_files.values()) <= set(seen.values()):
            print(f"warning: {flag} {path} was trained on another choice of pictures; where it is of the same sets, "
                  "validation here may hold some of them, and tell too well of the network")


def main(argv: list[str] | None = None) -> None:
    """Reads the sets, trains, calibrates, draws."""
    args = parse_args(argv)
    args.rank, args.world_size, args.device = init_distributed(args.device)
    if args.rank == 0:
        check_outputs(args)
    recipe = RECIPES[args.recipe]
    side = recipe.sizes[-1][1]
    try:
        train_sets, val_sets = read_training_sets(args)
        spec = FaceSpec(train_sets[0].classes, TEMPLATE, recipe.window, side)
        training = start_training(spec, recipe, args)
    except FaceSetError as error:
        args.parser.error(f"--data: {error}")
    except CheckpointError as error:
        args.parser.error(f"--init {args.init}: {error}")
    teachers = [read_teacher(path, spec, train_sets, val_sets, args) for path in args.teacher]
    args.train_files = {root: faceset_digest(faces.files) for root, faces in zip(args.data, train_sets, strict=True)}
    if args.rank == 0:
        warn_of_seen(teachers, args)
    train = load_crops(train_sets, working_resolution(recipe.window, side), args, "train", side=recipe.side > 0)
    val = load_crops(val_sets, VAL_CROP, args, "validation")
    if teachers:
        learn_from(teachers, train, args)
    args.on_device = args.device.type == "cuda" and fits(train.crops, args.device)
    if args.resume:
        training.restore(torch.load(args.resume_file, map_location=args.device, weights_only=True))
        if args.rank == 0:
            forget_unfinished(args.log, training.epoch)
    elif args.rank == 0:
        args.log.unlink(missing_ok=True)
        args.resume_file.unlink(missing_ok=True)
    if args.rank == 0:
        print(f"{len(train.labels)} training and {len(val.labels)} validation pictures of "
              f"{', '.join(spec.classes)}; {args.device}, {training.amp_dtype or torch.float32}", flush=True)
    begun = time.monotonic()
    try:
        run_epochs(training, recipe, train, val, args)
    except FloatingPointError as error:
        args.parser.exit(1, f"{args.parser.prog}: {error}\n")
    if args.rank == 0:
        args.world_size = 1                                          # what is left is this process's alone
        calibrate(val, args)
        draw_losses(args.log, Path(args.vis_dir) / "validation_loss.png")
        args.resume_file.unlink()
        print(f"{args.out}: epoch {training.best['epoch']}, validation accuracy "
              f"{100 * training.best['val_accuracy']:.2f} %, {time.monotonic() - begun:.1f} s")
    shutdown_distributed()


def fits(crops: Tensor, device: torch.device) -> bool:
    """Whether the crops, and a smaller copy, take at most two thirds of this rank's share of a device's free memory."""
    free = torch.cuda.mem_get_info(device)[0]
    return crops.numel() < min(free, per_local_rank(free * torch.cuda.device_count())) / 3


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; --resume goes on after the last epoch that was saved") from None
