"""The path of a face: files -> decoded photographs -> detected faces -> aligned views -> labels.

Every command takes this path. `align_photos` turns a list of pictures and a FacePolicy into aligned
views; `classify_photos` adds the classifier; `label_photos` is the same for a few pictures in
Python. A file is always processed together with the same neighbours of its chunk of the list, so
its numbers do not depend on the number of ranks or workers, to the last bit.
"""
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.data.batches import (
    PhotoBatch,
    PhotoSources,
    first_position,
    has_shared_memory,
    join_batches,
    load_photos,
)
from models.data.chunks import DECODE_BATCH, chunk_size, count_chunks
from models.faces import second_look
from models.faces.align import (
    CHIP_LANDMARKS,
    TEMPLATE,
    TEMPLATE_SIZE,
    WHOLE_TEMPLATE,
    align_faces,
)
from models.faces.classifier import FaceSpec
from models.faces.finished_crops import Chips, have_crop_size, views_of_crops
from models.faces.mtcnn import Faces, no_faces
from models.faces.predictor import Predictor
from models.faces.second_look import Search
from models.faces.selection import select_faces
from models.running.cli import worker_count
from models.running.ranks import per_local_rank
from models.running.threads import OrderedThreadPool

FEW_FILES = 64              # for fewer, starting decoding workers takes longer than they save
LABELLED_SET_BATCH = 32     # pictures of a labelled set that are decoded together
VIEW_BYTES = 1 << 27        # views rendered at a time, unless one photograph alone has more


@dataclass(frozen=True)
class FacePolicy:
    """Which faces of a picture are used, and what happens without one.

    faces: 'largest', 'central' (the most central large face) or 'all'.
    without_face: 'skip' reports the picture as no_face; 'mean_landmarks' aligns it by the mean
    landmarks, relative to the picture's size, of the pictures with a face.
    align: 'auto' takes pictures of exactly 112 x 112, or of the size of the checkpoint's chips, as
    finished crops; 'never' takes all pictures as finished crops; 'always' takes none.
    """
    faces: str = "largest"
    without_face: str = "skip"
    align: str = "auto"


@dataclass(frozen=True)
class ViewSpec:
    """What is rendered of each face: a window of the template at some size in pixels.

    template: where the landmarks belong. chips: size and template of a checkpoint's own aligned
    chips. with_crops: also render the whole 112 x 112 crop of each face.
    """
    window: tuple[float, float, float, float]
    size: int
    template: tuple = TEMPLATE
    chips: Chips | None = None
    with_crops: bool = False

    @classmethod
    def of_checkpoint(cls, spec: FaceSpec, with_crops: bool = False) -> "ViewSpec":
        """The input of a checkpoint's network."""
        return cls(spec.window, spec.input_size, spec.template, spec.chip_geometry, with_crops)


@dataclass(frozen=True)
class Loading:
    """How pictures are decoded: how many together, in how many processes, reduced to which size.

    num_workers 0 decodes in the threads of the pool. max_side: pixels of the longest side.
    """
    batch_size: int = DECODE_BATCH
    num_workers: int = 0
    max_side: int | None = 3000


@dataclass
class FaceRow:
    """A face, or a picture without one (face -1)."""
    position: int                           # of the picture in the list
    face: int                               # by descending size, from 0
    status: str                             # one of predictions.STATUSES
    aligned_by: str = ""                    # 'mtcnn', 'template' (mean landmarks) or 'crop'
    found_by: str = ""                      # one of second_look.FOUND_BY, or 'crop'
    box: tuple[float, ...] | None = None    # x1, y1, x2, y2, pixels of the upright picture
    score: float | None = None              # of the detector
    landmarks: Tensor | None = None         # (5, 2) float32, pixels of the upright picture
    crop: Tensor | None = None              # (3, 112, 112) uint8
    logits: Tensor | None = None            # (C,) float32
    probs: Tensor | None = None             # (C,) float32
    error: str = ""


@dataclass
class AlignedBatch:
    """Aligned faces of some pictures of one chunk, and the pictures that gave none."""
    chunk: int                              # the number of chunks for faces by mean landmarks
    rows: list[FaceRow]                     # one for each face
    views: Tensor                           # (n, 3, size, size) uint8
    failures: list[FaceRow] = field(default_factory=list)

    def positions(self) -> list[int]:
        """Positions in the list of the faces' pictures."""
        return [row.position for row in self.rows]


@dataclass
class SelectedFaces:
    """Selected faces of the pictures of a batch; crops has the finished crops of the batch."""
    chunk: int
    photos: PhotoBatch                      # those with and without a face, not the crops
    faces: Faces                            # the selected ones, by image
    numbers: Tensor                         # (n,) int64 by descending size within the image
    crops: PhotoBatch
    failures: list[FaceRow]

    def faceless(self) -> list[int]:
        """Positions in the list of the photographs without a face."""
        with_face = set(self.faces.image_index.tolist())
        return [position for i, position in enumerate(self.photos.positions) if i not in with_face]


@dataclass
class MeanLandmarks:
    """Running mean (5, 2) float64 of landmarks relative to their pictures' (width, height)."""
    total: Tensor = field(default_factory=lambda: torch.zeros(5, 2, dtype=torch.float64))
    n_faces: int = 0

    def add(self, landmarks: Tensor, sizes: Tensor) -> None:
        """Adds landmarks (n, 5, 2) of pictures of sizes (n, 2), (height, width)."""
        self.total += (landmarks.cpu().double() / sizes.flip(1)[:, None]).sum(0)
        self.n_faces += len(landmarks)

    def mean(self) -> Tensor:
        """The mean; that of UTKFace's chips if no face was added."""
        if self.n_faces:
            return self.total / self.n_faces
        return torch.tensor(CHIP_LANDMARKS, dtype=torch.float64) / 200


def decode_workers(num_workers: int | None, n_files: int, device: torch.device) -> int:
    """Number of decoding processes: the given number, or by default all cores for a CUDA device.

    On a CPU the default is 0: the threads that run the networks decode too, and no picture has to
    cross from one process to another.
    """
    if num_workers is not None:
        return num_workers
    use_processes = device.type == "cuda" and n_files >= FEW_FILES and has_shared_memory()
    return per_local_rank(worker_count()) if use_processes else 0


# ---------------------------------------------------------------------------------- files to views
def align_photos(photos: PhotoSources, detector: nn.Module | None, view: ViewSpec,
                 policy: FacePolicy, loading: Loading = Loading(), *,
                 chunks: Iterable[int] | None = None, pool: OrderedThreadPool | None = None,
                 device: torch.device | None = None) -> Iterator[AlignedBatch]:
    """Aligned faces of the pictures of a list, as a stream in the order of the list.

    photos: anything with len() and [i] -> a path or the bytes of a file; [i] may raise PhotoError.
    detector: detect(images, sizes) -> Faces; None is allowed where policy.align is 'never'.
    chunks: numbers of the chunks of the list to process, by default all (see models.data.chunks).
    pool: threads shared with the caller's own steps; device: by default that of the detector.

    Every picture appears once, as rows or as a failure; pictures that are aligned by the mean
    landmarks come last. What lies outside a picture repeats its edge.
    """
    device = device or (next(detector.parameters()).device if detector else torch.device("cpu"))
    if pool is None:
        with OrderedThreadPool(device) as pool:
            yield from align_photos(photos, detector, view, policy, loading, chunks=chunks,
                                    pool=pool, device=device)
        return
    if not len(photos):
        return
    size, n_chunks = chunk_size(len(photos)), count_chunks(len(photos))
    numbers = batch_numbers(len(photos), loading.batch_size, chunks)
    batches = load_photos(photos, loading.batch_size, usable_workers(loading), loading.max_side,
                          batches=numbers, pool=pool)
    found = pool.ordered_map(lambda batch: find_faces(batch, size, detector, view, policy, device),
                             join_batches(batches, size, device))
    mean = MeanLandmarks()
    missed: list[int] = []
    if policy.without_face == "mean_landmarks":
        found = collect_missed(found, mean, missed)
    yield from pool.ordered_map(lambda batch: render_views(batch, view), split_found(found, view))
    if missed:
        batches = load_photos(photos, loading.batch_size, usable_workers(loading),
                              loading.max_side, missed, pool=pool)
        landmarks = mean.mean()
        yield from pool.ordered_map(
            lambda batch: align_by_mean(batch, n_chunks, landmarks, view, device), batches)


def align_labelled_set(paths: list[str], is_aligned: bool, detector: nn.Module, view: ViewSpec,
                       num_workers: int = 0, progress: str | None = None) -> Iterator[AlignedBatch]:
    """Aligned views of every picture of a labelled set, one face each, as a stream.

    is_aligned: the pictures are finished crops of the ArcFace template. Otherwise the most central
    large face is aligned, and pictures without one are aligned by the mean landmarks of the others.
    progress: title of a progress bar.
    """
    policy = FacePolicy("central", "mean_landmarks", "never" if is_aligned else "auto")
    if is_aligned:
        view = replace(view, chips=None)
    loading = Loading(LABELLED_SET_BATCH, num_workers)
    with tqdm(total=len(paths), desc=progress, disable=progress is None, unit=" pictures",
              smoothing=0.05) as bar:
        for batch in align_photos(paths, detector, view, policy, loading):
            bar.update(len(batch.rows) + len(batch.failures))
            yield batch


def usable_workers(loading: Loading) -> int:
    """Decoding processes, 0 where shared memory is too scarce to hand over their pictures."""
    return loading.num_workers if has_shared_memory() else 0


def batch_numbers(n_files: int, batch_size: int, chunks: Iterable[int] | None) -> Iterable[int]:
    """Numbers of the decoding batches of some chunks of a list; of all batches for None.

    With chunks, batch_size divides the size of a chunk.
    """
    n_batches = -(-n_files // batch_size)
    if chunks is None:
        return range(n_batches)
    per_chunk = chunk_size(n_files) // batch_size
    return itertools.chain.from_iterable(
        range(chunk * per_chunk, min((chunk + 1) * per_chunk, n_batches)) for chunk in chunks)


def find_faces(batch: PhotoBatch, size: int, detector: nn.Module | None, view: ViewSpec,
               policy: FacePolicy, device: torch.device) -> SelectedFaces:
    """The selected faces of a batch of pictures of a list in chunks of `size` files."""
    chunk = first_position(batch) // size
    failures = [FaceRow(position, -1, status, error=reason)
                for position, status, reason in batch.failures]
    batch = replace(batch, images=batch.images.to(device))
    is_crop = finished_crops(batch, view, policy)
    crops, photos = select_photos(batch, is_crop), select_photos(batch, ~is_crop)
    if policy.align == "never":
        crops, not_square = square_only(crops)
        failures += not_square
    if not len(photos.positions) or detector is None:
        return SelectedFaces(chunk, photos, no_faces(device), torch.zeros(0, dtype=torch.int64),
                          crops, failures)
    search: Search = detector.detect      # type: ignore[assignment]
    if policy.faces == "largest":
        search = getattr(detector, "detect_largest", search)
    faces = search(photos.images, photos.sizes)
    rows, numbers = select_faces(faces, photos.sizes, policy.faces)
    found = SelectedFaces(chunk, photos, faces.select(rows.to(faces.boxes.device)), numbers, crops,
                       failures)
    if policy.without_face == "skip":
        failures += [FaceRow(position, -1, "no_face") for position in found.faceless()]
    return found


def finished_crops(batch: PhotoBatch, view: ViewSpec, policy: FacePolicy) -> Tensor:
    """Which pictures (B,) bool of a batch are taken as finished crops."""
    if policy.align == "auto":
        is_whole = batch.scales == 1            # a reduced photograph may have that size by chance
        return have_crop_size(batch.sizes, view.chips) & is_whole
    return torch.full((len(batch.positions),), policy.align == "never")


def select_photos(batch: PhotoBatch, chosen: Tensor) -> PhotoBatch:
    """The decoded pictures of a batch for which chosen (B,) bool is true, without its failures."""
    if chosen.all():
        return replace(batch, failures=[])
    positions = [position for position, is_chosen
                 in zip(batch.positions, chosen.tolist(), strict=True) if is_chosen]
    return PhotoBatch(positions, batch.images[chosen.to(batch.images.device)], batch.sizes[chosen],
                      batch.scales[chosen], [])


def square_only(crops: PhotoBatch) -> tuple[PhotoBatch, list[FaceRow]]:
    """The square pictures of a batch, and a failure for each other one: a crop is square."""
    is_square = crops.sizes[:, 0] == crops.sizes[:, 1]
    failures = []
    for i in (~is_square).nonzero()[:, 0].tolist():
        height, width = crops.sizes[i].tolist()
        failures.append(FaceRow(crops.positions[i], -1, "unreadable", error=f"{width} x {height} "
                                "pixels: a finished crop is square (--align never)"))
    return select_photos(crops, is_square), failures


def collect_missed(found: Iterable[SelectedFaces], mean: MeanLandmarks,
                   missed: list[int]) -> Iterator[SelectedFaces]:
    """The same batches; adds their landmarks to the mean and the faceless positions to missed."""
    for batch in found:
        mean.add(batch.faces.landmarks, batch.photos.sizes[batch.faces.image_index.cpu()])
        missed += batch.faceless()
        yield batch


def split_found(found: Iterable[SelectedFaces], view: ViewSpec) -> Iterator[SelectedFaces]:
    """The same faces in batches of at most about VIEW_BYTES of views; no photograph is divided."""
    most = max(1, VIEW_BYTES // (3 * view.size ** 2))
    for batch in found:
        if len(batch.numbers) <= most:
            yield batch
            continue
        counts = batch.faces.image_index.cpu().unique_consecutive(return_counts=True)[1].tolist()
        start = end = 0
        for count, following in zip(counts, [*counts[1:], most + 1], strict=True):
            end += count
            if end - start + following > most:
                rows = slice(start, end)
                yield replace(batch, faces=Faces(*(v[rows] for v in vars(batch.faces).values())),
                              numbers=batch.numbers[rows], crops=batch.crops if not start else
                              select_photos(batch.crops, torch.zeros(len(batch.crops.positions),
                                                                     dtype=torch.bool)),
                              failures=[] if start else batch.failures)
                start = end


def render_views(found: SelectedFaces, view: ViewSpec) -> AlignedBatch:
    """Views of finished crops and of faces aligned by their landmarks, in this order."""
    rows, views = crop_rows(found.crops, view)
    photo_faces, photo_views = photo_rows(found, view)
    return AlignedBatch(found.chunk, rows + photo_faces, torch.cat([views, photo_views]),
                        found.failures)


def crop_rows(crops: PhotoBatch, view: ViewSpec) -> tuple[list[FaceRow], Tensor]:
    """Rows and views of finished crops of any resolution."""
    views = views_of_crops(crops.images, crops.sizes, view.window, view.size, view.template,
                           view.chips)
    whole_crops: Iterable = itertools.repeat(None, len(views))
    if view.with_crops:
        whole_crops = views_of_crops(crops.images, crops.sizes, WHOLE_TEMPLATE, TEMPLATE_SIZE,
                                     chips=view.chips).cpu()
    rows = [FaceRow(position, 0, "ok", "crop", "crop", crop=crop)
            for position, crop in zip(crops.positions, whole_crops, strict=True)]
    return rows, views


def photo_rows(found: SelectedFaces, view: ViewSpec) -> tuple[list[FaceRow], Tensor]:
    """Rows and views of the faces of photographs, aligned by their landmarks."""
    photos, faces = found.photos, found.faces
    source = photos.images, photos.sizes, faces.image_index, faces.landmarks
    views = align_faces(*source, view.window, view.size, view.template)
    whole_crops: Iterable = itertools.repeat(None, len(views))
    if view.with_crops:
        whole_crops = align_faces(*source, WHOLE_TEMPLATE, TEMPLATE_SIZE).cpu()
    image_index = faces.image_index.cpu()
    scales = photos.scales[image_index, None]
    columns = zip(image_index.tolist(), found.numbers.tolist(), ways_found(faces),
                  (faces.boxes.cpu() / scales).tolist(), faces.scores.tolist(),
                  faces.landmarks.cpu() / scales[:, None], whole_crops, strict=True)
    rows = [FaceRow(photos.positions[i], number, "ok", "mtcnn", way, tuple(box), score, landmarks,
                    crop) for i, number, way, box, score, landmarks, crop in columns]
    return rows, views


def ways_found(faces: Faces) -> list[str]:
    """How each face was found; a detector without the second look finds upright faces."""
    if isinstance(faces, second_look.FoundFaces):
        return [second_look.FOUND_BY[code] for code in faces.found_by.tolist()]
    return [second_look.FOUND_BY[0]] * len(faces.boxes)


def align_by_mean(batch: PhotoBatch, chunk: int, mean: Tensor, view: ViewSpec,
                  device: torch.device) -> AlignedBatch:
    """Views of photographs without a face, by mean landmarks (5, 2) relative to their size."""
    landmarks = (mean * batch.sizes.flip(1)[:, None]).float()
    source = batch.images.to(device), batch.sizes, torch.arange(len(batch.positions)), landmarks
    views = align_faces(*source, view.window, view.size, view.template)
    rows = [FaceRow(position, 0, "ok", "template") for position in batch.positions]
    return AlignedBatch(chunk, rows, views, [FaceRow(position, -1, status, error=reason)
                                             for position, status, reason in batch.failures])


# --------------------------------------------------------------------------------- views to labels
@dataclass(frozen=True)
class Classification:
    """How views are classified: batch_size in one call of the network, flip as test-time
    augmentation, and transform, applied to each batch of views before the network."""
    batch_size: int = 16
    flip: bool = False
    transform: Callable[[Tensor], Tensor] | None = None


def classify_photos(photos: PhotoSources, predictor: Predictor, detector: nn.Module | None,
                    policy: FacePolicy, loading: Loading = Loading(),
                    classification: Classification = Classification(), *,
                    view: ViewSpec | None = None,
                    chunks: Iterable[int] | None = None) -> Iterator[tuple[int, list[FaceRow]]]:
    """(chunk, its rows by position and face) of a list of pictures; every picture has a row.

    photos, detector and chunks are those of align_photos; view is by default the network's input.
    Rows by mean landmarks come as a chunk of their own at the end.
    """
    view = view or ViewSpec.of_checkpoint(predictor.spec)
    with OrderedThreadPool(predictor.device) as pool:
        aligned = align_photos(photos, detector, view, policy, loading, chunks=chunks, pool=pool,
                               device=predictor.device)
        classified = pool.ordered_map(
            lambda batch: classify_batch(batch, predictor, classification),
            full_batches(aligned, classification.batch_size))
        for chunk, batches in itertools.groupby(classified, lambda batch: batch.chunk):
            rows = [row for batch in batches for row in batch.rows + batch.failures]
            yield chunk, sorted(rows, key=lambda row: (row.position, row.face))


def full_batches(aligned: Iterable[AlignedBatch], batch_size: int) -> Iterator[AlignedBatch]:
    """The same faces in order, batch_size together; the last batch of a chunk may be short."""
    for chunk, batches in itertools.groupby(aligned, lambda batch: batch.chunk):
        rows: list[FaceRow] = []
        views: list[Tensor] = []
        failures: list[FaceRow] = []
        for batch in batches:
            rows += batch.rows
            views += batch.views
            failures += batch.failures
            while len(rows) >= batch_size:
                yield AlignedBatch(chunk, rows[:batch_size], torch.stack(views[:batch_size]),
                                   failures)
                rows, views, failures = rows[batch_size:], views[batch_size:], []
        yield AlignedBatch(chunk, rows, torch.stack(views) if views else torch.zeros(0), failures)


def classify_batch(batch: AlignedBatch, predictor: Predictor,
                   classification: Classification) -> AlignedBatch:
    """The same batch without views; its rows have logits and calibrated probabilities."""
    if batch.rows:
        views = batch.views
        if classification.transform:
            views = classification.transform(views)
        logits = predictor.logits(views, classification.flip)
        probs = predictor.checkpoint.probs(logits).cpu()
        for row, row_logits, row_probs in zip(batch.rows, logits.cpu(), probs, strict=True):
            row.logits, row.probs = row_logits, row_probs
    return replace(batch, views=torch.zeros(0))
