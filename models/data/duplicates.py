"""Pictures that are one photograph: a digest and a thumbnail of each -> groups of (nearly) identical ones."""
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.data.decoding import PhotoError, decode_photo

THUMB = 16                      # side of the grey thumbnails by which pictures are compared
# Two pictures whose thumbnails correlate this much, one of them mirrored or not, are taken as the same photograph. In
# UTKFace 590 pairs above it, and 28 mirrored ones, that are not byte-identical are the same photograph saved, toned or
# cut a little differently; at 0.96 to 0.97 half are two people in one pose.
NEAR_DUPLICATE = 0.975
LENGTH = 4000                   # of a thumbnail as a vector of whole numbers: see near_duplicate_pairs
FINGERPRINT_MAX_SIDE = 1024                 # pixels: larger pictures are reduced to this while decoding
BATCH_SIZE = 64                 # pictures a worker reads before it reports


@dataclass
class Fingerprints:
    """What pictures of a list are told apart by: entry k is of the picture at positions[k]."""
    positions: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)          # hash of the file's bytes
    thumbs: list[np.ndarray] = field(default_factory=list)      # (THUMB * THUMB,) uint8

    def add(self, position: int, data: bytes, photo: Tensor) -> None:
        """One more picture: its file's bytes, and what they decode to, (3, H, W) uint8."""
        self.positions.append(position)
        self.digests.append(hashlib.sha256(data).digest())
        self.thumbs.append(thumbnail(photo))

    def extend(self, others: "Fingerprints") -> None:
        """Those of other pictures of the same list."""
        self.positions += others.positions
        self.digests += others.digests
        self.thumbs += others.thumbs


def thumbnail(photo: Tensor) -> np.ndarray:
    """The grey THUMB x THUMB picture, box-averaged, of a photo (3, H, W) uint8: (THUMB * THUMB,) uint8."""
    grey = Image.fromarray(photo.permute(1, 2, 0).numpy()).convert("L")
    return np.asarray(grey.resize((THUMB, THUMB), Image.Resampling.BOX)).reshape(-1)


class FileBatches(Dataset):
    """Items are the Fingerprints of BATCH_SIZE files at a time; files that cannot be read are not among them."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return -(-len(self.paths) // BATCH_SIZE)

    def __getitem__(self, batch: int) -> Fingerprints:
        prints = Fingerprints()
        for position in range(len(self.paths))[batch * BATCH_SIZE:(batch + 1) * BATCH_SIZE]:
            try:
                data = Path(self.paths[position]).read_bytes()
                prints.add(position, data, decode_photo(data, FINGERPRINT_MAX_SIDE)[0])
            except (PhotoError, OSError):
                continue
        return prints


def group_duplicate_files(paths: list[str], workers: int, progress: str | None = None) -> list[list[int]]:
    """Groups of files that are one photograph: lists of positions, each ascending, by first position; singles too.

    Every file is decoded once, in worker processes. One that cannot be read is alone.
    """
    batches, prints = FileBatches(paths), Fingerprints()
    with tqdm(total=len(paths), desc=progress, disable=progress is None, unit=" pictures", smoothing=0.05) as bar:
        for some in DataLoader(batches, batch_size=None, num_workers=min(workers, len(batches))):
            prints.extend(some)
            bar.update(min(BATCH_SIZE, len(paths) - bar.n))
    groups = [[prints.positions[i] for i in group] for group in group_near_duplicates(prints)]
    return sorted(groups + [[i] for i in set(range(len(paths))) - set(prints.positions)])


def group_near_duplicates(prints: Fingerprints) -> list[list[int]]:
    """Groups of pictures that are one photograph: lists of entries, each ascending, by first entry; singles too.

    Two pictures belong together when their bytes are equal or their thumbnails correlate by NEAR_DUPLICATE; groups are what
    such pairs connect.
    """
    thumbs = np.array(prints.thumbs, np.uint8).reshape(-1, THUMB * THUMB)
    parent = list(range(len(thumbs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(digest, i), i) for i, digest in enumerate(prints.digests)]
    different = list(first.values())                # a placeholder that is there a thousand times is compared once
    pairs += [(different[i], different[j]) for i, j in near_duplicate_pairs(thumbs[different])]
    for i, j in pairs:
        low, high = sorted((root(i), root(j)))
        parent[high] = low
    groups: dict[int, list[int]] = {}
    for i in range(len(thumbs)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def near_duplicate_pairs(thumbs: np.ndarray, block: int = 1024) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of thumbnails (n, THUMB * THUMB) uint8 that correlate by NEAR_DUPLICATE, as they are or one mirrored.

    All pairs are compared, by matrix products. The vectors hold whole numbers and are LENGTH long, so a product's sums
    stay below 2**24, where float32 is exact: the outcome depends on no machine. A picture of one tone has no pairs.
    """
    mirrored = thumbs.reshape(-1, THUMB, THUMB)[:, :, ::-1].reshape(thumbs.shape)
    values, others = integer_vectors(thumbs), integer_vectors(np.stack([thumbs, mirrored]))
    pairs, n = [], len(values)
    for i in range(0, n, block):
        for j in range(i, n, 8 * block):                        # in tiles, so that memory does not grow with n
            products = values[i:i + block] @ others[:, j:j + 8 * block].mT                  # (2, block, 8 * block)
            near = (products.amax(0) >= NEAR_DUPLICATE * LENGTH ** 2).triu(1 + i - j).nonzero() + torch.tensor([i, j])
            pairs += [tuple(pair) for pair in near.tolist()]
    return pairs


def integer_vectors(thumbs: np.ndarray) -> Tensor:
    """Thumbnails (..., n, d) without their mean, scaled to LENGTH and rounded: float32; those of one tone are zero."""
    values = thumbs - thumbs.mean(-1, keepdims=True, dtype=np.float64)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    return torch.from_numpy(np.rint(values * (LENGTH / np.maximum(length, 1)))).float()
