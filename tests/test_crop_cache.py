"""Aligned crops on disk are those that alignment gave, and are made once."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.data.faceset import read_faceset
from models.training.crops import CropLoading, load_crops
from models.training.process import Process

CPU = Process(0, 1, torch.device("cpu"))


@pytest.fixture
def noise_set(tmp_path) -> Path:
    """Three finished crops of each of two classes, and a file that is no picture."""
    rng, root = np.random.default_rng(0), tmp_path / "set"
    for name in ("Black", "White"):
        (root / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / "White" / "broken.png").write_bytes(b"no picture")
    return root


def test_cached_crops_are_those_of_the_first_run(noise_set, tmp_path):
    faces, cache = read_faceset(noise_set), tmp_path / "cache"
    plain = load_crops([faces], ["set"], CropLoading(112, 0), CPU)
    first = load_crops([faces], ["set"], CropLoading(112, 0, cache), CPU)
    times = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    again = load_crops([faces], ["set"], CropLoading(112, 0, cache), CPU)
    assert times == {file: file.stat().st_mtime_ns for file in cache.iterdir()} and len(times) == 2
    for crops in (first, again):
        assert torch.equal(crops.pixels, plain.pixels) and torch.equal(crops.labels, plain.labels)
        assert crops.paths == plain.paths and len(crops.paths) == 6
    small = load_crops([faces], ["set"], CropLoading(56, 0, cache), CPU)
    assert small.pixels.shape[-1] == 56 and len(list(cache.iterdir())) == 4
