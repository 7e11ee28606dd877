"""Files -> uint8 tensors: listing pictures, decoding them whatever their form, batching them."""
import codecs
import glob
import heapq
import io
import itertools
import json
import math
import os
import struct
import tarfile
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".heic")
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")     # bytes 4 to 12 of such a file
SHARED_MEMORY = 1 << 30             # bytes free in /dev/shm below which workers could not hand over their pictures
GROUP_PIXELS = 4_000_000            # a padded batch up to this size is never divided
JOINED = {"cpu": 0, "cuda": 128}    # pictures at most that are joined for one call; 0: batches as they come
JOINED_PIXELS = 200_000_000         # of joined pictures, with what pads them

warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")    # odd metadata of pictures that decode all the same


class PhotoError(Exception):
    """A picture that cannot be used. status: 'unreadable', 'too_large', or a command's own; the message says why."""

    def __init__(self, status: str, reason: str):
        super().__init__(" ".join(reason.split()))
        self.status = status


class InputError(Exception):
    """A folder, list or set of tar shards that cannot be read or holds no picture; the message says which."""


def walk_images(folder: str | Path, below: str = "") -> Iterator[str]:
    """Relative '/'-separated paths of the pictures under a folder, sorted by their bytes.

    Memory stays flat in huge folders. Links to folders are followed, never in a circle; a subfolder that may not be
    read is passed over with a warning.
    """
    here = os.path.join(folder, below)
    for name in map(os.fsdecode, sort_names(scan_names(here))):
        path = f"{below}/{name}" if below else name
        if name.endswith("/"):
            if not is_circle(here, name):
                try:
                    yield from walk_images(folder, path[:-1])
                except PermissionError as error:
                    warnings.warn(f"passed over: {error}", stacklevel=2)
        elif name.lower().endswith(IMAGE_TYPES):
            yield path


def scan_names(folder: str) -> Iterator[bytes]:
    """Names in a folder as they come; those of folders end in '/', so that sorting levels sorts whole paths."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield os.fsencode(entry.name) + (b"/" if entry.is_dir() else b"")


def is_circle(folder: str, name: str) -> bool:
    """Whether `name` in a folder is a link back to that folder or one above it."""
    path = os.path.join(folder, name.rstrip("/"))
    return os.path.islink(path) and f"{os.path.realpath(folder)}{os.sep}".startswith(os.path.realpath(path) + os.sep)


def sort_names(names: Iterable[bytes], held: int = 100_000) -> Iterator[bytes]:
    """Names sorted; at most `held` of them in memory, longer series as sorted runs in temporary files."""
    names = iter(names)
    runs = []
    while some := sorted(itertools.islice(names, held)):
        if len(some) < held and not runs:
            yield from some
            return
        run = tempfile.TemporaryFile()  # noqa: SIM115 - lives until the merge has read it
        run.writelines(name.replace(b"\n", b"\0") + b"\n" for name in some)      # no name holds a NUL
        run.seek(0)
        runs.append(run)
    yield from heapq.merge(*((line[:-1].replace(b"\0", b"\n") for line in run) for run in runs))


def list_images(folder: str | Path) -> list[str]:
    """Sorted relative '/'-separated paths of all pictures under a folder."""
    return list(walk_images(folder))


class PhotoIndex:
    """Pictures of a folder, a list or tar shards: len(), name(i), and [i] -> a path, or the bytes of a tar's member.

    The names stay on disk, so memory is the same for five million as for five: names.bin holds them end to end,
    rows.bin a record for each (start and length of the name, and of a member its shard, offset and size), index.json
    the folder or the shards. Every process reads through its own file handles, and in one thread.
    """

    def __init__(self, folder: str | Path):
        self.names_path, self.rows_path = (os.path.join(folder, name) for name in ("names.bin", "rows.bin"))
        about = json.loads((Path(folder) / "index.json").read_text())
        self.root, self.shards = about["root"], about["shards"]
        self.row = row_format(self.shards)
        self.length = os.path.getsize(self.rows_path) // struct.calcsize(self.row)
        self.handles, self.owner = {}, None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict:
        return vars(self) | {"handles": {}, "owner": None}

    def close(self) -> None:
        """Closes this process's files, which Windows could not remove otherwise; reading on opens them again."""
        if self.owner == os.getpid():
            for file in self.handles.values():
                file.close()
        self.handles, self.owner = {}, None

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Bytes of a file; names.bin, rows.bin and the shard read last stay open."""
        if self.owner != os.getpid():                   # after a fork two processes would share one file position
            self.handles, self.owner = {}, os.getpid()
        if path not in self.handles:
            for old in list(self.handles)[2:]:
                self.handles.pop(old).close()
            self.handles[path] = open(path, "rb")       # noqa: SIM115 - closed when the next shard is opened
        self.handles[path].seek(offset)
        return self.handles[path].read(size)

    def record(self, i: int) -> tuple[int, ...]:
        """Start and length of a name, and of a tar's member its shard, offset and size."""
        if not 0 <= i < self.length:
            raise IndexError(i)
        size = struct.calcsize(self.row)
        return struct.unpack(self.row, self.read(self.rows_path, i * size, size))

    def name(self, i: int) -> str:
        """Name of a picture: its path below the folder, its line of the list, or shard/member."""
        start, length = self.record(i)[:2]
        return os.fsdecode(self.read(self.names_path, start, length))

    def __getitem__(self, i: int) -> str | bytes:
        name = self.name(i)
        if not self.shards:
            return os.path.join(self.root, name)
        shard, offset, size = self.record(i)[2:]
        return self.read(self.shards[shard], offset, size)


def row_format(shards: list[str]) -> str:
    """struct's format of a record of rows.bin."""
    return "<qiiqq" if shards else "<qi"


def index_photos(folder: str | Path, inputs: list[str] | None, in_list: str | None = None) -> PhotoIndex:
    """Writes the index of all pictures of the inputs into a folder, and opens it.

    inputs: one folder, or tar shards (paths or patterns). in_list: a file with one path a line, relative to the
    input folder, or to the current one where there is none. Raises InputError.
    """
    shards = [] if in_list else find_shards(inputs)
    root = "" if shards or not inputs else inputs[0]
    if not shards and inputs and (len(inputs) > 1 or not os.path.isdir(root)):
        raise InputError(f"{' '.join(inputs)}: wants one folder that exists, or .tar shards")
    entries = (tar_members(shards) if shards else
               ((name,) for name in (list_lines(in_list) if in_list else walk_images(root))))
    row, start, folder = row_format(shards), 0, Path(folder)
    try:
        with open(folder / "names.bin", "wb") as names, open(folder / "rows.bin", "wb") as rows:
            for name, *member in entries:
                encoded = os.fsencode(name)
                names.write(encoded)
                rows.write(struct.pack(row, start, len(encoded), *member))
                start += len(encoded)
    except (PermissionError, FileNotFoundError, IsADirectoryError, tarfile.TarError) as error:
        raise InputError(f"{in_list or ' '.join(inputs)}: cannot be read ({error})") from None
    if start == 0:
        raise InputError(f"{in_list or ' '.join(inputs)}: holds no picture ({' '.join(IMAGE_TYPES)})")
    (folder / "index.json").write_text(json.dumps({"root": root, "shards": shards}))
    return PhotoIndex(folder)


def find_shards(inputs: list[str]) -> list[str]:
    """Sorted paths of the tar shards that inputs name, patterns such as 'shards/*.tar' resolved; [] for a folder."""
    if len(inputs) == 1 and os.path.isdir(inputs[0]):
        return []
    found = sorted({path for text in inputs for path in ([text] if os.path.exists(text) else glob.glob(text))})
    if not found:
        raise InputError(f"{' '.join(inputs)}: no such folder or tar")
    if not all(os.path.isfile(path) and path.endswith(".tar") for path in found):
        return []
    names = [os.path.basename(path) for path in found]
    if len(set(names)) < len(names):
        raise InputError("two shards share a file name, and their pictures would share names")
    return found


def tar_members(shards: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """(shard/member, number of the shard, offset, size) of every picture in plain tars, in their order.

    A link, whose bytes lie elsewhere, has size 0 and is found unreadable when its turn comes.
    """
    for number, path in enumerate(shards):
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()                     # tarfile remembers them all otherwise
                if not member.isdir() and member.name.lower().endswith(IMAGE_TYPES):
                    size = member.size if member.isreg() else 0
                    yield f"{os.path.basename(path)}/{member.name}", number, member.offset_data, size


def list_lines(path: str | Path) -> Iterator[str]:
    """The lines of a list of paths, without empty ones; any bytes but line ends may be in a path.

    A byte order mark, which spreadsheets and Windows editors put first, is none of the first path.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            line = line if number else line.removeprefix(codecs.BOM_UTF8)
            if name := line.rstrip(b"\r\n"):
                yield os.fsdecode(name)


def decode_photo(source: str | Path | bytes, max_side: int | None = None) -> tuple[Tensor, float]:
    """A picture as (3, H, W) uint8 RGB, upright by its EXIF tag, and its scale: decoded over original size.

    source: a path, or the bytes of a file. Grey, palette, CMYK, 16-bit and animated (first frame) pictures become
    RGB; transparency lies on white. With max_side, a larger picture is reduced so that its longest side is max_side,
    JPEG already while decoding. Raises PhotoError.
    """
    try:
        with open_image(source) as image:
            longest = max(image.size)
            if max_side and longest > max_side:
                image.draft(None, (max_side, max_side))
            image = to_rgb(upright(image))
        if max_side and max(image.size) > max_side:
            image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=3.0)
        pixels = np.array(np.asarray(image).transpose(2, 0, 1), order="C")      # (3, H, W), copied once
    except PhotoError:
        raise
    except UnidentifiedImageError:                          # Pillow's own message holds a memory address for bytes
        raise PhotoError("unreadable", "UnidentifiedImageError: not a picture of a known type") from None
    except Exception as error:      # Pillow's plugins raise whatever a broken file makes them: a row, never the end
        raise PhotoError("unreadable", f"{type(error).__name__}: {error}") from None
    return torch.from_numpy(pixels), max(image.size) / longest


def open_image(source: str | Path | bytes) -> Image.Image:
    """The opened, not yet decoded picture. Raises PhotoError for one over Pillow's limit against bombs."""
    if source[4:12] in HEIC_BRANDS if isinstance(source, bytes) else str(source).lower().endswith(".heic"):
        enable_heic()
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        raise PhotoError("too_large", str(error)) from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise PhotoError("too_large", f"{image.width} x {image.height} pixels; the limit is {Image.MAX_IMAGE_PIXELS}")
    return image


def enable_heic() -> None:
    """Registers the optional pillow-heif with Pillow. Raises PhotoError where it is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise PhotoError("unreadable", "HEIC needs the optional package pillow-heif: pip install pillow-heif") from None
    register_heif_opener()


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; as it is where the tag cannot be read."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except (SyntaxError, ValueError, TypeError, KeyError, ZeroDivisionError, struct.error):
        image.load()
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB form of any mode: deep greys are scaled to a byte, transparency is laid on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0)
        top = grey.max(initial=0)
        full = 65535.0 if image.mode != "F" and top > 255 else 1.0 if image.mode == "F" and top <= 1 else 255.0
        return Image.fromarray((grey.clip(0, full) * (255 / full)).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


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


def worth_padding(padded: int, filled: int) -> bool:
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
        if not groups or not worth_padding(tall * wide * (len(groups[-1]) + 1), full):
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
    if not JOINED[device.type]:
        yield from batches
        return
    for _, its in itertools.groupby(batches, lambda batch: first_position(batch) // size):
        few = []
        for batch in its:
            if few and not go_together(few + [batch], device):
                yield join(few, device)
                few = []
            few.append(batch)
        yield join(few, device)


def go_together(batches: list[PhotoBatch], device: torch.device) -> bool:
    """Whether a device takes these batches in one call: not too much for it, and not more padding than pictures."""
    n, canvas = sum(len(batch.positions) for batch in batches), math.prod(padded_size(batches))
    filled = sum(int(batch.sizes.prod(1).sum()) for batch in batches)
    return n <= JOINED[device.type] and n * canvas <= JOINED_PIXELS and worth_padding(n * canvas, filled)


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


def can_share() -> bool:
    """Whether decoding workers can hand over their pictures: containers often have 64 MiB of shared memory."""
    if not os.path.isdir("/dev/shm"):
        return True
    room = os.statvfs("/dev/shm")
    return room.f_bavail * room.f_frsize >= SHARED_MEMORY


def load_photos(photos, batch_size: int, workers: int, max_side: int | None = None, positions=None,
                batches: Iterable[int] | None = None, cores=None) -> Iterator[PhotoBatch]:
    """PhotoBatches of all pictures, or those at some positions, batch_size at a time, in order.

    One batch comes as several PhotoBatch where its pictures differ much in size. batches: numbers of the batches to
    load; by default all. They are decoded in worker processes; with workers 0 by the threads of `cores`, a
    models.threads.Cores, or without it by this one.
    """
    dataset = PhotoBatches(photos, range(len(photos)) if positions is None else positions, batch_size, max_side)
    if cores and not workers:
        Image.init()                # else Pillow learns its rarer types with the first such file, in several threads
        sources = map(dataset.sources, range(len(dataset)) if batches is None else batches)     # read in this thread
        return itertools.chain.from_iterable(cores.in_turn(lambda some: decode_batch(*some, max_side), sources))
    loader = DataLoader(dataset, batch_size=None, sampler=batches, num_workers=workers)
    return itertools.chain.from_iterable(loader)
