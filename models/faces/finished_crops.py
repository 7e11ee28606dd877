"""Aligned pictures: finished crops of the template, and a checkpoint's own chips."""
import torch
from torch import Tensor

from models.faces.align import TEMPLATE, TEMPLATE_SIZE, crop_views

Chips = tuple[int, tuple]       # size in pixels and template of a checkpoint's own aligned chips


def have_crop_size(sizes: Tensor, chips: Chips | None) -> Tensor:
    """Which pictures have exactly the size of finished crops (112 x 112) or of the chips.

    sizes (B, 2) int64 is (height, width). Returns (B,) bool.
    """
    chip_size = chips[0] if chips else TEMPLATE_SIZE
    return (sizes == TEMPLATE_SIZE).all(1) | (sizes == chip_size).all(1)


def views_of_crops(images: Tensor, sizes: Tensor, window: tuple, size: int,
                   template: tuple = TEMPLATE, chips: Chips | None = None) -> Tensor:
    """Views (n, 3, size, size) uint8 of finished crops, which are square, of any resolution.

    images (n, 3, H, W) uint8 is zero-padded; sizes (n, 2) int64. A crop shows the whole ArcFace
    template; a picture of the chips' size shows the whole template of the chips.
    """
    views = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=images.device)
    for resolution in sizes[:, 0].unique().tolist():
        rows = (sizes[:, 0] == resolution).nonzero().squeeze(1).to(images.device)
        shown = chips[1] if chips and chips[0] == resolution else TEMPLATE
        views[rows] = crop_views(images[rows, :, :resolution, :resolution], window, size, template,
                                 shown)
    return views
