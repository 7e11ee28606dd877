"""Augmentation against domain shift: light, occlusion, greyscale and lossy compression of views.

Each transform takes views (n, 3, S, S) float32 in 0..255 and a CPU generator, and returns views of
the same shape. `mixture_views` applies fixed ones for calibration.
"""
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, encode_jpeg

from models.training.augmentation import draw_rows

JPEG_QUALITIES = (20, 95)
# luma and the two chroma components of RGB (ITU-R BT.601, as in JPEG)
RGB_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def shift_views(views: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Applies each transform of SHIFT_TRANSFORMS to its share of the views, times `strength`."""
    for transform, share in SHIFT_TRANSFORMS:
        rows = draw_rows(len(views), share * strength, generator)
        if len(rows):
            rows = rows.to(views.device, non_blocking=True)
            views[rows] = transform(views[rows], generator)
    return views


def draw_maps(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(n, 1, 1, 1) float32 draws from a uniform distribution."""
    return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)


def random_light(views: Tensor, generator: torch.Generator) -> Tensor:
    """Gamma of 0.55 to 1.8, and a linear gain across the picture of up to 55 % in any direction."""
    n, size = len(views), views.shape[-1]
    gamma = draw_maps(n, -0.6, 0.6, generator).exp()
    angle, slope = draw_maps(n, 0, 6.2832, generator), draw_maps(n, 0, 0.55, generator)
    position = torch.linspace(-1, 1, size)
    gain = 1 + slope * (angle.cos() * position + angle.sin() * position[:, None])
    gamma, gain = gamma.to(views.device), gain.to(views.device)
    return ((views / 255).clamp_(1e-4, 1).pow(gamma) * gain).mul_(255).clamp_(0, 255)


def random_occlusion(views: Tensor, generator: torch.Generator) -> Tensor:
    """A band over the eyes (sunglasses) or the lower face (mask), of one colour, 70 % to opaque."""
    n, size = len(views), views.shape[-1]
    is_mask = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    mask_top, eye_top = (draw_maps(n, *span, generator) for span in ((0.52, 0.66), (0.14, 0.22)))
    top = torch.where(is_mask, mask_top, eye_top)
    bottom = torch.where(is_mask, torch.ones(()), top + draw_maps(n, 0.14, 0.24, generator))
    position = ((torch.arange(size) + 0.5) / size).view(1, 1, size, 1)
    opacity = ((position >= top) & (position < bottom)) * draw_maps(n, 0.7, 1.0, generator)
    colour = 255 * torch.rand(n, 3, 1, 1, generator=generator) * draw_maps(n, 0.1, 1, generator)
    opacity, colour = opacity.to(views.device), colour.to(views.device)
    return views + opacity * (colour - views)


def greyscale(views: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Luma in all three channels."""
    weights = torch.tensor(RGB_TO_YCC[0], device=views.device).view(3, 1, 1)
    return (views * weights).sum(1, keepdim=True).expand_as(views)


def random_chroma_loss(views: Tensor, generator: torch.Generator) -> Tensor:
    """Chroma at a half to a sixth of the resolution and quantised, luma slightly smoothed.

    A cheap stand-in for AVIF and WebP with 4:2:0 at low rates. All views share the resolution and
    the quantisation step.
    """
    size, matrix = views.shape[-1], torch.tensor(RGB_TO_YCC, device=views.device)
    luma, chroma = torch.einsum("dc,nchw->ndhw", matrix, views).split((1, 2), 1)
    factor, step = (draw_maps(1, *span, generator).item() for span in ((2, 6), (1, 8)))
    small = F.interpolate(chroma, size=max(4, round(size / factor)), mode="bilinear",
                          antialias=True)
    chroma = F.interpolate((small / step).round() * step, size=size, mode="bilinear")
    chroma = chroma * draw_maps(len(views), 0.75, 1.0, generator).to(views.device)
    smooth = F.avg_pool2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), 3, 1)
    luma = luma.lerp(smooth, draw_maps(len(views), 0, 0.8, generator).to(views.device))
    rgb = torch.einsum("dc,nchw->ndhw", matrix.inverse(), torch.cat([luma, chroma], 1))
    return rgb.clamp_(0, 255)


def random_jpeg(views: Tensor, generator: torch.Generator) -> Tensor:
    """JPEG with 4:2:0 and a random quality per view."""
    low, high = JPEG_QUALITIES
    return jpeg(views, torch.randint(low, high + 1, (len(views),), generator=generator).tolist())


def jpeg(views: Tensor, qualities: list[int]) -> Tensor:
    """Views after JPEG compression with 4:2:0, on the CPU: 0.5 ms each at 104 px."""
    pixels = views.round().to(torch.uint8).cpu()
    decoded = [decode_jpeg(encode_jpeg(view.contiguous(), quality), ImageReadMode.RGB)
               for view, quality in zip(pixels, qualities, strict=True)]
    return torch.stack(decoded).to(views.device, torch.float32)


def half_resolution(views: Tensor) -> Tensor:
    """Views reduced to half of their size, and enlarged again."""
    small = F.interpolate(views, scale_factor=0.5, mode="bilinear", antialias=True)
    return F.interpolate(small, size=views.shape[-1], mode="bilinear")


# (transform, share of the views at strength 1), in the order in which they are applied
SHIFT_TRANSFORMS = ((random_light, 0.35), (random_occlusion, 0.08), (greyscale, 0.08),
                    (random_chroma_loss, 0.25), (random_jpeg, 0.35))


def mixture_views(views: Tensor, seed: int) -> Tensor:
    """Views (N, 3, S, S) uint8 of which half are changed: a calibration set with domain shift.

    An eighth each, drawn by the seed: greyscale, JPEG of quality 30, half resolution, light.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, 8, (len(views),), generator=generator)
    transforms = (greyscale, lambda part: jpeg(part, [30] * len(part)), half_resolution,
                  lambda part: random_light(part, generator))
    mixed = views.clone()
    for kind, transform in enumerate(transforms):
        for rows in (kinds == kind).nonzero()[:, 0].split(256):
            rows = rows.to(views.device)
            mixed[rows] = transform(views[rows].float()).round().clamp(0, 255).to(torch.uint8)
    return mixed
