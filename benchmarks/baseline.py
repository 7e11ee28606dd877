"""Plain procedures that benchmarks/run.py compares with: the same work one picture at a time.

They follow the tools of the field: the original MTCNN procedure (an image pyramid with factor
0.707, a Python loop over its levels, candidates cropped one by one, non-maximum suppression in
NumPy), a loop that classifies one file after another in batches of one, a training loop that
decodes every picture in every epoch in the main process, and a builder of two such processes. The
networks are loaded once and have the weights of the fast path, all in contiguous float32. The
functions that resize a level and warp a face are those of the fast path. Nothing is left out,
slowed down or repeated to make a comparison look better.
"""
import csv
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models import resnet18

from models.data.decoding import PhotoError, decode_photo
from models.faces.align import TEMPLATE, WHOLE_TEMPLATE, align_faces, crop_views
from models.faces.checkpoint import Checkpoint
from models.faces.image_pyramid import resize
from models.faces.mtcnn import WEIGHTS, Faces, logit
from models.faces.mtcnn_networks import build_onet, build_pnet, build_rnet
from models.faces.selection import most_central_faces

THRESHOLDS = (0.6, 0.7, 0.8)        # least scores of P-, R- and O-Net
PROCESSES = 2                       # of the plain builder, with a thread each
START_TIMEOUT = 600                 # seconds in which they must have started


# ---------------------------------------------------------------------------------------- detection
class PlainMTCNN:
    """The original MTCNN procedure: one picture, one pyramid level, one candidate after another.

    As in models/faces/mtcnn.py, scores remain logits until the end, which keeps their order, and
    offsets are fractions of the box that a network saw, even where it exceeds the picture.
    """

    def __init__(self, min_face_size: float = 20, device: torch.device | str = "cpu"):
        self.min_face_size, self.device = min_face_size, torch.device(device)
        weights = torch.load(WEIGHTS, map_location="cpu", weights_only=True)
        builders = {"pnet": build_pnet, "rnet": build_rnet, "onet": build_onet}
        self.pnet, self.rnet, self.onet = (plain_network(build, name, weights).to(self.device)
                                           for name, build in builders.items())

    @torch.inference_mode()
    @torch.backends.cudnn.flags(True, allow_tf32=False)         # float32 means float32 on CUDA too
    def detect(self, photo: Tensor) -> Faces:
        """Faces of a picture (3, h, w) uint8 RGB, by descending score, on the CPU.

        image_index is 0 for all of them.
        """
        photo = photo[None].to(self.device)
        boxes, pixels = self.propose(photo), photo.float()
        boxes = self.refine(pixels, boxes)
        boxes, scores, landmarks = self.output(pixels, boxes)
        return Faces(torch.from_numpy(boxes).float(), torch.from_numpy(scores).float().sigmoid(),
                     torch.from_numpy(landmarks).float(),
                     torch.zeros(len(boxes), dtype=torch.int64))

    def propose(self, photo: Tensor) -> np.ndarray:
        """Square candidate boxes (n, 4) of P-Net on the pyramid of a photo (1, 3, h, w) uint8.

        The levels are resized by the function of the fast path, because a difference of one grey
        level may change which of two boxes is found.
        """
        height, width = photo.shape[2:]
        scale, level_cells = 12 / self.min_face_size, []
        while min(height, width) * scale > 12:
            size = (math.ceil(height * scale), math.ceil(width * scale))
            maps = self.pnet((resize(photo, *size).float() - 127.5) / 128)[0]
            maps = maps.permute(1, 2, 0).cpu().numpy()                              # (h', w', 5)
            rows, columns = np.nonzero(maps[..., 0] > logit(THRESHOLDS[0]))
            corner = np.stack([columns, rows], 1) * 2 + 1
            boxes = np.concatenate([corner, corner + 12], 1) / scale
            cells = np.concatenate([boxes.round(), maps[rows, columns]], 1)         # (n, 9)
            level_cells.append(cells[suppress(cells[:, :4], cells[:, 4], 0.5)])
            scale *= 0.707
        cells = np.concatenate(level_cells) if level_cells else np.zeros((0, 9))
        cells = cells[suppress(cells[:, :4], cells[:, 4], 0.7)]
        return square_boxes(shift(cells[:, :4], cells[:, 5:]))

    def refine(self, pixels: Tensor, boxes: np.ndarray) -> np.ndarray:
        """The candidates that R-Net accepts, after bounding-box regression, square again."""
        outputs = self.run_network(self.rnet, pixels, boxes, 24)
        keep = np.nonzero(outputs[:, 0] > logit(THRESHOLDS[1]))[0]
        keep = keep[suppress(boxes[keep], outputs[keep, 0], 0.7)]
        return square_boxes(shift(boxes[keep], outputs[keep, 1:5]))

    def output(self, pixels: Tensor,
               boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes (n, 4), logits (n,) and landmarks (n, 5, 2) that O-Net accepts, best first."""
        outputs = self.run_network(self.onet, pixels, boxes, 48)
        box_sizes = boxes[:, 2:] - boxes[:, :2] + 1
        points = outputs[:, 5:].reshape(-1, 2, 5).transpose(0, 2, 1)
        landmarks = boxes[:, None, :2] + box_sizes[:, None] * points
        keep = np.nonzero(outputs[:, 0] > logit(THRESHOLDS[2]))[0]
        scores, landmarks = outputs[keep, 0], landmarks[keep]
        boxes = shift(boxes[keep], outputs[keep, 1:5])
        keep = suppress(boxes, scores, 0.7, of_smaller=True)
        return boxes[keep], scores[keep], landmarks[keep]

    def run_network(self, network: nn.Module, pixels: Tensor, boxes: np.ndarray,
                    size: int) -> np.ndarray:
        """Outputs of R-Net (n, 5) or O-Net (n, 15) for all candidates of the picture."""
        crops = [crop_box(pixels, box, size) for box in boxes.astype(int).tolist()]
        if not crops:
            return np.zeros((0, 15))
        return network((torch.cat(crops) - 127.5) / 128).cpu().numpy().astype(float)


def plain_network(build: Callable[[], nn.Sequential], name: str,
                  weights: dict[str, Tensor]) -> nn.Sequential:
    """One of the networks of MTCNN with its weights, in the contiguous layout."""
    network = build()
    network.load_state_dict({key.removeprefix(f"{name}."): value
                             for key, value in weights.items() if key.startswith(f"{name}.")})
    return network.eval().requires_grad_(False)


def suppress(boxes: np.ndarray, scores: np.ndarray, threshold: float,
             of_smaller: bool = False) -> np.ndarray:
    """Indices of the boxes (n, 4) after non-maximum suppression, best first.

    Overlap is IoU, or with of_smaller the intersection over the smaller box.
    """
    x1, y1, x2, y2 = boxes.T
    area = (x2 - x1 + 1) * (y2 - y1 + 1)
    order, kept = np.argsort(-scores, kind="stable"), []
    while len(order):
        best, others = order[0], order[1:]
        kept.append(best)
        width = np.minimum(x2[best], x2[others]) - np.maximum(x1[best], x1[others]) + 1
        height = np.minimum(y2[best], y2[others]) - np.maximum(y1[best], y1[others]) + 1
        intersection = np.maximum(width, 0) * np.maximum(height, 0)
        if of_smaller:
            denominator = np.minimum(area[best], area[others])
        else:
            denominator = area[best] + area[others] - intersection
        order = others[intersection / denominator <= threshold]
    return np.array(kept, dtype=int)


def shift(boxes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Boxes (n, 4) moved by offsets (n, 4), fractions of width and height."""
    box_sizes = boxes[:, 2:] - boxes[:, :2] + 1
    return boxes + offsets * np.concatenate([box_sizes, box_sizes], 1)


def square_boxes(boxes: np.ndarray) -> np.ndarray:
    """The squares around boxes (n, 4), with the same centres, on whole pixels."""
    box_sizes = boxes[:, 2:] - boxes[:, :2] + 1
    longest = box_sizes.max(1, keepdims=True)
    corner = boxes[:, :2] + box_sizes / 2 - longest / 2
    return np.concatenate([corner, corner + longest - 1], 1).round()


def crop_box(pixels: Tensor, box: list[int], size: int) -> Tensor:
    """One box of a picture (1, 3, h, w), black outside the picture, resized: (1, 3, size, size)."""
    height, width = pixels.shape[2:]
    x1, y1, x2, y2 = box
    crop = pixels.new_zeros(1, 3, y2 - y1 + 1, x2 - x1 + 1)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width - 1), min(y2, height - 1)
    if left <= right and top <= bottom:
        inside = pixels[:, :, top:bottom + 1, left:right + 1]
        crop[:, :, top - y1:bottom - y1 + 1, left - x1:right - x1 + 1] = inside
    return F.interpolate(crop, (size, size), mode="bilinear", align_corners=False)


def align_one(photo: Tensor, faces: Faces, window: tuple, size: int,
              template: tuple = TEMPLATE) -> Tensor:
    """Views (n, 3, size, size) uint8 of the faces of one picture (3, h, w) uint8."""
    return align_faces(photo[None], torch.tensor([photo.shape[1:]]), faces.image_index,
                       faces.landmarks, window, size, template)


# ----------------------------------------------------------------------------------- classification
class PlainClassifier:
    """The checkpoint's ResNet-18 as torchvision builds it, on one view at a time."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu"):
        self.checkpoint, self.spec, self.device = checkpoint, checkpoint.spec, torch.device(device)
        self.network = resnet18(num_classes=len(self.spec.classes))
        self.network.load_state_dict(checkpoint.weights)
        self.network.eval().requires_grad_(False).to(self.device)
        self.normalise = transforms.Normalize(self.spec.mean, self.spec.std)

    @torch.inference_mode()
    @torch.backends.cudnn.flags(True, allow_tf32=False)
    def probs(self, view: Tensor) -> list[float]:
        """A view (3, S, S) uint8 -> its C probabilities."""
        logits = self.network(self.normalise(view.float() / 255)[None].to(self.device))
        return self.checkpoint.probs(logits)[0].tolist()


def label_crops(paths: list[Path], out: Path, classifier: PlainClassifier) -> None:
    """Decodes and classifies aligned crops and writes their rows, one after another."""
    spec = classifier.spec
    with open(out, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns(spec.classes))
        for path in paths:
            with Image.open(path) as image:
                crop = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
            view = crop_views(crop[None], spec.window, spec.input_size, spec.template)[0]
            rows.writerow(row_of(path, spec.classes, classifier.probs(view)))


def label_photos(paths: list[Path], out: Path, detector: PlainMTCNN,
                 classifier: PlainClassifier) -> None:
    """Detects, aligns and classifies the largest face of photographs, one after another."""
    spec = classifier.spec
    with open(out, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns(spec.classes))
        for path in paths:
            try:
                photo, _ = decode_photo(path, 3000)
            except PhotoError as error:
                rows.writerow([path.name, error.status])
                continue
            faces = detector.detect(photo)
            if not len(faces.boxes):
                rows.writerow([path.name, "no_face"])
                continue
            largest = (faces.boxes[:, 2:] - faces.boxes[:, :2]).prod(1).argmax().view(1)
            face = faces.select(largest)
            view = align_one(photo, face, spec.window, spec.input_size, spec.template)[0]
            rows.writerow(row_of(path, spec.classes, classifier.probs(view)))


def columns(classes: tuple[str, ...]) -> list[str]:
    """The columns of the plain table, names as in predictions.csv."""
    return ["file", "status", "ethnicity", *(f"p_{name}" for name in classes)]


def row_of(path: Path, classes: tuple[str, ...], probs: list[float]) -> list:
    """The row of a face."""
    return [path.name, "ok", classes[int(np.argmax(probs))], *(f"{p:.6f}" for p in probs)]


# ----------------------------------------------------------------------------------------- training
class PlainFolder(Dataset):
    """Pictures decoded and augmented on access: (view (3, S, S) float32, label)."""

    def __init__(self, paths: list[str], labels: Tensor, size: int):
        self.paths, self.labels = paths, labels.tolist()
        self.transform = transforms.Compose([
            transforms.Resize(round(size * 128 / 112)), transforms.RandomCrop(size),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        with Image.open(self.paths[i]) as image:
            return self.transform(image.convert("RGB")), self.labels[i]


class PlainTraining:
    """The training loop of tutorials: one process, contiguous float32, decoding in every epoch."""

    def __init__(self, n_classes: int, size: int, batch_size: int, device: torch.device):
        torch.manual_seed(0)
        self.network = resnet18(num_classes=n_classes).to(device)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.001)
        self.size, self.batch_size, self.device = size, batch_size, device

    def epoch(self, paths: list[str], labels: Tensor) -> float:
        """One pass over the pictures; returns the mean loss."""
        self.network.train()
        loader = DataLoader(PlainFolder(paths, labels, self.size), self.batch_size, shuffle=True)
        total = 0.0
        for views, targets in loader:
            loss = F.cross_entropy(self.network(views.to(self.device)), targets.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(targets)
        return total / len(paths)


# ------------------------------------------------------------------------------------------ builder
def build(chips: list[str], folder: Path, min_face_size: float, size: int) -> float:
    """Seconds in which two parallel processes write the aligned crops of chips, without start."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(PROCESSES + 1)
    processes = [context.Process(target=build_part, args=(chips[k::PROCESSES], folder,
                                                          min_face_size, size, ready))
                 for k in range(PROCESSES)]
    for process in processes:
        process.start()
    ready.wait(START_TIMEOUT)
    start = time.perf_counter()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process of the plain builder failed")
    return time.perf_counter() - start


def build_part(chips: list[str], folder: Path, min_face_size: float, size: int, ready) -> None:
    """Writes the aligned crop of the most central face of each chip; skips chips without a face."""
    torch.set_num_threads(1)
    detector = PlainMTCNN(min_face_size)
    ready.wait(START_TIMEOUT)
    for chip in chips:
        photo, _ = decode_photo(chip)
        faces = detector.detect(photo)
        row = most_central_faces(faces, torch.tensor([photo.shape[1:]]))
        if row >= 0:
            crop = align_one(photo, faces.select(row), WHOLE_TEMPLATE, size)[0]
            picture = Image.fromarray(crop.permute(1, 2, 0).numpy())
            picture.save(folder / Path(chip).name, "JPEG", quality=95, subsampling=0)
