"""Near-duplicates: a hash and a thumbnail per picture -> groups of pictures of one photograph."""
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.data.decoding import PhotoError, decode_photo

THUMB = 16                      # width and height of the grey thumbnails that are compared
# Minimum correlation of the thumbnails of near-duplicates, one of them mirrored or not. In UTKFace,
# 590 pairs above it (28 of them mirrored) that are not byte-identical are the same photograph with
# another compression, tone or crop. Between 0.96 and 0.97, half of the pairs are two people in the
# same pose.
NEAR_DUPLICATE = 0.975
VECTOR_LENGTH = 4000            # Euclidean length of integer_vectors
FINGERPRINT_MAX_SIDE = 1024     # pixels: longer edges are reduced to this while decoding
BATCH_SIZE = 64                 # pictures per item of a worker


@dataclass
class Fingerprints:
    """Hashes and thumbnails of pictures of a list; entry k is of the picture at positions[k]."""
    positions: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)          # SHA-256 of the file
    thumbs: list[np.ndarray] = field(default_factory=list)      # (THUMB * THUMB,) uint8

    def add(self, position: int, data: bytes, photo: Tensor) -> None:
        """Adds a picture: the bytes of its file and its decoded photo (3, H, W) uint8."""
        self.positions.append(position)
        self.digests.append(hashlib.sha256(data).digest())
        self.thumbs.append(thumbnail(photo))

    def extend(self, others: "Fingerprints") -> None:
        """Adds the entries of other pictures of the same list."""
        self.positions += others.positions
        self.digests += others.digests
        self.thumbs += others.thumbs


def thumbnail(photo: Tensor) -> np.ndarray:
    """(THUMB * THUMB,) uint8: a photo (3, H, W) uint8 in greyscale, reduced by box averages."""
    grey = Image.fromarray(photo.permute(1, 2, 0).numpy()).convert("L")
    return np.asarray(grey.resize((THUMB, THUMB), Image.Resampling.BOX)).reshape(-1)


class FileBatches(Dataset):
    """Items are the Fingerprints of BATCH_SIZE files each, without those of unreadable files."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return -(-len(self.paths) // BATCH_SIZE)

    def __getitem__(self, batch: int) -> Fingerprints:
        fingerprints = Fingerprints()
        start = batch * BATCH_SIZE
        for position in range(len(self.paths))[start:start + BATCH_SIZE]:
            try:
                data = Path(self.paths[position]).read_bytes()
                fingerprints.add(position, data, decode_photo(data, FINGERPRINT_MAX_SIDE)[0])
            except (PhotoError, OSError):
                continue
        return fingerprints


def group_duplicate_files(paths: list[str], workers: int,
                          progress: str | None = None) -> list[list[int]]:
    """Groups of near-duplicate files: ascending positions, ordered by their first; also singles.

    Worker processes decode every file once. An unreadable file is a group of its own. progress: the
    description of a progress bar.
    """
    batches, fingerprints = FileBatches(paths), Fingerprints()
    loader = DataLoader(batches, batch_size=None, num_workers=min(workers, len(batches)))
    with tqdm(total=len(paths), desc=progress, disable=progress is None, unit=" pictures",
              smoothing=0.05) as bar:
        for batch in loader:
            fingerprints.extend(batch)
            bar.update(min(BATCH_SIZE, len(paths) - bar.n))
    positions = fingerprints.positions
    groups = [[positions[i] for i in group] for group in group_near_duplicates(fingerprints)]
    return sorted(groups + [[i] for i in set(range(len(paths))) - set(positions)])


def group_near_duplicates(fingerprints: Fingerprints) -> list[list[int]]:
    """Groups of near-duplicates: ascending entries, ordered by their first entry; also singles.

    Two pictures are connected if their bytes are equal or their thumbnails correlate by at least
    NEAR_DUPLICATE. The groups are the connected components.
    """
    thumbs = np.array(fingerprints.thumbs, np.uint8).reshape(-1, THUMB * THUMB)
    first_entry: dict[bytes, int] = {}
    pairs = [(first_entry.setdefault(digest, i), i)
             for i, digest in enumerate(fingerprints.digests)]
    distinct = list(first_entry.values())       # a file with a thousand copies is compared once
    pairs += [(distinct[i], distinct[j]) for i, j in near_duplicate_pairs(thumbs[distinct])]
    return connected_groups(len(thumbs), pairs)


def connected_groups(n: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Connected components of n nodes: ascending node numbers, ordered by their first node."""
    if n == 0:
        return []
    rows, columns = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(n, n))
    groups: dict[int, list[int]] = {}
    for node, label in enumerate(connected_components(graph, directed=False)[1].tolist()):
        groups.setdefault(label, []).append(node)
    return list(groups.values())


def near_duplicate_pairs(thumbs: np.ndarray, block: int = 1024) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of thumbnails that correlate by NEAR_DUPLICATE, plain or one mirrored.

    thumbs (n, THUMB * THUMB) uint8. All pairs are compared by matrix products of integer_vectors.
    Their sums stay below 2**24, where float32 is exact, so the result is the same on every machine.
    A picture of a single tone has no pairs.
    """
    mirrored = thumbs.reshape(-1, THUMB, THUMB)[:, :, ::-1].reshape(thumbs.shape)
    values, others = integer_vectors(thumbs), integer_vectors(np.stack([thumbs, mirrored]))
    threshold = NEAR_DUPLICATE * VECTOR_LENGTH ** 2
    pairs: list[tuple[int, int]] = []
    for i in range(0, len(values), block):
        for j in range(i, len(values), 8 * block):              # tiles bound the memory
            products = values[i:i + block] @ others[:, j:j + 8 * block].mT  # (2, block, 8 * block)
            is_near = (products.amax(0) >= threshold).triu(1 + i - j)
            pairs += [(i + row, j + column) for row, column in is_near.nonzero().tolist()]
    return pairs


def integer_vectors(thumbs: np.ndarray) -> Tensor:
    """Thumbnails (..., n, d) minus their mean, scaled to VECTOR_LENGTH and rounded, in float32.

    A thumbnail of a single tone becomes a zero vector.
    """
    values = thumbs - thumbs.mean(-1, keepdims=True, dtype=np.float64)
    lengths = np.linalg.norm(values, axis=-1, keepdims=True)
    return torch.from_numpy(np.rint(values * (VECTOR_LENGTH / np.maximum(lengths, 1)))).float()
