"""How fast every step is, beside the same work done one picture at a time and beside the most the machine allows.

  align     photographs in memory -> aligned crops of all their faces      against the original MTCNN procedure
  classify  a folder of aligned crops -> predictions.csv                   against batches of one; the network alone
  photos    a folder of photographs -> predictions.csv                     against detect, align, classify one by one
  epoch     training steps on crops                                        against a plain loop; the steps alone
  builder   UTKFace -> a data set (utk_dataset_builder.py)                 against two processes of the original
  start     infer.py on one picture                                        against importing torch and torchvision
  memory    peak memory of infer.py on 100,000 files and on 5,000, of the
            index of 5 million names and of 50,000                         (only with --only memory or --full)

Each entry runs in a process of its own. What is compared takes turns within one run; a figure is the median of its
runs. What both sides find is compared too.
Run it on a machine that does nothing else.

Reads   UTKFace.tar and wild.tar in --data (by default FACES_DATA, else ../shared/data), and a checkpoint.
Writes  --out, JSON: machine, versions, every run's seconds, bars, agreement. Prints the same as Markdown tables.

    python benchmarks/run.py
    python benchmarks/run.py --quick --only classify
"""
import csv
import io
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor

import infer
import utk_dataset_builder as builder
from benchmarks import baseline
from models.data.batches import PhotoBatch, collate_photos, group_sizes, join_batches, load_photos
from models.data.decoding import decode_photo
from models.data.faceset import FaceSet
from models.data.index import index_photos
from models.data.listing import list_images
from models.faces.align import TEMPLATE, TEMPLATE_SIZE, WHOLE_TEMPLATE, align_faces, crop_views
from models.faces.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from models.faces.classifier import FaceSpec
from models.faces.labelled import align_set
from models.faces.mtcnn import MTCNN, Faces
from models.faces.pipeline import DECODE_BATCH, Predictor, network_batch
from models.faces.predictions import read_predictions
from models.running import cli
from models.running.ranks import init_distributed
from models.running.threads import OrderedThreadPool
from models.training.crops import Crops, crop_resolution, load_crops
from models.training.epochs import take_step, train_one_epoch
from models.training.kernels import accelerate
from models.training.process import Process
from models.training.settings import TrainingSettings
from models.training.state import start_training

FACE_SIZES = (20, 40)           # smallest face, pixels
BATCH = 64                      # of training
RESOLUTION = 224                # of the crops that the builder writes
MEGAPIXEL = 1_000_000           # on CUDA photographs are also aligned at this size
NEAR_TIE = 0.04                 # two best probabilities so close may change places when both may move by 0.02
PUBLISHED = (
    "deepface, race model on a Titan V: 0.48 images/s (serengil/deepface#253)",
    "FairFace predict.py: 0.06 to 2.5 images/s (dchen236/FairFace#33, joojs/fairface#17)",
    "facenet-pytorch MTCNN, detection alone, on a P100: 13 photographs/s at 1080p, 20 at 720p, 25 at 540p (its README)",
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured. plain_*: items of the one-by-one side, which is slower; rates are compared."""
    runs: int = 5
    chips: int = 512
    photos: int | None = None               # None is all of wild.tar
    agreed: int = 512                       # chips that both sides label end to end once, to compare the answers
    crops: int = 4096
    plain_crops: int = 384
    steps: int | None = 20                  # of the 207 of an epoch on 13,207 crops; None is all
    plain_steps: int = 8
    built: int | None = None                # None is all of UTKFace
    plain_built: int = 2000
    builder_runs: int = 1                   # all of UTKFace takes minutes
    memory_runs: tuple[int, int] = (5_000, 100_000)
    listed: tuple[int, int] = (50_000, 5_000_000)


SIZES = {"default": Sizes(),
         "quick": Sizes(3, 64, 64, 32, 512, 96, 4, 2, 400, 400, 1, (500, 2_000), (1_000, 50_000)),
         "full": Sizes(steps=None, builder_runs=5)}
EPOCH_CROPS = 13_207            # training pictures of the published split of UTKFace


# --------------------------------------------------------------------------------------------------------- the results
@dataclass
class Figure:
    """A measured procedure: the seconds of its runs, each over n items."""
    case: str
    procedure: str
    n: int
    seconds: list[float]
    cores: float | None = None          # busy CPU cores, on average
    gpu: float | None = None            # percent of the time in which the GPU computed
    peak_mb: float | None = None        # of a process that does nothing else

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        return self.n / self.median


@dataclass
class Bar:
    """What is asked of a figure: at least, or at most."""
    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        return self.value >= self.least if self.least is not None else self.value <= self.most


@dataclass
class Result:
    """What an entry found."""
    figures: list[Figure] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    agreement: dict[str, dict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def compare(self, name: str, ours: Figure, other: Figure, least: float) -> None:
        """Adds a bar on the ratio of two rates."""
        self.bars.append(Bar(name, ours.rate / other.rate, least))


def take_turns(case: str, procedures: dict[str, tuple[Callable, list]], runs: int, device: torch.device,
               warm: int | None = None, always: bool = False) -> list[Figure]:
    """A figure for each procedure (function, items), which run in turns, `runs` times; `warm` items go before.

    always: before each run, not only the first; where a run is a short piece of something long, what it takes to get
    memory back from the procedure before it is no part of that.
    """
    for function, items in procedures.values():
        function(items[:warm])
    figures = [Figure(case, name, len(items), []) for name, (_, items) in procedures.items()]
    busy, gpu = [0.0] * len(figures), [[] for _ in figures]
    for _ in range(runs):
        for i, (function, items) in enumerate(procedures.values()):
            if always:
                function(items[:warm])
            with GpuMeter(device) as meter:
                cpu, start = sum(os.times()[:4]), time.perf_counter()
                function(items)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                figures[i].seconds.append(time.perf_counter() - start)
                busy[i] += sum(os.times()[:4]) - cpu
            gpu[i] += meter.percents
    for figure, seconds, percents in zip(figures, busy, gpu, strict=True):
        figure.cores = seconds / sum(figure.seconds)
        figure.gpu = statistics.mean(percents) if percents else None
    return figures


class GpuMeter:
    """Samples of a CUDA device's utilisation, by nvidia-smi every 100 ms, while the block runs; none elsewhere."""

    def __init__(self, device: torch.device):
        self.device, self.percents, self.process = device, [], None

    def __enter__(self):
        if self.device.type == "cuda" and shutil.which("nvidia-smi"):
            which = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
            self.process = subprocess.Popen(
                ["nvidia-smi", "-i", which, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits",
                 "-lms", "100"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            self.percents = [int(line) for line in self.process.communicate()[0].split() if line.isdecimal()]


# ------------------------------------------------------------------------------------------------------ the same answer
def same_faces(ours: list[Faces], plain: list[Faces]) -> dict:
    """How many faces of the plain procedure are found too (IoU of 0.9 or more), and how far landmarks are apart."""
    found, distances = 0, [0.0]
    for mine, theirs in zip(ours, plain, strict=True):
        if len(mine.boxes) and len(theirs.boxes):
            overlap, match = torchvision.ops.box_iou(theirs.boxes, mine.boxes).max(1)
            same = overlap >= 0.9
            found += int(same.sum())
            apart = (mine.landmarks[match[same]] - theirs.landmarks[same]).norm(dim=2)
            distances += apart.flatten().tolist()
    return {"faces": sum(len(faces.boxes) for faces in ours), "plain_faces": sum(len(faces.boxes) for faces in plain),
            "same": found, "landmarks_apart_px": max(distances)}


def same_labels(ours: Path, plain: Path) -> dict:
    """How far two tables of predictions agree, file by file, on the files of the plain one.

    near_ties: those of the different labels whose two best probabilities lie within NEAR_TIE in the plain table.
    """
    mine = {Path(row["file"]).name: row for row in read_predictions(ours)}
    with open(plain, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    faces, different, near, apart, statuses = 0, 0, 0, 0.0, 0
    for row in rows:
        own = mine[row["file"]]
        if row["status"] != "ok" or own["status"] != "ok":
            statuses += row["status"] != own["status"]
            continue
        names = [name for name in row if name.startswith("p_")]
        probs = np.array([[float(one[name]) for name in names] for one in (row, own)])
        faces += 1
        apart = max(apart, float(np.abs(probs[0] - probs[1]).max()))
        if probs[0].argmax() != probs[1].argmax():
            different += 1
            near += bool(np.diff(np.sort(probs[0])[-2:])[0] <= NEAR_TIE)
    return {"files": len(rows), "other_status": statuses, "faces": faces, "other_label": different,
            "near_ties": near, "largest_difference": apart}


def both_agreements(first: dict, second: dict) -> dict:
    """What same_labels found on two sets of pictures, as one."""
    return {key: max(value, second[key]) if key == "largest_difference" else value + second[key]
            for key, value in first.items()}


def agreement_bars(name: str, found: dict) -> list[Bar]:
    """The three bars on two tables of predictions."""
    judged = max(1, found["faces"] + found["other_status"])
    return [Bar(f"{name}: labels that agree, %", 100 * (found["faces"] - found["other_label"]) / judged, least=99.8),
            Bar(f"{name}: largest difference of a probability", found["largest_difference"], most=0.02),
            Bar(f"{name}: other labels that are no near-tie", found["other_label"] - found["near_ties"], most=0)]


# --------------------------------------------------------------------------------------------------------- the pictures
class Bench:
    """What the entries share: where, how much, and pictures unpacked into a temporary folder when first asked for."""

    def __init__(self, data: Path, folder: Path, ckpt: str, device: torch.device, sizes: Sizes, quick: bool):
        self.data, self.folder, self.ckpt, self.device = data, folder, ckpt, device
        self.sizes, self.quick = sizes, quick

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint whose network runs, read where it is first asked for: an entry's own process."""
        return load_checkpoint(self.ckpt)

    def chips(self, n: int | None) -> list[str]:
        """Paths of n chips of UTKFace of races 0 to 3, evenly over the sorted names, or of all."""
        return self.unpack("UTKFace.tar", n, lambda name: name.split("_")[2:3] in (["0"], ["1"], ["2"], ["3"]))

    def photos(self) -> list[str]:
        """Paths of ordinary photographs."""
        return self.unpack("wild.tar", self.sizes.photos, lambda name: True)

    def unpack(self, archive: str, n: int | None, wanted: Callable[[str], bool]) -> list[str]:
        """Sorted paths of n pictures of an archive, alone in a folder."""
        target = self.folder / f"{archive.removesuffix('.tar')}_{n or 'all'}"
        if not target.exists():
            target.mkdir()
            with tarfile.open(self.data / archive) as tar:
                members = sorted((m for m in tar if m.isfile() and wanted(Path(m.name).name)), key=lambda m: m.name)
                if n is not None and n < len(members):
                    members = [members[i * len(members) // n] for i in range(n)]
                for member in members:
                    (target / Path(member.name).name).write_bytes(tar.extractfile(member).read())
        return [str(target / name) for name in list_images(target)]

    def crops(self, n: int, side: int) -> list[str]:
        """Paths of n aligned crops of the whole template, JPEG of quality 95, alone in a folder."""
        target = self.folder / f"crops_{n}_{side}"
        if not target.exists():
            target.mkdir()
            chips, detector = self.chips(n), MTCNN(min_face_size=40).to(self.device)
            for batch in align_set(chips, False, detector, WHOLE_TEMPLATE, side):
                for position, view in zip(batch.positions, batch.views, strict=True):
                    picture = Image.fromarray(view.permute(1, 2, 0).numpy())
                    picture.save(target / Path(chips[position]).name, quality=95, subsampling=0)
        return [str(target / name) for name in list_images(target)]


# ---------------------------------------------------------------------------------------------------------------- align
def bench_align(bench: Bench) -> Result:
    """Detection and alignment of decoded pictures, all faces of each."""
    result = Result()
    cases = [("chips", bench.chips(bench.sizes.chips), 4.0), ("photographs", bench.photos(), 2.5)]
    for name, paths, least in cases:
        photos = [decode_photo(path)[0] for path in paths]
        for face_size in FACE_SIZES:
            case = f"{name}, smallest face {face_size}"
            detector = MTCNN(min_face_size=face_size).to(bench.device)
            plain = baseline.PlainMTCNN(face_size, bench.device)
            found = {}
            ours, other = figures = take_turns(case, {
                "ours": (lambda items, d=detector, f=found: f.update(ours=align_batches(items, d)), photos),
                "original procedure": (lambda items, d=plain, f=found: f.update(plain=align_each(items, d)), photos)},
                bench.sizes.runs, bench.device, warm=DECODE_BATCH)
            if not bench.quick:
                for figure in figures:
                    figure.peak_mb = peak_alone(align_files, paths, face_size, figure is ours, bench.device)
            result.figures += figures
            result.compare(f"{case}: ratio to the original procedure", ours, other, least)
            same = result.agreement[case] = same_faces(**found)
            result.bars.append(Bar(f"{case}: faces of the original found too, %",
                                   100 * same["same"] / max(1, same["plain_faces"]), least=99.0))
    if bench.device.type == "cuda":
        align_megapixels(bench, result)
    return result


def align_batches(photos: list[Tensor], detector: MTCNN) -> list[Faces]:
    """Detects and aligns as infer.py does, in batches; the faces of each picture, in the order of the pictures."""
    device = next(detector.parameters()).device
    groups = [[start + i for i in group] for start in range(0, len(photos), DECODE_BATCH)
              for group in group_sizes(photos[start:start + DECODE_BATCH])]

    def collate(group: list[int]) -> PhotoBatch:
        return PhotoBatch(group, *collate_photos([photos[i] for i in group]), torch.ones(len(group)), [])

    def align(batch: PhotoBatch) -> dict[int, Faces]:
        images = batch.images.to(device)
        faces = detector.detect(images, batch.sizes)
        align_faces(images, batch.sizes, faces.image_index, faces.landmarks, WHOLE_TEMPLATE, TEMPLATE_SIZE)
        faces = Faces(*(value.cpu() for value in vars(faces).values()))
        return {i: faces.select(faces.image_index == k) for k, i in enumerate(batch.positions)}

    found = {}
    with OrderedThreadPool(device) as pool:
        batches = join_batches(pool.ordered_map(collate, groups), len(photos), device)
        for its in pool.ordered_map(align, batches):
            found |= its
    return [found[i] for i in range(len(photos))]


def align_each(photos: list[Tensor], detector: baseline.PlainMTCNN) -> list[Faces]:
    """Detects and aligns one picture after another."""
    found = [detector.detect(photo) for photo in photos]
    for photo, faces in zip(photos, found, strict=True):
        baseline.align_one(photo, faces, WHOLE_TEMPLATE, TEMPLATE_SIZE)
    return found


def align_megapixels(bench: Bench, result: Result) -> None:
    """Photographs of one megapixel, on CUDA, where the rate and not a ratio is asked for."""
    photos = []
    for path in bench.photos():
        photo = decode_photo(path)[0]
        scale = (MEGAPIXEL / (photo.shape[1] * photo.shape[2])) ** 0.5
        photos.append(F.interpolate(photo[None].float(), scale_factor=scale, mode="bilinear")[0].byte())
    detector = MTCNN(min_face_size=20).to(bench.device)
    figure, = take_turns("photographs of one megapixel, smallest face 20",
                         {"ours": (lambda items: align_batches(items, detector), photos)},
                         bench.sizes.runs, bench.device, warm=DECODE_BATCH)
    result.figures.append(figure)
    result.bars.append(Bar("photographs of one megapixel: images/s", figure.rate, least=300))


def align_files(paths: list[str], face_size: float, batched: bool, device: torch.device) -> None:
    """Decodes, detects and aligns files as they come, nothing kept."""
    if batched:
        detector = MTCNN(min_face_size=face_size).to(device)
        for start in range(0, len(paths), DECODE_BATCH):
            align_batches([decode_photo(path)[0] for path in paths[start:start + DECODE_BATCH]], detector)
    else:
        detector = baseline.PlainMTCNN(face_size, device)
        for path in paths:
            align_each([decode_photo(path)[0]], detector)


def call_alone(function: Callable, *args):
    """What a function returns in a new process, where nothing that ran before can have an effect."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_alone(function: Callable, *args) -> float | None:
    """Peak resident memory, in MB, of a new process that calls a function; None where Linux's /proc is missing."""
    return call_alone(peak_after, function, args)


def peak_after(function: Callable, args: tuple) -> float | None:
    """Calls a function; the peak resident memory of this process, in MB."""
    function(*args)
    return memory_line(Path("/proc/self/status"), "VmHWM")


def memory_line(path: Path, name: str) -> float | None:
    """A line of a file of /proc that gives kilobytes, in MB; None where it is not there any more."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


# ------------------------------------------------------------------------------------------------- files to predictions
def label_folder(bench: Bench, folder: str, predictor: Predictor, detector: MTCNN | None, *flags: str) -> Path:
    """Does what infer.py does between its start and its summary, networks loaded: a folder -> predictions.csv."""
    parser, out = infer.build_parser(), bench.folder / "out"
    args = parser.parse_args(["--input_dir", str(folder), "--output_dir", str(out), "--ckpt", bench.ckpt,
                              "--device", str(bench.device), "--overwrite", *flags])
    infer.check_flags(parser, args)
    run = infer.open_run(parser, args, 0)
    settings = infer.choose_settings(args, run, bench.device)
    infer.label_part(run, run.todo, predictor, detector, settings, args, show=False)
    infer.merge_run(run, args, bench.checkpoint.spec.classes)
    run.photos.close()
    shutil.rmtree(run.folder)
    return out / "predictions.csv"


def bench_classify(bench: Bench) -> Result:
    """Aligned crops, 112 x 112 JPEG files -> predictions.csv."""
    result, sizes, spec = Result(), bench.sizes, bench.checkpoint.spec
    paths = bench.crops(sizes.crops, TEMPLATE_SIZE)
    folder, plain_out = str(Path(paths[0]).parent), bench.folder / "plain_crops.csv"
    predictor, plain = Predictor(bench.checkpoint, bench.device), baseline.PlainClassifier(bench.checkpoint, bench.device)
    some = torch.cat([b.images for b in load_photos(paths, DECODE_BATCH, 0)])
    views = crop_views(some, spec.window, spec.input_size, spec.template).to(bench.device)
    ready = views.split(network_batch(bench.device))
    workers = infer.decode_workers(None, len(paths), bench.device)
    ours, alone, decoded, other = figures = take_turns("aligned crops", {
        "ours, files to predictions.csv": (lambda _: label_folder(bench, folder, predictor, None), paths),
        "network alone, ready tensors": (lambda _: label_ready(ready, predictor), paths),
        "decoding alone": (lambda _: decode_all(paths, workers, bench.device), paths),
        "one file after another": (lambda items: baseline.label_crops(list(map(Path, items)), plain_out, plain),
                                   paths[::len(paths) // sizes.plain_crops][:sizes.plain_crops])},
        sizes.runs, bench.device, warm=16)
    result.figures += figures
    result.compare("aligned crops: ratio to one file after another", ours, other, 2.5)
    result.compare("aligned crops: ratio to the ceiling", ours, min(alone, decoded, key=lambda f: f.rate), 0.9)
    result.notes.append("the ceiling is the network alone on ready tensors, or decoding alone where that is slower")
    result.agreement["aligned crops"] = same_labels(bench.folder / "out" / "predictions.csv", plain_out)
    result.bars += agreement_bars("aligned crops", result.agreement["aligned crops"])
    return result


def label_ready(ready: tuple[Tensor, ...], predictor: Predictor) -> None:
    """Runs the network over ready views as infer.py does, nothing else."""
    with OrderedThreadPool(predictor.device) as pool:
        for _ in pool.ordered_map(predictor.probs, ready):
            pass


def decode_all(paths: list[str], workers: int, device: torch.device) -> None:
    """Decodes files as infer.py does, nothing kept."""
    with OrderedThreadPool(device) as pool:
        for _ in load_photos(paths, DECODE_BATCH, workers, pool=pool):
            pass


def bench_photos(bench: Bench) -> Result:
    """Ordinary photographs -> predictions.csv, the largest face of each, smallest face 20.

    Answers are compared on chips too: of the photographs' 194 faces a single tie would be more than 0.2 %.
    """
    result, sizes, paths = Result(), bench.sizes, bench.photos()
    folder, plain_out = str(Path(paths[0]).parent), bench.folder / "plain_photos.csv"
    predictor, detector = Predictor(bench.checkpoint, bench.device), MTCNN(min_face_size=20).to(bench.device)
    plain_net = baseline.PlainClassifier(bench.checkpoint, bench.device)
    plain_mtcnn = baseline.PlainMTCNN(20, bench.device)
    ours, other = result.figures = take_turns("photographs, end to end", {
        "ours, files to predictions.csv": (lambda _: label_folder(bench, folder, predictor, detector), paths),
        "one photograph after another": (
            lambda items: baseline.label_photos(list(map(Path, items)), plain_out, plain_mtcnn, plain_net), paths)},
        sizes.runs, bench.device, warm=8)
    result.compare("photographs: ratio to one after another", ours, other, 4.0)
    agreed = result.agreement
    agreed["photographs"] = same_labels(bench.folder / "out" / "predictions.csv", plain_out)
    chips = bench.chips(sizes.agreed)
    table = label_folder(bench, str(Path(chips[0]).parent), predictor, detector, "--align", "always")
    baseline.label_photos(list(map(Path, chips)), plain_out, plain_mtcnn, plain_net)
    agreed["chips"] = same_labels(table, plain_out)
    result.bars += agreement_bars("photographs and chips", both_agreements(agreed["photographs"], agreed["chips"]))
    result.notes += [f"published: {line}" for line in PUBLISHED]
    return result


# ---------------------------------------------------------------------------------------------------------------- epoch
def bench_epoch(bench: Bench) -> Result:
    """Training steps on the builder's crops, at the last and largest input size of the default recipe."""
    result, sizes = Result(), bench.sizes
    whole = sizes.steps is None or (bench.device.type == "cuda" and not bench.quick)
    n = EPOCH_CROPS if whole else sizes.steps * BATCH
    settings, process = TrainingSettings(batch_size=BATCH), Process(*init_distributed(bench.device))
    paths = bench.crops(n, RESOLUTION)
    labels = torch.tensor([int(Path(path).name.split("_")[2]) for path in paths])
    faces = FaceSet(Path(), paths, labels, builder.CLASSES, is_aligned=True)
    size = settings.input_size
    with redirect_stderr(io.StringIO()):
        data = load_crops([faces], ["train"], crop_resolution(settings.window, size), process,
                          cli.worker_count(), has_aux=True).to(bench.device)
    spec = FaceSpec(builder.CLASSES, TEMPLATE, settings.window, size)
    training, reference = (start_training(spec, settings, "random", bench.device) for _ in range(2))
    reference.amp_dtype = training.amp_dtype
    network, reference_network = (accelerate(state.model, size, training.amp_dtype, BATCH)
                                  for state in (training, reference))
    plain = baseline.PlainTraining(len(builder.CLASSES), size, BATCH, bench.device)
    views = torch.rand(BATCH, 3, size, size, device=bench.device).mul_(255)
    views = views.contiguous(memory_format=torch.channels_last)

    def steps_of(rows):
        with redirect_stderr(io.StringIO()):                            # a progress bar
            n = len(rows)
            crops = Crops(data.pixels[:n], data.labels[:n], data.targets[:n], data.paths[:n])
            train_one_epoch(training, network, crops, size, settings, process)

    ours, ceiling, other = result.figures = take_turns(f"training, batch {BATCH}", {
        "ours, crops in memory to steps": (steps_of, paths),
        "forward, backward, step on ready tensors": (
            lambda rows: [take_step(reference, reference_network, views, data.targets[:BATCH], settings)
                          for _ in range(0, len(rows), BATCH)], paths),
        "plain loop, files decoded anew": (
            lambda rows: plain.epoch(rows, labels[:len(rows)]), paths[:sizes.plain_steps * BATCH])},
        sizes.runs, bench.device, warm=2 * BATCH, always=True)
    result.compare("training: ratio to forward, backward and step alone", ours, ceiling, 0.95)
    result.bars.append(Bar("training: ratio to the plain loop", ours.rate / other.rate, least=1.0))
    if bench.device.type == "cuda":
        result.bars.append(Bar("training: seconds of 30 epochs, all at the largest side", 30 * EPOCH_CROPS / ours.rate,
                               most=20))
    result.notes.append(f"{len(paths) / BATCH:.0f} batches of {BATCH} at {size} px in "
                        f"{training.amp_dtype or torch.float32}, the plain loop {sizes.plain_steps} in float32; an "
                        f"epoch on {EPOCH_CROPS:,} crops at this rate: {EPOCH_CROPS / ours.rate:.0f} s, plain "
                        f"{EPOCH_CROPS / other.rate:.0f} s. Crops are decoded once, before the first epoch")
    return result


# ---------------------------------------------------------------------------------------------- builder, start, memory
def bench_builder(bench: Bench) -> Result:
    """utk_dataset_builder.py as a user runs it, the start of Python included; the plain processes already started."""
    result, sizes = Result(), bench.sizes
    chips, sample = bench.chips(sizes.built), bench.chips(sizes.plain_built)

    def ours(_):
        run_command("utk_dataset_builder.py", "--src", str(Path(chips[0]).parent), "--dst", str(bench.folder / "built"),
                    "--vis_dir", str(bench.folder / "vis"), "--overwrite")

    all_of, plain = Figure("UTKFace, smallest face 40", "ours, whole command", len(chips), []), Figure(
        "UTKFace, smallest face 40", "two processes of the original procedure", len(sample), [])
    (bench.folder / "plain_built").mkdir(exist_ok=True)
    for _ in range(sizes.builder_runs):
        all_of.seconds.append(seconds_of(ours, None))
        plain.seconds.append(baseline.build(sample, bench.folder / "plain_built", builder.MIN_FACE_SIZE,
                                            builder.OUT_RES))
    result.figures = [all_of, plain]
    result.compare("builder: ratio to two processes of the original procedure", all_of, plain, 2.0)
    result.notes.append(f"the original procedure is measured on {len(sample):,} chips: at its rate all "
                        f"{len(chips):,} take {len(chips) / plain.rate:.0f} s. Detection, alignment and encoding only; "
                        "ours also reads, groups, splits and draws")
    if sizes.built is None:
        result.bars.append(Bar("builder: seconds for all of UTKFace", all_of.median, most=120))
    return result


def seconds_of(function: Callable, *args) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def run_command(*words: str) -> None:
    """Runs python with some words in the repository's root; its output is shown where it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}")


def bench_start(bench: Bench) -> Result:
    """infer.py on one picture, as a user runs it."""
    picture = bench.folder / "one"
    picture.mkdir(exist_ok=True)
    shutil.copy(bench.photos()[0], picture)
    ours, bare = figures = take_turns("start", {
        "infer.py on one photograph": (lambda _: run_command(
            "infer.py", "--input_dir", str(picture), "--output_dir", str(bench.folder / "one_out"), "--overwrite",
            "--ckpt", os.path.abspath(bench.ckpt), "--device", str(bench.device)), [1]),
        "import torch, torchvision": (lambda _: run_command("-c", "import torch, torchvision"), [1])},
        bench.sizes.runs, bench.device)
    return Result(figures, [Bar("start: seconds of infer.py over those of the imports", ours.median / bare.median,
                                most=1.5)])


def bench_memory(bench: Bench) -> Result:
    """Peak memory of infer.py and its workers on few files and on many, links to the same few hundred crops (Linux).

    And of a new process that does nothing but index a list of names.
    """
    result, crops = Result(), bench.crops(300, TEMPLATE_SIZE)
    for n in bench.sizes.memory_runs:
        folder = bench.folder / f"links_{n}"
        folder.mkdir()
        for i in range(n):
            os.link(crops[i % len(crops)], folder / f"{i:07d}.jpg")
        command = [sys.executable, "infer.py", "--input_dir", str(folder), "--output_dir",
                   str(bench.folder / f"links_out_{n}"), "--ckpt", os.path.abspath(bench.ckpt), "--device",
                   str(bench.device)]
        start, peak = time.perf_counter(), peak_of_tree(command)
        result.figures.append(Figure("memory", f"infer.py on {n:,} files", n, [time.perf_counter() - start],
                                     peak_mb=peak))
    few, many = (figure.peak_mb for figure in result.figures)
    result.bars.append(Bar("memory: MB more on many files than on few", many - few, most=60))
    indexes = []
    for n in bench.sizes.listed:
        start = time.perf_counter()
        peak = peak_alone(index_names, bench.folder / f"list_{n}", n)
        indexes.append(Figure("memory", f"index of a list of {n:,} names", n, [time.perf_counter() - start],
                              peak_mb=peak))
    few, many = (figure.peak_mb for figure in indexes)
    result.figures += indexes
    result.bars.append(Bar("memory: MB more for the index of many names than of few", many - few, most=60))
    result.notes.append("memory of infer.py is the sum of the peaks of the process and its workers; pages they share "
                        "count for each")
    return result


def index_names(folder: Path, n: int) -> None:
    """Writes a list of n names, indexes it as infer.py --in_list does, and reads every thousandth name."""
    folder.mkdir()
    with open(folder / "list.txt", "w") as file:
        file.writelines(f"people/{i // 20:07d}/{i:09d}.jpg\n" for i in range(n))
    index = index_photos(folder, None, str(folder / "list.txt"))
    if len(index) != n or any(index.name(i) != f"people/{i // 20:07d}/{i:09d}.jpg" for i in range(0, n, 1000)):
        raise RuntimeError("the index does not hold the names of the list")


def peak_of_tree(command: list[str]) -> float:
    """Runs a command in the repository's root; the sum of the peaks, in MB, of it and its descendants (Linux)."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks: dict[int, float] = {}
    while process.poll() is None:
        for pid in descendants(process.pid):
            peaks[pid] = memory_line(Path(f"/proc/{pid}/status"), "VmHWM") or peaks.get(pid, 0.0)
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return sum(peaks.values())


def descendants(pid: int) -> list[int]:
    """A process and all below it, as far as they still run."""
    found = [pid]
    for one in found:                                           # grows while it is walked
        try:
            tasks = list(Path(f"/proc/{one}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


ENTRIES = {"align": bench_align, "classify": bench_classify, "photos": bench_photos, "epoch": bench_epoch,
           "builder": bench_builder, "start": bench_start, "memory": bench_memory}


# ---------------------------------------------------------------------------------------------------------- the command
def parse_args(argv: list[str] | None = None):
    """The checked command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--device", type=cli.device, default="cpu", help="cpu, cuda or cuda:N (%(default)s)")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--quick", action="store_true", help="three runs over few pictures, to see that it works")
    much.add_argument("--full", action="store_true", help="a whole epoch, five runs of the builder, and memory")
    add("--only", choices=ENTRIES, metavar="NAME", help=", ".join(ENTRIES))
    add("--data", type=Path, default=Path(os.environ.get("FACES_DATA", ROOT.parent / "shared" / "data")), metavar="DIR",
        help="folder with UTKFace.tar and wild.tar (FACES_DATA, else ../shared/data beside the repository)")
    add("--ckpt", default=str(ROOT / "checkpoints/resnet18_general.pt"), metavar="FILE", help="checkpoint whose network runs")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results.json", metavar="FILE", help="where the figures go")
    args = parser.parse_args(argv)
    for archive in ("UTKFace.tar", "wild.tar"):
        if not (args.data / archive).is_file():
            parser.error(f"--data {args.data}: has no {archive}")
    try:
        load_checkpoint(args.ckpt)
    except CheckpointError as error:
        parser.error(f"--ckpt {args.ckpt}: {error}")
    cli.output_folder(parser, "--out", args.out.parent)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    names = [args.only] if args.only else [name for name in ENTRIES if name != "memory" or args.full]
    size = "quick" if args.quick else "full" if args.full else "default"
    about = {"machine": describe_machine(args.device), "versions": versions(), "size": asdict(SIZES[size]),
             "command": " ".join(["benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)])}
    print(f"{about['machine']}\n{about['versions']}\n", flush=True)
    results = {}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        bench = Bench(args.data, Path(folder), args.ckpt, args.device, SIZES[size], args.quick)
        for name in names:
            start = time.perf_counter()
            results[name] = call_alone(ENTRIES[name], bench)
            print(format_result(name, results[name], time.perf_counter() - start), flush=True)
            args.out.write_text(json.dumps(about | {"results": {n: as_json(r) for n, r in results.items()}}, indent=1)
                                + "\n")
    missed = [bar.name for result in results.values() for bar in result.bars if not bar.met]
    print(f"bars missed: {'; '.join(missed)}" if missed else "all bars met", f"({args.out})")


def describe_machine(device: torch.device) -> str:
    """Processor, cores, memory, GPU, and how busy the machine was before the start."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory = memory_line(Path("/proc/meminfo"), "MemTotal")
    parts = [f"{model} ({torch.backends.cpu.get_cpu_capability()})", f"{cli.worker_count()} cores used",
             f"{torch.get_num_threads()} threads"]
    parts += [f"{memory / 1024:.0f} GB"] if memory else []
    parts += [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return ", ".join([*parts, f"load before the start {os.getloadavg()[0]:.1f}"])


def versions() -> str:
    """Of what decides the speed."""
    return (f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
            f"Pillow {PIL.__version__}, numpy {np.__version__}")


def as_json(result: Result) -> dict:
    """A result with what is computed from it."""
    return {"figures": [asdict(figure) | {"median_s": figure.median, "per_second": figure.rate}
                        for figure in result.figures],
            "bars": [asdict(bar) | {"met": bar.met} for bar in result.bars],
            "agreement": result.agreement, "notes": result.notes}


def format_result(name: str, result: Result, seconds: float) -> str:
    """An entry's tables, in Markdown."""
    lines = [f"### {name} ({seconds:.0f} s)", "",
             "| case | procedure | n | runs | seconds, median (least to most) | per second | cores busy | GPU % | MB |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for figure in result.figures:
        low, high = min(figure.seconds), max(figure.seconds)
        cells = [figure.case, figure.procedure, f"{figure.n:,}", len(figure.seconds),
                 f"{figure.median:.2f} ({low:.2f} to {high:.2f})", f"{figure.rate:.1f}", shown(figure.cores, ".2f"),
                 shown(figure.gpu, ".0f"), shown(figure.peak_mb, ".0f")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| bar | asked | measured | met |", "|---|--:|--:|---|"]
    for bar in result.bars:
        asked = f"at least {bar.least:g}" if bar.least is not None else f"at most {bar.most:g}"
        lines.append(f"| {bar.name} | {asked} | {bar.value:.4g} | {'yes' if bar.met else '**no**'} |")
    lines += ["", *(f"- {case}: " + ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in found.items())
                    for case, found in result.agreement.items()), *(f"- {note}" for note in result.notes)]
    return "\n".join(lines) + "\n"


def shown(value: float | None, form: str) -> str:
    """A number, or nothing."""
    return "" if value is None else format(value, form)


if __name__ == "__main__":
    main()
