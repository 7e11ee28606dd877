"""Pictures without people, to count false faces on: photographs that come with packages, and
drawn ones.
"""
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Pictures inside scikit-image, scikit-learn and matplotlib without a person: public domain or CC0,
# as their README files say. Coins show emperors in relief, chelsea is a cat, horse a silhouette.
PACKAGED = {
    "skimage": [
        "data/" + name
        for name in (
            "brick.png",
            "cell.png",
            "chelsea.png",
            "clock_motion.png",
            "coffee.png",
            "coins.png",
            "color.png",
            "grass.png",
            "gravel.png",
            "horse.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "logo.png",
            "microaneurysms.png",
            "moon.png",
            "motorcycle_left.png",
            "page.png",
            "phantom.png",
            "retina.jpg",
            "rocket.jpg",
            "text.png",
        )
    ],
    "sklearn": ["datasets/images/china.jpg", "datasets/images/flower.jpg"],
    "matplotlib": [
        "mpl-data/sample_data/Minduka_Present_Blue_Pack.png",
        "mpl-data/images/matplotlib_large.png",
    ],
}
PARTS = 5  # of each packaged picture: the whole, and crops of it, some turned or enlarged
DRAWN = 75


def pictures_without_people() -> Iterator[tuple[str, Image.Image]]:
    """(name, RGB picture) of 200 pictures, the same in every run; fewer where a package is
    missing.
    """
    for package, names in PACKAGED.items():
        spec = importlib.util.find_spec(package)
        for name in names if spec else ():
            path = Path(spec.origin).parent / name
            if path.is_file():
                yield from parts_of(path)
    for seed in range(DRAWN):
        yield (
            f"{DRAWINGS[seed % len(DRAWINGS)].__name__}_{seed}",
            DRAWINGS[seed % len(DRAWINGS)](seed),
        )


def parts_of(path: Path) -> Iterator[tuple[str, Image.Image]]:
    """A packaged picture of 640 px at most, and PARTS - 1 square crops of it at 200 px."""
    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.thumbnail((640, 640))
    yield path.stem, image
    rng = np.random.default_rng(len(path.stem))
    for i in range(1, PARTS):
        side = int(min(image.size) * rng.uniform(0.35, 0.9))
        left, top = (int(rng.uniform(0, length - side)) for length in image.size)
        part = image.crop((left, top, left + side, top + side)).resize(
            (200, 200), Image.Resampling.BICUBIC
        )
        yield f"{path.stem}_{i}", part.rotate(90 * (i // 3))


# ----------------------------------------------------------------------------------- drawn pictures
def gradient(seed: int) -> Image.Image:
    """A plain colour that fades into another, with a little noise."""
    rng = np.random.default_rng(seed)
    first, last = rng.uniform(0, 255, (2, 3))
    along = np.linspace(0, 1, 240)[:, None, None] * np.ones((240, 320, 1))
    return to_image(first + (last - first) * along + rng.normal(0, 4, (240, 320, 3)))


def texture(seed: int) -> Image.Image:
    """Noise whose spectrum falls as natural pictures' does, of a random tint."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(320), np.fft.fftfreq(240))) + 1 / 320
    noise = np.fft.ifft2(np.fft.fft2(rng.normal(size=(240, 320, 3)), axes=(0, 1))
                         / frequency[..., None] ** rng.uniform(0.5, 1.8), axes=(0, 1)).real
    return to_image(rng.uniform(70, 180, 3) + 45 * noise / noise.std())


def shapes(seed: int) -> Image.Image:
    """Ellipses, rectangles and lines of random colours."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (320, 240), tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(25):
        x, y, width, height = rng.integers(0, 320), rng.integers(0, 240), *rng.integers(8, 110, 2)
        draw = (pen.ellipse, pen.rectangle)[rng.integers(2)]
        draw([int(x - width / 2), int(y - height / 2), int(x + width / 2), int(y + height / 2)],
             fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def text_page(seed: int) -> Image.Image:
    """Lines of letters, digits and dingbats."""
    rng = np.random.default_rng(seed)
    signs = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:()    ☺☻☹♥♣♠♦☼")
    image = Image.new("RGB", (320, 400), "white")
    pen = ImageDraw.Draw(image)
    y = 10
    while y < 380:
        size = int(rng.choice([10, 14, 22, 60]))
        pen.text(
            (8, y),
            "".join(rng.choice(signs, 60)),
            fill=tuple(rng.integers(0, 90, 3).tolist()),
            font=font(size),
        )
        y += int(size * 1.4)
    return image


def smiley(seed: int) -> Image.Image:
    """A drawn round face: two eyes, a nose, a mouth."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (240, 240), tuple(rng.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(image)
    centre, radius = 120 + rng.uniform(-20, 20), rng.uniform(40, 100)
    skin, ink = tuple(rng.integers(120, 256, 3).tolist()), tuple(rng.integers(0, 80, 3).tolist())

    def spot(x, y, r, fill):
        pen.ellipse(
            [centre + x - r, centre + y - r, centre + x + r, centre + y + r],
            fill=fill,
            outline=ink,
            width=2,
        )

    spot(0, 0, radius, skin)
    for side in (-0.4, 0.4):
        spot(side * radius, -0.25 * radius, 0.15 * radius, "white")
        spot(side * radius, -0.22 * radius, 0.07 * radius, ink)
    spot(0, 0.1 * radius, 0.06 * radius, ink)
    mouth = [
        centre - 0.5 * radius,
        centre - 0.4 * radius,
        centre + 0.5 * radius,
        centre + 0.6 * radius,
    ]
    pen.arc(mouth, 20, 160, fill=ink, width=max(2, int(radius / 15)))
    return image


DRAWINGS = (gradient, texture, shapes, text_page, smiley)


def font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib, else Pillow's own."""
    try:
        from matplotlib import get_data_path

        return ImageFont.truetype(
            io.BytesIO(Path(get_data_path(), "fonts/ttf/DejaVuSans.ttf").read_bytes()), size
        )
    except (ImportError, OSError):
        return ImageFont.load_default(size)


def to_image(pixels: np.ndarray) -> Image.Image:
    """Float pixels (h, w, 3) of any range as a picture."""
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
