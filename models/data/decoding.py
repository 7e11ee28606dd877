"""Files -> uint8 tensors: listing pictures, decoding them whatever their form, batching them."""
import io
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".heic")
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")     # bytes 4 to 12 of such a file

warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")    # odd metadata of pictures that decode all the same


class PhotoError(Exception):
    """A picture that cannot be used. status: 'unreadable', 'too_large', or a command's own; the message says why."""

    def __init__(self, status: str, reason: str):
        super().__init__(" ".join(reason.split()))
        self.status = status


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


