"""Picture files -> (3, H, W) uint8 RGB tensors, for every format, mode and orientation."""
import io
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".heic")
HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")     # bytes 4 to 12

# Pillow warns of unusual metadata in pictures that it decodes correctly.
warnings.filterwarnings("ignore", module=r"(PIL|pillow_heif)\.")


class PhotoError(Exception):
    """A picture that cannot be used; the message is the reason.

    status: 'unreadable', 'too_large', or a status of the command's own.
    """

    def __init__(self, status: str, reason: str):
        super().__init__(" ".join(reason.split()))
        self.status = status


def decode_photo(source: str | Path | bytes, max_side: int | None = None) -> tuple[Tensor, float]:
    """A picture as (3, H, W) uint8 RGB, upright by its EXIF tag, and the ratio decoded size / size.

    source: a path, or the bytes of a file. Greyscale, palette, CMYK, 16-bit and animated pictures
    (their first frame) become RGB; transparent pixels are blended with white. With max_side, a
    larger picture is reduced to this longest edge, a JPEG already while decoding. Raises
    PhotoError.
    """
    try:
        with open_image(source) as file:
            longest_edge = max(file.size)
            if max_side and longest_edge > max_side:
                file.draft(None, (max_side, max_side))
            image = to_rgb(apply_orientation(file))
        if max_side and max(image.size) > max_side:
            image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=3.0)
        pixels = np.array(np.asarray(image).transpose(2, 0, 1), order="C")  # (3, H, W), copied once
    except PhotoError:
        raise
    except UnidentifiedImageError:      # for bytes, Pillow's own message holds a memory address
        raise PhotoError("unreadable",
                         "UnidentifiedImageError: not a picture of a known type") from None
    except Exception as error:          # Pillow's plugins raise any exception for a broken file
        raise PhotoError("unreadable", f"{type(error).__name__}: {error}") from None
    return torch.from_numpy(pixels), max(image.size) / longest_edge


def open_image(source: str | Path | bytes) -> Image.Image:
    """The opened, not yet decoded picture. Raises PhotoError above Pillow's limit of pixels."""
    if is_heic(source):
        enable_heic()
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        raise PhotoError("too_large", str(error)) from None
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise PhotoError("too_large",
                         f"{image.width} x {image.height} pixels; the limit is {limit}")
    return image


def is_heic(source: str | Path | bytes) -> bool:
    """True for HEIC: by the brand of a file's bytes, or by the ending of a path."""
    if isinstance(source, bytes):
        return source[4:12] in HEIC_BRANDS
    return str(source).lower().endswith(".heic")


def enable_heic() -> None:
    """Registers the optional package pillow-heif. Raises PhotoError if it is not installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise PhotoError("unreadable", "HEIC needs the optional package pillow-heif: "
                                       "pip install pillow-heif") from None
    register_heif_opener()


def apply_orientation(image: Image.Image) -> Image.Image:
    """The picture rotated by its EXIF orientation tag; unchanged if the tag is invalid."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except (SyntaxError, ValueError, TypeError, KeyError, ZeroDivisionError, struct.error):
        image.load()
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: 16-bit and float greys scaled to 8 bits, transparency laid on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return scale_deep_grey(image).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def scale_deep_grey(image: Image.Image) -> Image.Image:
    """An 8-bit greyscale picture of one with integers up to 65535 or floats up to 1 or 255."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0)
    highest = grey.max(initial=0)
    low, high = (1.0, 255.0) if image.mode == "F" else (255.0, 65535.0)
    white = high if highest > low else low
    return Image.fromarray((grey.clip(0, white) * (255 / white)).round().astype(np.uint8))
