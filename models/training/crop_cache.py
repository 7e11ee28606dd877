"""Aligned crops of a labelled set on disk: detection runs once, not in every training run.

A set has two files in the cache: <key>.npy, crops (N, 3, R, R) uint8 of the whole template, and
<key>.json, which tells how each picture was aligned.
"""
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.data.faceset import FaceSet
from models.running.files import atomic_write

AlignedCrops = tuple[Tensor, list[str]]     # crops; 'mtcnn', 'template', 'crop' or '' (unreadable)


def cached_crops(faces: FaceSet, resolution: int, folder: Path,
                 align: Callable[[], AlignedCrops]) -> AlignedCrops:
    """The crops of a set and how each was aligned, from the cache, or by `align` and then cached.

    Cached crops are memory-mapped, and copied on write.
    """
    key = cache_key(faces, resolution)
    array, table = folder / f"{key}.npy", folder / f"{key}.json"
    if not table.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        crops, aligned_by = align()
        with atomic_write(array) as temporary_path, open(temporary_path, "wb") as file:
            np.save(file, crops.numpy())
        with atomic_write(table) as temporary_path:
            temporary_path.write_text(json.dumps({"root": str(faces.root), "files": faces.files,
                                                  "aligned_by": aligned_by}))
        del crops
    return (torch.from_numpy(np.load(array, mmap_mode="c")),
            json.loads(table.read_text())["aligned_by"])


def cache_key(faces: FaceSet, resolution: int) -> str:
    """CRC-32, in hexadecimal, of the pictures' paths and what else the crops depend on."""
    parts = [*map(os.path.abspath, faces.paths()), str(faces.is_aligned), str(resolution)]
    return f"{zlib.crc32(os.fsencode(chr(10).join(parts))):08x}"
