"""Batches of decoded pictures: padding, grouping by size, loading in order, joining for a GPU."""
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.data.decoding import PhotoError, decode_photo
from models.running.threads import OrderedThreadPool

MIN_SHARED_MEMORY = 1 << 30         # free bytes in /dev/shm that decoding workers need
GROUP_PIXELS = 4_000_000            # a padded batch up to this size is never divided
MAX_JOINED_PHOTOS = {"cpu": 0, "cuda": 128}     # pictures per joined batch; 0: do not join
MAX_JOINED_PIXELS = 200_000_000                 # per joined batch, with its padding

Source = str | bytes | PhotoError       # a path, the bytes of a file, or the reason for neither


class PhotoSources(Protocol):
    """Anything with len() and [i] -> a Source, such as a list of paths or a PhotoIndex."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Source: ...


def collate_photos(photos: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pictures (3, h, w) uint8 of any sizes as one zero-padded tensor.

    Returns images (B, 3, H, W) uint8, padded right and below, and sizes (B, 2) int64. B may be 0.
    """
    sizes = torch.tensor([photo.shape[1:] for photo in photos], dtype=torch.int64)
    sizes = sizes.view(len(photos), 2)
    height, width = sizes.amax(0).tolist() if photos else (0, 0)
    images = torch.zeros(len(photos), 3, height, width, dtype=torch.uint8)
    for image, photo in zip(images, photos, strict=True):
        image[:, :photo.shape[1], :photo.shape[2]] = photo
    return images, sizes


@dataclass
class PhotoBatch:
    """Pictures of a list: one padded tensor of those that decoded, and reasons for the others."""
    positions: list[int]                        # of the decoded pictures in the list
    images: Tensor                              # (B, 3, H, W) uint8, zero-padded right and below
    sizes: Tensor                               # (B, 2) int64 true height, width
    scales: Tensor                              # (B,) float32, decoded size / original size
    failures: list[tuple[int, str, str]]        # position, status, reason

    def __getstate__(self) -> dict[str, Any]:
        """Small tensors as lists: between processes, each tensor takes a file of shared memory."""
        return vars(self) | {"sizes": self.sizes.tolist(), "scales": self.scales.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        sizes = torch.tensor(state["sizes"], dtype=torch.int64).view(-1, 2)
        scales = torch.tensor(state["scales"], dtype=torch.float32)
        vars(self).update(state, sizes=sizes, scales=scales)


def is_padding_acceptable(padded_pixels: int, photo_pixels: int) -> bool:
    """True if a padded tensor is small, or at most twice as large as its pictures."""
    return padded_pixels <= max(2 * photo_pixels, GROUP_PIXELS)


def group_sizes(photos: list[Tensor]) -> list[list[int]]:
    """Groups of positions of pictures (3, h, w) that share one tensor, at most half of it padding.

    Pictures of similar sizes form one group, in their order; a panorama among thumbnails has its
    own.
    """
    groups: list[list[int]] = []
    tallest, widest, photo_pixels = 0, 0, 0             # of the current group
    for i in sorted(range(len(photos)), key=lambda i: (photos[i].shape[1] * photos[i].shape[2], i)):
        height, width = photos[i].shape[1:]
        tallest, widest = max(tallest, height), max(widest, width)
        photo_pixels += height * width
        padded_pixels = tallest * widest * (len(groups[-1]) + 1) if groups else 0
        if not groups or not is_padding_acceptable(padded_pixels, photo_pixels):
            groups.append([])
            tallest, widest, photo_pixels = height, width, height * width
        groups[-1].append(i)
    return [sorted(group) for group in groups]


def decode_batch(positions: list[int], sources: list[Source],
                 max_side: int | None) -> list[PhotoBatch]:
    """Decodes the sources at positions of a list: one PhotoBatch per group of similar sizes.

    The first batch has all failures. max_side: as in decode_photo.
    """
    decoded_positions, photos, scales = [], [], []
    failures: list[tuple[int, str, str]] = []
    for position, source in zip(positions, sources, strict=True):
        if isinstance(source, PhotoError):  # its traceback would keep the pictures in memory
            failures.append((position, source.status, str(source)))
            continue
        try:
            photo, scale = decode_photo(source, max_side)
        except PhotoError as error:
            failures.append((position, error.status, str(error)))
            continue
        decoded_positions.append(position)
        photos.append(photo)
        scales.append(scale)
    batches: list[PhotoBatch] = []
    for group in group_sizes(photos) or [[]]:
        images, sizes = collate_photos([photos[i] for i in group])
        batches.append(PhotoBatch(
            positions=[decoded_positions[i] for i in group], images=images, sizes=sizes,
            scales=torch.tensor([scales[i] for i in group], dtype=torch.float32),
            failures=[] if batches else failures))
    return batches


def join_batches(batches: Iterable[PhotoBatch], chunk_size: int,
                 device: torch.device) -> Iterator[PhotoBatch]:
    """Batches of the size that suits a device: few large ones for a GPU, unchanged for a CPU.

    A batch never has pictures of two chunks of chunk_size pictures. Pictures of very different
    sizes stay apart, as in group_sizes.
    """
    if not MAX_JOINED_PHOTOS[device.type]:
        yield from batches
        return
    for _, chunk in itertools.groupby(batches, lambda batch: first_position(batch) // chunk_size):
        pending: list[PhotoBatch] = []
        for batch in chunk:
            if pending and not fits_one_batch([*pending, batch], device):
                yield concatenate_batches(pending, device)
                pending = []
            pending.append(batch)
        yield concatenate_batches(pending, device)


def fits_one_batch(batches: list[PhotoBatch], device: torch.device) -> bool:
    """True if the batches together exceed neither the device's limits nor the limit of padding."""
    n_photos = sum(len(batch.positions) for batch in batches)
    padded_pixels = n_photos * math.prod(padded_size(batches))
    photo_pixels = sum(int(batch.sizes.prod(1).sum()) for batch in batches)
    return (n_photos <= MAX_JOINED_PHOTOS[device.type] and padded_pixels <= MAX_JOINED_PIXELS
            and is_padding_acceptable(padded_pixels, photo_pixels))


def padded_size(batches: list[PhotoBatch]) -> tuple[int, int]:
    """The smallest (height, width) that contains every picture."""
    return (max(batch.images.shape[2] for batch in batches),
            max(batch.images.shape[3] for batch in batches))


def concatenate_batches(batches: list[PhotoBatch], device: torch.device) -> PhotoBatch:
    """One batch with the pictures of all batches, in their order; the images are on the device."""
    height, width = padded_size(batches)
    images = torch.cat([
        F.pad(batch.images.to(device),
              (0, width - batch.images.shape[3], 0, height - batch.images.shape[2]))
        for batch in batches])
    return PhotoBatch(
        positions=[position for batch in batches for position in batch.positions],
        images=images,
        sizes=torch.cat([batch.sizes for batch in batches]),
        scales=torch.cat([batch.scales for batch in batches]),
        failures=[failure for batch in batches for failure in batch.failures])


def first_position(batch: PhotoBatch) -> int:
    """Position of a picture of the batch, decoded or failed; no batch is without pictures."""
    return batch.positions[0] if batch.positions else batch.failures[0][0]


class PhotoBatches(Dataset):
    """Map-style dataset: item k is decode_batch of the batch_size pictures from k * batch_size on.

    photos: the sources. positions: which of them to load, in this order.
    """

    def __init__(self, photos: PhotoSources, positions: Sequence[int], batch_size: int,
                 max_side: int | None):
        self.photos, self.positions = photos, positions
        self.batch_size, self.max_side = batch_size, max_side

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def sources(self, batch: int) -> tuple[list[int], list[Source]]:
        """Positions and sources of the pictures of a batch."""
        start = batch * self.batch_size
        positions = [int(i) for i in self.positions[start:start + self.batch_size]]
        return positions, [self.source(position) for position in positions]

    def source(self, position: int) -> Source:
        """Source of a picture; a PhotoError is returned, not raised."""
        try:
            return self.photos[position]
        except PhotoError as error:
            return error

    def __getitem__(self, batch: int) -> list[PhotoBatch]:
        return decode_batch(*self.sources(batch), self.max_side)


def has_shared_memory() -> bool:
    """True if /dev/shm, which is often small in containers, has room for decoded pictures."""
    if not os.path.isdir("/dev/shm"):
        return True
    status = os.statvfs("/dev/shm")
    return status.f_bavail * status.f_frsize >= MIN_SHARED_MEMORY


def load_photos(photos: PhotoSources, batch_size: int, workers: int, max_side: int | None = None,
                positions: Sequence[int] | None = None, batches: Iterable[int] | None = None,
                pool: OrderedThreadPool | None = None) -> Iterator[PhotoBatch]:
    """PhotoBatches of all pictures, or of those at `positions`, batch_size at a time, in order.

    A batch is divided into several PhotoBatch if its pictures differ much in size. batches: indices
    of the batches to load, by default all. Pictures are decoded by worker processes; with workers 0
    by the threads of `pool` or, without a pool, by the calling thread.
    """
    if positions is None:
        positions = range(len(photos))
    dataset = PhotoBatches(photos, positions, batch_size, max_side)
    if pool and not workers:
        Image.init()        # loads all plugins; loading on demand would happen in several threads
        numbers = range(len(dataset)) if batches is None else batches
        sources = map(dataset.sources, numbers)         # read in the calling thread
        decoded = pool.ordered_map(lambda item: decode_batch(item[0], item[1], max_side), sources)
        return itertools.chain.from_iterable(decoded)
    loader = DataLoader(dataset, batch_size=None, sampler=batches, num_workers=workers)
    return itertools.chain.from_iterable(loader)
