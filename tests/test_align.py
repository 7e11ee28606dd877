"""models/align.py: the one geometry, against scikit-image, supersampling and its own laws."""
import math

import numpy as np
import pytest
import torch

from models.faces.align import (
    TEMPLATE,
    WHOLE_TEMPLATE,
    align_faces,
    crop_views,
    fit_similarity,
    invert_similarity,
    sample_views,
    template_pixels,
)

WINDOW = (14.0, 24.0, 98.0, 108.0)
POINTS = torch.tensor(TEMPLATE)


def similarity(angle: float, scale: float, dx: float, dy: float) -> torch.Tensor:
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[c, -s, dx], [s, c, dy]])


def apply(M: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    return points @ M[:, :2].T + M[:, 2]


def smooth_photo(height: int, width: int, seed: int = 0, period: float = 40.0) -> torch.Tensor:
    """(1, 3, h, w) uint8 of slow waves: what a resampling should keep."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phase = torch.rand(3, 1, 1, generator=g) * 6
    return ((torch.sin(x * (6.28 / period) + phase) + torch.cos(y * (6.28 / period) - phase)) * 50 + 120).byte()[None]


def test_a_known_similarity_is_recovered_and_inverted():
    M = similarity(0.4, 1.7, 30, -12)
    found = fit_similarity(apply(M, POINTS)[None], POINTS)
    assert torch.allclose(found, invert_similarity(M[None]), atol=1e-4)
    assert fit_similarity(torch.empty(0, 5, 2), POINTS).shape == (0, 2, 3)


def test_least_squares_agrees_with_scikit_image():
    transform = pytest.importorskip("skimage.transform")
    src = POINTS * 2 + torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(1)) * 6
    for points, M in zip(src, fit_similarity(src, POINTS), strict=True):
        theirs = transform.SimilarityTransform.from_estimate(points.numpy(), np.array(TEMPLATE))
        assert np.allclose(theirs.params[:2], M.numpy(), atol=1e-3)


def test_a_mirrored_face_is_not_reflected_back():
    M = fit_similarity((POINTS * torch.tensor([-1.0, 1.0]))[None], POINTS)[0]
    assert torch.linalg.det(M[:, :2]) > 0


def test_coinciding_landmarks_are_an_error():
    with pytest.raises(ValueError, match="coincide"):
        fit_similarity(torch.ones(1, 5, 2), POINTS)


def test_the_identity_gives_the_picture_back():
    photo = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    sizes = torch.tensor([[112, 112]] * 2)
    assert torch.equal(align_faces(photo, sizes, torch.arange(2), POINTS.expand(2, 5, 2), WHOLE_TEMPLATE, 112), photo)
    assert torch.equal(crop_views(photo, WHOLE_TEMPLATE, 112), photo)


@pytest.mark.parametrize("scale", [1.9, 3.1, 5.3])
def test_shrinking_does_not_alias(scale):
    """Against a warp of 8 x 8 times as many samples, on a picture of noise, which aliases most."""
    M = similarity(0.2, scale, 20 * scale, 15 * scale)
    side = int(130 * scale) + 40
    photo = torch.randint(0, 256, (1, 3, side, side), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    sizes, landmarks = torch.tensor([[side, side]]), apply(M, POINTS)[None]
    views = align_faces(photo, sizes, torch.zeros(1, dtype=torch.int64), landmarks, WINDOW, 64).float()
    fine = align_faces(photo, sizes, torch.zeros(1, dtype=torch.int64), landmarks, WINDOW, 64 * 8).float()
    reference = torch.nn.functional.avg_pool2d(fine, 8)
    assert (views - reference).abs().mean() < 0.08 * reference.std() + 4
    assert abs(views.std() - reference.std()) < 0.2 * reference.std() + 1


def test_a_face_gives_the_same_from_photograph_and_from_finished_crop():
    M = similarity(-0.15, 2.0, 60, 40)
    photo, sizes = smooth_photo(320, 330), torch.tensor([[320, 330]])
    where = torch.zeros(1, dtype=torch.int64), apply(M, POINTS)[None]
    straight = align_faces(photo, sizes, *where, WINDOW, 96).float()
    for resolution in (112, 224):
        crop = align_faces(photo, sizes, *where, WHOLE_TEMPLATE, resolution)
        assert (crop_views(crop, WINDOW, 96).float() - straight).abs().mean() < 1.0


def test_a_template_of_its_own_is_met_from_photograph_and_from_finished_crop():
    own = tuple((0.8 * x + 9, 0.8 * y + 4) for x, y in TEMPLATE)
    M = similarity(0.1, 2.0, 70, 60)
    photo, sizes = smooth_photo(360, 360), torch.tensor([[360, 360]])
    where = torch.zeros(1, dtype=torch.int64), apply(M, POINTS)[None]
    straight = align_faces(photo, sizes, *where, (20, 20, 90, 90), 96, own).float()
    crop = align_faces(photo, sizes, *where, WHOLE_TEMPLATE, 224)
    assert (crop_views(crop, (20, 20, 90, 90), 96, own).float() - straight).abs().mean() < 1.0
    moved = align_faces(photo, sizes, *where, (20, 20, 90, 90), 96).float()
    assert (moved - straight).abs().mean() > 5


def test_padding_of_the_batch_is_never_seen_and_edges_repeat():
    photo = torch.full((1, 3, 60, 50), 200, dtype=torch.uint8)
    padded = torch.zeros(1, 3, 90, 80, dtype=torch.uint8)
    padded[:, :, :60, :50] = photo
    where = torch.zeros(1, dtype=torch.int64), POINTS[None] - 30
    views = align_faces(padded, torch.tensor([[60, 50]]), *where, WHOLE_TEMPLATE, 112)
    assert (views == 200).all()


@pytest.mark.parametrize("at", [(-70, -60), (150, -50), (-60, 140), (170, 150), (-400, 20), (30, 500)])
def test_faces_across_and_beyond_the_edges(at):
    """A picture of noise, and the same with its edges repeated far out, give one view: at sides, corners, outside."""
    photo = torch.randint(0, 256, (1, 3, 150, 190), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    wide = torch.nn.functional.pad(photo.float(), (700,) * 4, mode="replicate").byte()
    landmarks = apply(similarity(0.3, 1.4, *at), POINTS)[None]
    first = torch.zeros(1, dtype=torch.int64)
    views = align_faces(photo, torch.tensor([[150, 190]]), first, landmarks, WINDOW, 96)
    wanted = align_faces(wide, torch.tensor([wide.shape[2:]]), first, landmarks + 700, WINDOW, 96)
    assert (views.int() - wanted.int()).abs().max() <= 2


def test_many_faces_of_many_pictures_are_those_of_each_alone():
    """In any order, at scales that want one sample a pixel, and four, and nine."""
    photos = torch.randint(0, 256, (3, 3, 260, 300), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    sizes = torch.tensor([[260, 300], [200, 180], [240, 220]])
    image_index = torch.tensor([2, 0, 1, 0, 2, 1, 0])
    landmarks = torch.stack([apply(similarity(0.1 * i - 0.3, scale, 9 * i, 5 * i), POINTS)
                             for i, scale in enumerate((0.5, 2.2, 1.0, 0.7, 1.6, 3.0, 1.9))])
    together = align_faces(photos, sizes, image_index, landmarks, WINDOW, 64)
    for i in range(7):
        alone = align_faces(photos, sizes, image_index[i:i + 1], landmarks[i:i + 1], WINDOW, 64)
        assert torch.equal(together[i], alone[0])
    assert len({view.float().mean().item() for view in together}) == 7


def test_no_faces_give_an_empty_batch():
    assert sample_views(torch.zeros(0, 3, 9, 9), torch.zeros(0, 2, 3), WINDOW, 96).shape == (0, 3, 96, 96)
    assert crop_views(torch.zeros(0, 3, 112, 112, dtype=torch.uint8), WINDOW, 96).shape == (0, 3, 96, 96)
    views = align_faces(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.tensor([[9, 9]]),
                        torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5, 2), WINDOW, 96)
    assert views.shape == (0, 3, 96, 96) and views.dtype == torch.uint8


def test_half_pixels():
    """Pixel centres are whole numbers, and a window's first view pixel lies half a view pixel inside its edge."""
    ramp = torch.arange(112.0).expand(1, 3, 112, 112)
    identity = torch.eye(2, 3)[None]
    assert torch.allclose(sample_views(ramp, identity, (14, 24, 98, 108), 84)[0, 0, 0], torch.arange(14.0, 98.0))
    moved = identity + torch.tensor([[0, 0, 0.5], [0, 0, 0]])
    assert torch.allclose(sample_views(ramp, moved, (14, 24, 98, 108), 84, samples=3)[0, 0, 0],
                          torch.arange(14.5, 98.0), atol=1e-4)
    at = template_pixels(identity, 2.0)[0] @ torch.tensor([10.0, 20.0, 1.0])
    assert at.tolist() == [20.5, 40.5]
