"""The path of a picture: files -> decoded batches -> faces -> views -> probabilities -> rows.

Whatever the machine shares out, a file's batch companions are those of its chunk of the list: they depend on its
place in the list alone, and so do, to the last bit, its numbers.
"""
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.data.batches import PhotoBatch, first_position, has_shared_memory, join_batches, load_photos
from models.faces.align import TEMPLATE_SIZE, WHOLE_TEMPLATE, align_faces
from models.faces.checkpoint import Checkpoint
from models.faces.labelled import is_finished_crop, render_crops_views
from models.faces.mtcnn import MTCNN, Faces
from models.running.cli import worker_count
from models.running.ranks import per_local_rank
from models.running.threads import OrderedThreadPool

DECODE_BATCH = 16           # pictures decoded, and on a CPU searched for faces, together: 16 of 3 megapixels, 150 MB
LARGEST_CHUNK = 2048        # files: what an interrupted run does again, at most
FEW_FILES = 64              # for so many, starting decoding workers takes longer than they save


@dataclass
class Settings:
    """How files become rows. align: auto, always or never; faces: largest or all; flip: average with the mirror view.

    batch_size: views in one call of the network. max_side: pixels, larger pictures are reduced. crops: keep each
    face's 112 x 112 crop in its row, for grids.
    """
    align: str = "auto"
    faces: str = "largest"
    flip: bool = False
    batch_size: int = 16
    workers: int = 0
    max_side: int | None = 3000
    crops: bool = False


@dataclass
class Row:
    """A face, or a picture without one (face -1). box (x1, y1, x2, y2): pixels of the picture as it stands upright."""
    position: int                       # of the picture in the list
    face: int                           # by descending size, from 0
    status: str                         # one of STATUSES
    probs: Tensor | None = None         # (C,) float32
    box: tuple[float, ...] | None = None    # None of a picture that came as a finished crop
    score: float | None = None          # the detector's
    crop: Tensor | None = None          # (3, 112, 112) uint8
    error: str = ""


class Predictor:
    """The network of one checkpoint, ready for inference on a device: views -> probabilities.

    Its convolutions are bfloat16 on a CPU that multiplies it: by matrices (AMX) four times as fast as float32, by
    vectors (AVX512_BF16) almost twice; on other CPUs it is slower. Input and last layer stay float32: logits of 8 bits
    would make different faces look like repeated pictures. docs/performance.md has how far the answers differ.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device):
        self.checkpoint, self.spec, self.device = checkpoint, checkpoint.spec, device
        self.network = fold_batch_norm(checkpoint.classifier(device)).to(memory_format=torch.channels_last)
        able = torch.cpu.get_capabilities()
        self.bfloat16 = device.type == "cpu" and any(able.get(name) for name in ("amx_bf16", "avx512_bf16"))
        if self.bfloat16:
            backbone = self.network.backbone
            backbone.conv1.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16(),))
            backbone.fc.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            for module in backbone.modules():
                if isinstance(module, nn.Conv2d):
                    module.bfloat16()

    @torch.inference_mode()
    def probs(self, views: Tensor, flip: bool = False) -> Tensor:
        """views (n, 3, S, S) uint8 -> probabilities (n, C) float32 on the CPU; n may be 0."""
        return self.checkpoint.probs(self.logits(views, flip)).cpu()

    @torch.inference_mode()
    def logits(self, views: Tensor, flip: bool = False) -> Tensor:
        """views (n, 3, S, S) uint8 -> logits (n, C) float32 on the device; n may be 0.

        With `flip` the mean of the logits of each view and of its mirror image (test-time augmentation).
        """
        logits = self.network(views)
        return (logits + self.network(views.flip(3))) / 2 if flip else logits


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """The model in place, each convolution followed by a batch-norm made one convolution: the same numbers, sooner."""
    for module in list(model.modules()):
        for (name, first), (after, second) in itertools.pairwise(list(module.named_children())):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                setattr(module, name, fuse_conv_bn_eval(first, second))
                setattr(module, after, nn.Identity())
    return model


def chunk_size(n_files: int) -> int:
    """Files of one chunk: a multiple of DECODE_BATCH, a 32nd of the list, at most LARGEST_CHUNK."""
    return min(LARGEST_CHUNK, -(-n_files // (32 * DECODE_BATCH)) * DECODE_BATCH)


def count_chunks(n_files: int) -> int:
    """Chunks of a list of n_files, which is not empty; the last chunk may be short."""
    return -(-n_files // chunk_size(n_files))


def count_files(n_files: int, chunks: Iterable[int]) -> int:
    """Files in some chunks of a list of n_files."""
    size = chunk_size(n_files)
    return sum(min(size, n_files - chunk * size) for chunk in chunks)


def network_batch(device: torch.device) -> int:
    """Default number of views in one call of a network: on a CPU as many as its caches hold the activations of."""
    return 256 if device.type == "cuda" else 16


def decode_workers(asked: int | None, n_files: int, device: torch.device) -> int:
    """Decoding workers: as many as are asked for, else all cores before a CUDA device and none beside a CPU's networks.

    There the threads that run the networks decode too: nothing need cross from one process to another.
    """
    if asked is not None:
        return asked
    return per_local_rank(worker_count()) if device.type == "cuda" and n_files >= FEW_FILES and has_shared_memory() else 0


def classify_files(photos, predictor: Predictor, detector: MTCNN | None, settings: Settings,
                   chunks: Iterable[int] | None = None) -> Iterator[tuple[int, list[Row]]]:
    """(chunk, its rows) for chunks of a list of pictures, rows by position and face; decoding goes on meanwhile.

    photos: anything with len() and [i] -> a path or the bytes of a file. Chunk k is chunk_size(len(photos)) files
    from k times that on; by default all. Every picture has a row. detector may be None where align is 'never'.
    """
    size = chunk_size(len(photos))
    n_batches = -(-len(photos) // DECODE_BATCH)
    per_chunk = size // DECODE_BATCH
    chunks = range(count_chunks(len(photos))) if chunks is None else chunks
    numbers = (k for chunk in chunks for k in range(chunk * per_chunk, min((chunk + 1) * per_chunk, n_batches)))
    with OrderedThreadPool(predictor.device, single_threaded_caller=True) as pool:
        batches = load_photos(photos, DECODE_BATCH, settings.workers, settings.max_side, batches=numbers, pool=pool)
        batches = join_batches(batches, size, predictor.device)
        found = pool.ordered_map(lambda batch: find_faces(batch, size, predictor, detector, settings), batches)
        labelled = pool.ordered_map(lambda some: label_faces(some, predictor, settings),
                                 full_batches(found, settings.batch_size))
        for chunk, its in itertools.groupby(labelled, lambda some: some.chunk):
            yield chunk, sorted((row for some in its for row in some.faces + some.without),
                                key=lambda row: (row.position, row.face))


@dataclass
class Found:
    """Rows of some pictures of a chunk: of faces, with a view (3, S, S) uint8 each, and of pictures without one."""
    chunk: int
    faces: list[Row]
    views: list[Tensor]
    without: list[Row]


def full_batches(found: Iterable[Found], batch_size: int) -> Iterator[Found]:
    """The same rows in the same order, batch_size faces together; the last of each chunk may have fewer, or none."""
    for chunk, its in itertools.groupby(found, lambda some: some.chunk):
        faces, views, without = [], [], []
        for some in its:
            faces += some.faces
            views += some.views
            without += some.without
            while len(faces) >= batch_size:
                yield Found(chunk, faces[:batch_size], views[:batch_size], without)
                faces, views, without = faces[batch_size:], views[batch_size:], []
        yield Found(chunk, faces, views, without)


def label_faces(found: Found, predictor: Predictor, settings: Settings) -> Found:
    """The same, its faces with their probabilities."""
    probs = predictor.probs(torch.stack(found.views), settings.flip) if found.faces else ()
    for row, its in zip(found.faces, probs, strict=True):
        row.probs = its
    return replace(found, views=[])


def find_faces(batch: PhotoBatch, size: int, predictor: Predictor, detector: MTCNN | None, settings: Settings) -> Found:
    """The faces of a batch of pictures of a list in chunks of `size`, those of finished crops first."""
    batch = replace(batch, images=batch.images.to(predictor.device))
    crops = torch.zeros(len(batch.positions), dtype=torch.bool)
    if settings.align == "never":
        crops = torch.ones_like(crops)
    elif settings.align == "auto":
        crops = is_finished_crop(batch.sizes, predictor.spec.chip_geometry)
    parts = [crop_rows(take(batch, crops), predictor.spec, settings)]
    if not crops.all():
        photos = take(batch, ~crops)
        search = detector.detect_largest if settings.faces == "largest" else detector.detect
        parts.append(photo_rows(photos, search(photos.images, photos.sizes), predictor.spec, settings))
    rows = [row for its_rows, _ in parts for row in its_rows]
    without = [Row(position, -1, status, error=why) for position, status, why in batch.failures]
    return Found(first_position(batch) // size, [row for row in rows if row.status == "ok"],
                 [view for _, views in parts for view in views], without + [row for row in rows if row.status != "ok"])


def take(batch: PhotoBatch, which: Tensor) -> PhotoBatch:
    """The decoded pictures of a batch at which (B,) bool is true, without its failures."""
    if which.all():
        return replace(batch, failures=[])
    positions = [position for position, taken in zip(batch.positions, which.tolist(), strict=True) if taken]
    return PhotoBatch(positions, batch.images[which.to(batch.images.device)], batch.sizes[which],
                      batch.scales[which], [])


def crop_rows(batch: PhotoBatch, spec, settings: Settings) -> tuple[list[Row], Tensor]:
    """Rows and views of finished crops, of any resolution; a picture that is not square cannot be one."""
    square = batch.sizes[:, 0] == batch.sizes[:, 1]
    crops = take(batch, square)
    found = crops.images, crops.sizes
    views = render_crops_views(*found, spec.window, spec.input_size, spec.template, spec.chip_geometry)
    shown = [None] * len(views)
    if settings.crops:
        shown = render_crops_views(*found, WHOLE_TEMPLATE, TEMPLATE_SIZE, chips=spec.chip_geometry).cpu()
    rows = [Row(position, 0, "ok", crop=crop) for position, crop in zip(crops.positions, shown, strict=True)]
    for i in (~square).nonzero()[:, 0].tolist():
        height, width = batch.sizes[i].tolist()
        rows.append(Row(batch.positions[i], -1, "unreadable",
                        error=f"{width} x {height} pixels: a finished crop is square (--align never)"))
    return rows, views


def rank_by_size(faces: Faces) -> tuple[Tensor, Tensor]:
    """Order (n,) int64 of faces by image and, within it, descending box area; the number (n,) of each in its image."""
    boxes, image_index = faces.boxes.cpu(), faces.image_index.cpu()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = area.argsort(descending=True, stable=True)
    order = order[image_index[order].argsort(stable=True)]
    image = image_index[order]
    return order, torch.arange(len(order)) - torch.searchsorted(image, image)


def photo_rows(batch: PhotoBatch, faces: Faces, spec, settings: Settings) -> tuple[list[Row], Tensor]:
    """Rows of photographs in which faces were searched, and the views of the faces, aligned by their landmarks."""
    order, number = rank_by_size(faces)
    if settings.faces == "largest":
        order, number = order[number == 0], number[number == 0]
    device = batch.images.device
    where = order.to(device)
    image_index, landmarks = faces.image_index[where], faces.landmarks[where]
    found = batch.images, batch.sizes, image_index, landmarks
    views = align_faces(*found, spec.window, spec.input_size, spec.template)
    crops = align_faces(*found, WHOLE_TEMPLATE, TEMPLATE_SIZE).cpu() if settings.crops else [None] * len(order)
    image_index = image_index.cpu()
    boxes = (faces.boxes.cpu()[order] / batch.scales[image_index, None]).tolist()
    scores = faces.scores.cpu()[order].tolist()
    rows = [Row(batch.positions[i], face, "ok", None, tuple(box), score, crop)
            for i, face, box, score, crop in zip(image_index.tolist(), number.tolist(), boxes, scores, crops,
                                                 strict=True)]
    empty = sorted(set(range(len(batch.positions))) - set(image_index.tolist()))
    return rows + [Row(batch.positions[i], -1, "no_face") for i in empty], views


