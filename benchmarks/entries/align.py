"""align: decoded photographs -> aligned crops of all their faces, against the original MTCNN."""
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import baseline
from benchmarks.agreement import same_faces
from benchmarks.harness import Bar, Result, peak_alone, take_turns
from benchmarks.inputs import Bench
from models.data.batches import PhotoBatch, collate_photos, group_sizes, join_batches
from models.data.chunks import DECODE_BATCH
from models.data.decoding import decode_photo
from models.faces.align import TEMPLATE_SIZE, WHOLE_TEMPLATE, align_faces
from models.faces.mtcnn import MTCNN, Faces
from models.running.threads import OrderedThreadPool

FACE_SIZES = (20, 40)           # smallest face, pixels
MEGAPIXEL = 1_000_000           # on CUDA photographs are also aligned at this size


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
            faces = {}
            ours, other = figures = take_turns(case, {
                "ours": (lambda items, detector=detector, faces=faces:
                         faces.update(ours=align_batches(items, detector)), photos),
                "original procedure": (lambda items, plain=plain, faces=faces:
                                       faces.update(plain=align_each(items, plain)), photos)},
                bench.sizes.runs, bench.device, warm=DECODE_BATCH)
            if not bench.quick:
                for figure in figures:
                    figure.peak_mb = peak_alone(align_files, paths, face_size, figure is ours,
                                                bench.device)
            result.figures += figures
            result.compare(f"{case}: ratio to the original procedure", ours, other, least)
            agreement = result.agreement[case] = same_faces(**faces)
            share = agreement["same"] / max(1, agreement["plain_faces"])
            result.bars.append(Bar(f"{case}: faces of the original found too, %", 100 * share,
                                   least=99.0))
    if bench.device.type == "cuda":
        align_megapixels(bench, result)
    return result


def align_batches(photos: list[Tensor], detector: MTCNN) -> list[Faces]:
    """The faces of each picture, detected and aligned in batches as by infer.py."""
    device = next(detector.parameters()).device
    groups = [[start + i for i in group] for start in range(0, len(photos), DECODE_BATCH)
              for group in group_sizes(photos[start:start + DECODE_BATCH])]

    def collate(group: list[int]) -> PhotoBatch:
        images, sizes = collate_photos([photos[i] for i in group])
        return PhotoBatch(group, images, sizes, torch.ones(len(group)), [])

    def align(batch: PhotoBatch) -> dict[int, Faces]:
        images = batch.images.to(device)
        faces = detector.detect(images, batch.sizes)
        align_faces(images, batch.sizes, faces.image_index, faces.landmarks, WHOLE_TEMPLATE,
                    TEMPLATE_SIZE)
        faces = Faces(*(value.cpu() for value in vars(faces).values()))
        return {i: faces.select(faces.image_index == k) for k, i in enumerate(batch.positions)}

    faces_of = {}
    with OrderedThreadPool(device) as pool:
        batches = join_batches(pool.ordered_map(collate, groups), len(photos), device)
        for batch_faces in pool.ordered_map(align, batches):
            faces_of |= batch_faces
    return [faces_of[i] for i in range(len(photos))]


def align_each(photos: list[Tensor], detector: baseline.PlainMTCNN) -> list[Faces]:
    """The faces of each picture, detected and aligned one picture after another."""
    all_faces = [detector.detect(photo) for photo in photos]
    for photo, faces in zip(photos, all_faces, strict=True):
        baseline.align_one(photo, faces, WHOLE_TEMPLATE, TEMPLATE_SIZE)
    return all_faces


def align_megapixels(bench: Bench, result: Result) -> None:
    """Photographs of one megapixel on CUDA; the target is a rate, not a ratio."""
    photos = []
    for path in bench.photos():
        photo = decode_photo(path)[0]
        scale = (MEGAPIXEL / (photo.shape[1] * photo.shape[2])) ** 0.5
        resized = F.interpolate(photo[None].float(), scale_factor=scale, mode="bilinear")
        photos.append(resized[0].byte())
    detector = MTCNN(min_face_size=20).to(bench.device)
    figure, = take_turns("photographs of one megapixel, smallest face 20",
                         {"ours": (lambda items: align_batches(items, detector), photos)},
                         bench.sizes.runs, bench.device, warm=DECODE_BATCH)
    result.figures.append(figure)
    result.bars.append(Bar("photographs of one megapixel: images/s", figure.rate, least=300))


def align_files(paths: list[str], face_size: float, is_batched: bool, device: torch.device) -> None:
    """Decodes files, detects and aligns their faces; the faces are discarded."""
    if is_batched:
        detector = MTCNN(min_face_size=face_size).to(device)
        for start in range(0, len(paths), DECODE_BATCH):
            photos = [decode_photo(path)[0] for path in paths[start:start + DECODE_BATCH]]
            align_batches(photos, detector)
    else:
        detector = baseline.PlainMTCNN(face_size, device)
        for path in paths:
            align_each([decode_photo(path)[0]], detector)
