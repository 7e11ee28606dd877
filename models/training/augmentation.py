"""Random views of crops: geometry in one warp, colour, blur, erasing; and mixup."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.faces.align import TEMPLATE_SIZE, sample_views, template_pixels

CPU_CHUNK = 16      # crops that a CPU converts to float and warps at a time: they fit its caches
BLUR_GROUP = 16     # most pictures that share one blur resolution


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(n,) float32 draws from a uniform distribution."""
    return low + (high - low) * torch.rand(n, generator=generator)


def draw_rows(n: int, share: float, generator: torch.Generator) -> Tensor:
    """Rows (k,) int64 out of n, each drawn with probability `share`."""
    return (torch.rand(n, generator=generator) < share).nonzero().squeeze(1)


def random_views(crops: Tensor, window: tuple, input_size: int, augment: bool,
                 generator: torch.Generator) -> Tensor:
    """One augmented view per crop: (B, 3, R, R) uint8 -> (B, 3, S, S) float32 in 0..255.

    Without `augment`: only a flip and the shifts of a random crop of 104 from 128.
    All random numbers are drawn on the CPU, so that no step waits for a GPU.
    """
    warp = random_warps(len(crops), window, augment, generator)
    to_crop = template_pixels(warp, crops.shape[-1] / TEMPLATE_SIZE)
    chunk = CPU_CHUNK if crops.device.type == "cpu" else max(1, len(crops))
    chunks = zip(crops.split(chunk), to_crop.split(chunk), strict=True)
    views = torch.cat([sample_views(pixels.float(), warps, window, input_size)
                       for pixels, warps in chunks])
    for transform in PIXEL_TRANSFORMS if augment else ():
        views = transform(views, generator)
    return views


def random_warps(n: int, window: tuple, augment: bool, generator: torch.Generator) -> Tensor:
    """Affine maps (n, 2, 3) of template pixels: shift and flip; `augment` adds the others.

    These are rotation by 12 degrees, scale by 16 % and stretch by 6 % at most.
    """
    flip = 1 - 2 * (torch.rand(n, generator=generator) < 0.5).float()
    reach = 5.0 if augment else 12 / 104 * (window[2] - window[0])          # template pixels
    shift = torch.stack([uniform(n, -reach, reach, generator),
                         uniform(n, -reach, reach, generator)], -1)
    linear = torch.zeros(n, 2, 2)
    linear[:, 0, 0], linear[:, 1, 1] = flip, 1.0
    if augment:
        angle = uniform(n, -12, 12, generator) * (math.pi / 180)
        zoom = uniform(n, -0.16, 0.16, generator).exp()
        stretch = uniform(n, -0.06, 0.06, generator).exp()
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
        linear = rotation @ torch.diag_embed(torch.stack([flip * stretch, 1 / stretch], -1))
    centre = torch.tensor([(window[0] + window[2]) / 2 - 0.5, (window[1] + window[3]) / 2 - 0.5])
    return torch.cat([linear, (centre + shift - linear @ centre)[:, :, None]], 2)


def random_colour(views: Tensor, generator: torch.Generator) -> Tensor:
    """Random brightness, contrast, saturation and white balance; one picture in fourteen grey.

    All four together are one 3 x 3 matrix and one offset per picture.
    """
    n = len(views)
    saturation = uniform(n, 0.6, 1.4, generator)
    saturation[torch.rand(n, generator=generator) < 0.07] = 0
    gains = uniform(3 * n, -0.06, 0.06, generator).exp().view(n, 3, 1)
    contrast = uniform(n, -0.3, 0.3, generator).exp().view(n, 1, 1)
    brightness = uniform(n, -25, 25, generator).view(n, 1, 1)
    pixels = views.flatten(2)                                               # (n, 3, S * S)
    mean = pixels.mean((1, 2), keepdim=True)
    saturation = saturation.view(n, 1, 1)
    matrix = contrast * gains * (saturation * torch.eye(3) + (1 - saturation) / 3)
    matrix, mean_share, brightness = (values.to(views.device, non_blocking=True)
                                      for values in (matrix, 1 - contrast, brightness))
    offset = (mean * mean_share + brightness).expand(n, 3, 1)
    return torch.baddbmm(offset, matrix, pixels).clamp_(0, 255).view_as(views)


def random_blur(views: Tensor, generator: torch.Generator) -> Tensor:
    """One picture in seven at a lower resolution, like the small faces of large photographs."""
    size = views.shape[-1]
    rows = draw_rows(len(views), 0.15, generator).to(views.device, non_blocking=True)
    for group in rows.split(BLUR_GROUP):
        if len(group):
            low_size = int(size * uniform(1, 0.3, 0.8, generator).item())
            small = F.interpolate(views[group], size=low_size, mode="bilinear", antialias=True)
            views[group] = F.interpolate(small, size=size, mode="bilinear")
    return views


def random_erase(views: Tensor, generator: torch.Generator) -> Tensor:
    """Random erasing: a rectangle of one random colour in a quarter of the pictures.

    Its height and width are a tenth to a half of the picture's.
    Zhong et al., "Random Erasing Data Augmentation", 2020.
    """
    erased = draw_rows(len(views), 0.25, generator)
    n, size = len(erased), views.shape[-1]
    extent = uniform(2 * n, 0.1, 0.5, generator).view(n, 2) * size
    start = torch.rand(n, 2, generator=generator) * (size - extent)
    position = torch.arange(size)
    rows = (position >= start[:, :1]) & (position < start[:, :1] + extent[:, :1])
    columns = (position >= start[:, 1:]) & (position < start[:, 1:] + extent[:, 1:])
    colour = uniform(3 * n, 0, 255, generator).view(n, 3, 1, 1)
    erased, rows, columns, colour = (values.to(views.device, non_blocking=True)
                                     for values in (erased, rows, columns, colour))
    hole = (rows[:, :, None] & columns[:, None, :])[:, None]
    views[erased] = torch.where(hole, colour, views[erased])
    return views


# (views (B, 3, S, S) float32, generator) -> views, in this order. A transform may change its input.
PIXEL_TRANSFORMS = (random_colour, random_blur, random_erase)


def mix_up(views: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Each view and target mixed with the next one's; `share` is its own part of the mixture.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018.
    """
    return views.lerp(views.roll(1, 0), 1 - share), targets.lerp(targets.roll(1, 0), 1 - share)
