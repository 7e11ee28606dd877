"""Fixtures: the folder of real faces, and small sets of drawn faces."""
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def faces_data() -> Path:
    """Folder with UTKFace.tar, FairFace_val.tar, wild.tar, ...: FACES_DATA or ../shared/data.

    Without it the test is skipped, or fails if FACES_REQUIRED is set.
    """
    folder = Path(os.environ.get("FACES_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "UTKFace.tar").is_file():
        missing = f"no real faces: {folder} has no UTKFace.tar (set FACES_DATA)"
        if os.environ.get("FACES_REQUIRED"):
            pytest.fail(missing)
        pytest.skip(missing)
    return folder


def draw_blots(seed: int) -> Image.Image:
    """A 200 x 200 picture of random soft spots, different for every seed."""
    blots = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize((200, 200), Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image, quality: int = 90) -> bytes:
    """The bytes of a JPEG file."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def draw_crop(label: int, seed: int, size: int = 112) -> Image.Image:
    """A drawn face with noise whose background colour depends on its label: easy to learn."""
    noise = np.random.default_rng([label, seed])
    colour = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)][label % 4])
    pixels = np.clip(colour + noise.normal(0, 25, (size, size, 3)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    unit = size / 112
    for x, y in ((38, 52), (74, 52), (56, 72), (42, 92), (71, 92)):
        pen.ellipse(
            [unit * (x - 4), unit * (y - 4), unit * (x + 4), unit * (y + 4)], fill=(20, 20, 20)
        )
    return picture


@pytest.fixture
def drawn_set(tmp_path) -> Path:
    """An aligned set of drawn crops in four classes: train 40, val 16, test 16."""
    root = tmp_path / "drawn"
    for split, n in (("train", 10), ("val", 4), ("test", 4)):
        for label in range(4):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for i in range(n):
                draw_crop(label, 100 * len(split) + i).save(folder / f"{label}_{i}.png")
    (root / "faceset.json").write_text(
        '{"classes": ["White", "Black", "Asian", "Indian"], "aligned": true}'
    )
    return root


@pytest.fixture
def two_threads():
    """PyTorch uses two threads, whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
