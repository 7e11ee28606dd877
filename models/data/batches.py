"""data/batches"""
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.data.decoding import PhotoError, decode_photo

SHARED_MEMORY = 1 << 30             # bytes free in /dev/shm below which workers could not hand over their pictures


GROUP_PIXELS = 4_000_000            # a padded batch up to this size is never divided


MAX_JOINED_PHOTOS = {"cpu": 0, "cuda": 128}    # pictures at most that are joined for one call; 0: batches as they come


MAX_JOINED_PIXELS = 200_000_000         # of joined pictures, with what pads them


def collate_photos(photos: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures (3, h, w) uint8 of any sizes -> images (B, 3, H, W) uint8, zero-padded right and below; sizes (B, 2)."""
    sizes = torch.tensor([photo.shape[1:] for photo in photos], dtype=torch.int64).view(len(photos), 2)
    height, width = sizes.amax(0).tolist() if photos else (0, 0)
    images = torch.zeros(len(photos), 3, height, width, dtype=torch.uint8)
    for image, photo in zip(images, photos, strict=True):
        image[:, :photo.shape[1], :photo.shape[2]] = photo
    return images, sizes


@dataclass
class PhotoBatch:
    """Some pictures of a list: those that decoded, padded into one tensor, and those that did not, with why."""
    positions: list[int]                        # of the decoded ones in the list
    images: Tensor                              # (B, 3, H, W) uint8, zero-padded right and below
    sizes: Tensor                               # (B, 2) int64 true height, width
    scales: Tensor                              # (B,) float32, decoded over original size
    failures: list[tuple[int, str, str]]        # position, status, reason

    def __getstate__(self) -> dict:
        """Between processes each tensor takes a file of shared memory: the pictures are worth it, sizes are not."""
        return vars(self) | {"sizes": self.sizes.tolist(), "scales": self.scales.tolist()}

    def __setstate__(self, state: dict) -> None:
        sizes = torch.tensor(state["sizes"], dtype=torch.int64).view(-1, 2)
        vars(self).update(state, sizes=sizes, scales=torch.tensor(state["scales"], dtype=torch.float32))


def is_padding_acceptable(padded: int, filled: int) -> bool:
    """Whether pictures of `filled` pixels may go into a tensor of `padded`: twice as many at most, or it is small."""
    return padded <= max(2 * filled, GROUP_PIXELS)


def group_sizes(photos: list[Tensor]) -> list[list[int]]:
    """Positions of pictures (3, h, w) that go into one padded tensor, at most twice the memory of what it holds.

    Pictures of about one size are one group, in their order; a panorama among thumbnails is a group of its own.
    """
    groups, tallest, widest, filled = [], 0, 0, 0
    for i in sorted(range(len(photos)), key=lambda i: (photos[i].shape[1] * photos[i].shape[2], i)):
        height, width = photos[i].shape[1:]
        tall, wide, full = max(tallest, height), max(widest, width), filled + height * width
        if not groups or not is_padding_acceptable(tall * wide * (len(groups[-1]) + 1), full):
            groups.append([])
            tall, wide, full = height, width, height * width
        groups[-1].append(i)
        tallest, widest, filled = tall, wide, full
    return [sorted(group) for group in groups]


def decode_batch(positions: list[int], sources: list, max_side: int | None) -> list[PhotoBatch]:
    """Pictures and their positions in a list -> a PhotoBatch for each group of sizes.

    A source is a path, the bytes of a file, or the PhotoError that says why there is none.
    """
    decoded, photos, scales, failures = [], [], [], []
    for position, source in zip(positions, sources, strict=True):
        if isinstance(source, PhotoError):                  # raised again, it would keep this frame's pictures alive
            failures.append((position, source.status, str(source)))
            continue
        try:
            photo, scale = decode_photo(source, max_side)
        except PhotoError as error:
            failures.append((position, error.status, str(error)))
            continue
        decoded.append(position)
        photos.append(photo)
        scales.append(scale)
    batches = []
    for group in group_sizes(photos) or [[]]:
        images, sizes = collate_photos([photos[i] for i in group])
        batches.append(PhotoBatch([decoded[i] for i in group], images, sizes,
                                  torch.tensor([scales[i] for i in group], dtype=torch.float32),
                                  failures if not batches else []))
    return batches


def join_batches(batches: Iterable[PhotoBatch], size: int, device: torch.device) -> Iterator[PhotoBatch]:
    """Batches of a list in chunks of `size` as a device takes them: for a GPU few large ones, each within a chunk.

    Pictures of very different sizes stay apart, as group_sizes has it.
    """
    if not MAX_JOINED_PHOTOS[device.type]:
        yield from batches
        return
    for _, its in itertools.groupby(batches, lambda batch: first_position(batch) // size):
        few = []
        for batch in its:
            if few and not fit_one_call(few + [batch], device):
                yield join(few, device)
                few = []
            few.append(batch)
        yield join(few, device)


def fit_one_call(batches: list[PhotoBatch], device: torch.device) -> bool:
    """Whether a device takes these batches in one call: not too much for it, and not more padding than pictures."""
    n, canvas = sum(len(batch.positions) for batch in batches), math.prod(padded_size(batches))
    filled = sum(int(batch.sizes.prod(1).sum()) for batch in batches)
    return n <= MAX_JOINED_PHOTOS[device.type] and n * canvas <= MAX_JOINED_PIXELS and is_padding_acceptable(n * canvas, filled)


def padded_size(batches: list[PhotoBatch]) -> tuple[int, int]:
    """The height and width that hold every picture."""
    return tuple(max(batch.images.shape[d] for batch in batches) for d in (2, 3))


def join(batches: list[PhotoBatch], device: torch.device) -> PhotoBatch:
    """Batches as one, on a device; their pictures in the order of the batches."""
    height, width = padded_size(batches)
    images = torch.cat([F.pad(part.to(device), (0, width - part.shape[3], 0, height - part.shape[2]))
                        for part in (batch.images for batch in batches)])
    positions = [position for batch in batches for position in batch.positions]
    sizes, scales = (torch.cat(some) for some in zip(*((batch.sizes, batch.scales) for batch in batches), strict=True))
    return PhotoBatch(positions, images, sizes, scales, [failure for batch in batches for failure in batch.failures])


def first_position(batch: PhotoBatch) -> int:
    """Position of some picture of a batch; none is empty."""
    return batch.positions[0] if batch.positions else batch.failures[0][0]


class PhotoBatches(Dataset):
    """Map-style data set: item k is what decode_batch makes of the pictures k * batch_size onward.

    photos: anything with len() and [i] -> a path or the bytes of a file, or a PhotoError; positions: those to take.
    """

    def __init__(self, photos, positions, batch_size: int, max_side: int | None):
        self.photos, self.positions, self.batch_size, self.max_side = photos, positions, batch_size, max_side

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def sources(self, batch: int) -> tuple[list[int], list]:
        """Positions of a batch's pictures, and what decode_batch reads them from."""
        positions = [int(i) for i in self.positions[batch * self.batch_size:(batch + 1) * self.batch_size]]
        return positions, [self.source(position) for position in positions]

    def source(self, position: int) -> str | bytes | PhotoError:
        """What a picture is read from, or why there is nothing to read."""
        try:
            return self.photos[position]
        except PhotoError as error:
            return error

    def __getitem__(self, batch: int) -> list[PhotoBatch]:
        return decode_batch(*self.sources(batch), self.max_side)


def has_shared_memory() -> bool:
    """Whether decoding workers can hand over their pictures: containers often have 64 MiB of shared memory."""
    if not os.path.isdir("/dev/shm"):
        return True
    room = os.statvfs("/dev/shm")
    return room.f_bavail * room.f_frsize >= SHARED_MEMORY


def load_photos(photos, batch_size: int, workers: int, max_side: int | None = None, positions=None,
                batches: Iterable[int] | None = None, pool=None) -> Iterator[PhotoBatch]:
    """PhotoBatches of all pictures, or those at some positions, batch_size at a time, in order.

    One batch comes as several PhotoBatch where its pictures differ much in size. batches: numbers of the batches to
    load; by default all. They are decoded in worker processes; with workers 0 by the threads of `pool`, a
    models.threads.OrderedThreadPool, or without it by this one.
    """
    dataset = PhotoBatches(photos, range(len(photos)) if positions is None else positions, batch_size, max_side)
    if pool and not workers:
        Image.init()                # else Pillow learns its rarer types with the first such file, in several threads
        sources = map(dataset.sources, range(len(dataset)) if batches is None else batches)     # read in this thread
        return itertools.chain.from_iterable(pool.ordered_map(lambda some: decode_batch(*some, max_side), sources))
    loader = DataLoader(dataset, batch_size=None, sampler=batches, num_workers=workers)
    return itertools.chain.from_iterable(loader)
