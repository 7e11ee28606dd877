"""epoch: training steps on crops, against a plain loop and against the steps alone."""
import io
from contextlib import redirect_stderr
from pathlib import Path

import torch

from benchmarks import baseline
from benchmarks.harness import Bar, Result, take_turns
from benchmarks.inputs import Bench
from models.data.faceset import FaceSet
from models.data.utk import CLASSES
from models.faces.align import TEMPLATE
from models.faces.classifier import FaceSpec
from models.running import cli
from models.running.ranks import init_distributed
from models.training.crops import CropLoading, Crops, crop_resolution, load_crops
from models.training.epochs import take_step, train_one_epoch
from models.training.kernels import accelerate
from models.training.process import Process
from models.training.settings import TrainingSettings
from models.training.state import start_training

BATCH = 64                      # of training
RESOLUTION = 224                # of the crops that the builder writes
EPOCH_CROPS = 13_207            # training pictures of the published split of UTKFace


def bench_epoch(bench: Bench) -> Result:
    """Training steps on the builder's crops, at the last and largest input size."""
    result, sizes = Result(), bench.sizes
    is_whole = sizes.steps is None or (bench.device.type == "cuda" and not bench.quick)
    n_crops = EPOCH_CROPS if is_whole else sizes.steps * BATCH
    settings, process = TrainingSettings(batch_size=BATCH), Process(*init_distributed(bench.device))
    paths = bench.crops(n_crops, RESOLUTION)
    labels = torch.tensor([int(Path(path).name.split("_")[2]) for path in paths])
    faces = FaceSet(Path(), paths, labels, CLASSES, is_aligned=True)
    size = settings.input_size
    with redirect_stderr(io.StringIO()):
        loading = CropLoading(crop_resolution(settings.window, size), cli.worker_count())
        data = load_crops([faces], ["train"], loading, process, has_aux=True).to(bench.device)
    spec = FaceSpec(CLASSES, TEMPLATE, settings.window, size)
    training, reference = (start_training(spec, settings, "random", bench.device) for _ in range(2))
    reference.amp_dtype = training.amp_dtype
    network, reference_network = (accelerate(state.model, size, training.amp_dtype, BATCH)
                                  for state in (training, reference))
    plain = baseline.PlainTraining(len(CLASSES), size, BATCH, bench.device)
    views = torch.rand(BATCH, 3, size, size, device=bench.device).mul_(255)
    views = views.contiguous(memory_format=torch.channels_last)

    def train_on(rows):
        with redirect_stderr(io.StringIO()):                            # a progress bar
            n = len(rows)
            crops = Crops(data.pixels[:n], data.labels[:n], data.targets[:n], data.paths[:n])
            train_one_epoch(training, network, crops, size, settings, process)

    def take_steps(rows):
        for _ in range(0, len(rows), BATCH):
            take_step(reference, reference_network, views, data.targets[:BATCH], settings)

    ours, ceiling, other = result.figures = take_turns(f"training, batch {BATCH}", {
        "ours, crops in memory to steps": (train_on, paths),
        "forward, backward, step on ready tensors": (take_steps, paths),
        "plain loop, files decoded anew": (lambda rows: plain.epoch(rows, labels[:len(rows)]),
                                           paths[:sizes.plain_steps * BATCH])},
        sizes.runs, bench.device, warm=2 * BATCH, always=True)
    result.compare("training: ratio to forward, backward and step alone", ours, ceiling, 0.95)
    result.bars.append(Bar("training: ratio to the plain loop", ours.rate / other.rate, least=1.0))
    if bench.device.type == "cuda":
        result.bars.append(Bar("training: seconds of 30 epochs, all at the largest side",
                               30 * EPOCH_CROPS / ours.rate, most=20))
    result.notes.append(
        f"{len(paths) / BATCH:.0f} batches of {BATCH} at {size} px in "
        f"{training.amp_dtype or torch.float32}, the plain loop {sizes.plain_steps} in float32; an "
        f"epoch on {EPOCH_CROPS:,} crops at this rate: {EPOCH_CROPS / ours.rate:.0f} s, plain "
        f"{EPOCH_CROPS / other.rate:.0f} s. Crops are decoded once, before the first epoch")
    return result
