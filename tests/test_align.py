"""models/faces/align.py compared with scikit-image and supersampling; its geometric properties."""
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
    """(1, 3, h, w) uint8 of low spatial frequency, which a resampling preserves."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    phase = torch.rand(3, 1, 1, generator=g) * 6
    return (
        (torch.sin(x * (6.28 / period) + phase) + torch.cos(y * (6.28 / period) - phase)) * 50 + 120
    ).byte()[None]


def noise_photos(n: int, height: int, width: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def test_a_known_similarity_is_recovered_and_inverted():
    M = similarity(0.4, 1.7, 30, -12)
    fitted = fit_similarity(apply(M, POINTS)[None], POINTS)
    assert torch.allclose(fitted, invert_similarity(M[None]), atol=1e-4)
    assert fit_similarity(torch.empty(0, 5, 2), POINTS).shape == (0, 2, 3)


def test_least_squares_agrees_with_scikit_image():
    transform = pytest.importorskip("skimage.transform")
    src = POINTS * 2 + torch.randn(6, 5, 2, generator=torch.Generator().manual_seed(1)) * 6
    for points, M in zip(src, fit_similarity(src, POINTS), strict=True):
        reference = transform.SimilarityTransform.from_estimate(points.numpy(), np.array(TEMPLATE))
        assert np.allclose(reference.params[:2], M.numpy(), atol=1e-3)


def test_a_mirrored_face_is_not_reflected_back():
    M = fit_similarity((POINTS * torch.tensor([-1.0, 1.0]))[None], POINTS)[0]
    assert torch.linalg.det(M[:, :2]) > 0


def test_coinciding_landmarks_are_an_error():
    with pytest.raises(ValueError, match="coincide"):
        fit_similarity(torch.ones(1, 5, 2), POINTS)


def test_identity_returns_the_picture():
    photo = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    sizes = torch.tensor([[112, 112]] * 2)
    assert torch.equal(
        align_faces(photo, sizes, torch.arange(2), POINTS.expand(2, 5, 2), WHOLE_TEMPLATE, 112),
        photo,
    )
    assert torch.equal(crop_views(photo, WHOLE_TEMPLATE, 112), photo)


@pytest.mark.parametrize("scale", [1.9, 3.1, 5.3])
def test_shrinking_does_not_alias(scale):
    """Compared with 8 x 8 supersampling, on a picture of noise, the worst case for aliasing."""
    M = similarity(0.2, scale, 20 * scale, 15 * scale)
    size = int(130 * scale) + 40
    photo = noise_photos(1, size, size, seed=2)
    sizes, landmarks = torch.tensor([[size, size]]), apply(M, POINTS)[None]
    views = align_faces(
        photo, sizes, torch.zeros(1, dtype=torch.int64), landmarks, WINDOW, 64
    ).float()
    fine = align_faces(
        photo, sizes, torch.zeros(1, dtype=torch.int64), landmarks, WINDOW, 64 * 8
    ).float()
    reference = torch.nn.functional.avg_pool2d(fine, 8)
    assert (views - reference).abs().mean() < 0.08 * reference.std() + 4
    assert abs(views.std() - reference.std()) < 0.2 * reference.std() + 1


def test_view_of_a_photograph_equals_view_of_its_aligned_crop():
    M = similarity(-0.15, 2.0, 60, 40)
    photo, sizes = smooth_photo(320, 330), torch.tensor([[320, 330]])
    face = torch.zeros(1, dtype=torch.int64), apply(M, POINTS)[None]
    direct = align_faces(photo, sizes, *face, WINDOW, 96).float()
    for resolution in (112, 224):
        crop = align_faces(photo, sizes, *face, WHOLE_TEMPLATE, resolution)
        assert (crop_views(crop, WINDOW, 96).float() - direct).abs().mean() < 1.0


def test_another_template_is_reached_from_photograph_and_from_aligned_crop():
    template = tuple((0.8 * x + 9, 0.8 * y + 4) for x, y in TEMPLATE)
    M = similarity(0.1, 2.0, 70, 60)
    photo, sizes = smooth_photo(360, 360), torch.tensor([[360, 360]])
    face = torch.zeros(1, dtype=torch.int64), apply(M, POINTS)[None]
    direct = align_faces(photo, sizes, *face, (20, 20, 90, 90), 96, template).float()
    crop = align_faces(photo, sizes, *face, WHOLE_TEMPLATE, 224)
    assert (crop_views(crop, (20, 20, 90, 90), 96, template).float() - direct).abs().mean() < 1.0
    other = align_faces(photo, sizes, *face, (20, 20, 90, 90), 96).float()
    assert (other - direct).abs().mean() > 5


def test_padding_of_the_batch_is_not_sampled_and_edges_repeat():
    photo = torch.full((1, 3, 60, 50), 200, dtype=torch.uint8)
    padded = torch.zeros(1, 3, 90, 80, dtype=torch.uint8)
    padded[:, :, :60, :50] = photo
    face = torch.zeros(1, dtype=torch.int64), POINTS[None] - 30
    views = align_faces(padded, torch.tensor([[60, 50]]), *face, WHOLE_TEMPLATE, 112)
    assert (views == 200).all()


@pytest.mark.parametrize(
    "at", [(-70, -60), (150, -50), (-60, 140), (170, 150), (-400, 20), (30, 500)]
)
def test_faces_across_and_beyond_the_edges(at):
    """The view equals that of the picture padded by its edges: at edges, at corners and outside."""
    photo = noise_photos(1, 150, 190, seed=3)
    wide = torch.nn.functional.pad(photo.float(), (700,) * 4, mode="replicate").byte()
    landmarks = apply(similarity(0.3, 1.4, *at), POINTS)[None]
    first = torch.zeros(1, dtype=torch.int64)
    views = align_faces(photo, torch.tensor([[150, 190]]), first, landmarks, WINDOW, 96)
    expected = align_faces(wide, torch.tensor([wide.shape[2:]]), first, landmarks + 700, WINDOW, 96)
    assert (views.int() - expected.int()).abs().max() <= 2


def test_views_of_a_batch_equal_those_of_single_faces():
    """In any order, at scales that need 1, 4 and 9 samples per pixel."""
    photos = noise_photos(3, 260, 300, seed=4)
    sizes = torch.tensor([[260, 300], [200, 180], [240, 220]])
    image_index = torch.tensor([2, 0, 1, 0, 2, 1, 0])
    landmarks = torch.stack([apply(similarity(0.1 * i - 0.3, scale, 9 * i, 5 * i), POINTS)
                             for i, scale in enumerate((0.5, 2.2, 1.0, 0.7, 1.6, 3.0, 1.9))])
    batched = align_faces(photos, sizes, image_index, landmarks, WINDOW, 64)
    for i in range(7):
        single = align_faces(photos, sizes, image_index[i:i + 1], landmarks[i:i + 1], WINDOW, 64)
        assert torch.equal(batched[i], single[0])
    assert len({view.float().mean().item() for view in batched}) == 7


def test_no_faces_give_an_empty_batch():
    assert sample_views(torch.zeros(0, 3, 9, 9), torch.zeros(0, 2, 3), WINDOW, 96).shape == (
        0,
        3,
        96,
        96,
    )
    assert crop_views(torch.zeros(0, 3, 112, 112, dtype=torch.uint8), WINDOW, 96).shape == (
        0,
        3,
        96,
        96,
    )
    views = align_faces(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.tensor([[9, 9]]),
                        torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5, 2), WINDOW, 96)
    assert views.shape == (0, 3, 96, 96) and views.dtype == torch.uint8


def test_half_pixels():
    """Pixel centres are integers; a window's first view pixel is half a view pixel inside."""
    ramp = torch.arange(112.0).expand(1, 3, 112, 112)
    identity = torch.eye(2, 3)[None]
    assert torch.allclose(
        sample_views(ramp, identity, (14, 24, 98, 108), 84)[0, 0, 0], torch.arange(14.0, 98.0)
    )
    moved = identity + torch.tensor([[0, 0, 0.5], [0, 0, 0]])
    assert torch.allclose(sample_views(ramp, moved, (14, 24, 98, 108), 84, samples=3)[0, 0, 0],
                          torch.arange(14.5, 98.0), atol=1e-4)
    at = template_pixels(identity, 2.0)[0] @ torch.tensor([10.0, 20.0, 1.0])
    assert at.tolist() == [20.5, 40.5]
