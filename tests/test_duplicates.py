"""Near-duplicates: pairs, groups, and unreadable files."""
import numpy as np
import pytest
from conftest import draw_blots, jpeg
from PIL import Image

from models.data.decoding import decode_photo
from models.data.duplicates import (
    NEAR_DUPLICATE,
    THUMB,
    Fingerprints,
    connected_groups,
    group_duplicate_files,
    group_near_duplicates,
    near_duplicate_pairs,
)


def test_near_duplicate_pairs_agree_with_numpy():
    rng = np.random.default_rng(3)
    base = rng.integers(0, 256, (60, THUMB ** 2))
    noisy = base[:30] + rng.normal(0, rng.uniform(0, 60, (30, 1)), (30, base.shape[1]))
    flipped = noisy[:10].reshape(10, THUMB, -1)[:, :, ::-1].reshape(10, -1)
    thumbs = np.concatenate([base, noisy, flipped]).clip(0, 255).astype(np.uint8)
    mirrored = thumbs.reshape(-1, THUMB, THUMB)[:, :, ::-1].reshape(thumbs.shape)
    n = len(thumbs)
    correlations = np.corrcoef(thumbs, mirrored)
    similar = np.maximum(correlations[:n, :n], correlations[:n, n:])
    expected = {
        (i, j) for i in range(n) for j in range(i + 1, n) if similar[i, j] >= NEAR_DUPLICATE
    }
    is_clear = np.abs(similar - NEAR_DUPLICATE) > 1e-4
    assert len(expected) > 15
    for block in (3, 7, 1024):  # many tiles, two columns of tiles, one tile
        pairs = near_duplicate_pairs(thumbs, block)
        assert len(pairs) == len(set(pairs))
        assert all(is_clear[pair] <= (pair in expected) for pair in pairs)
        assert all(not is_clear[pair] or pair in set(pairs) for pair in expected)


def test_pictures_of_a_single_tone_have_no_pairs():
    flat = np.full((3, THUMB ** 2), 77, dtype=np.uint8)
    assert near_duplicate_pairs(flat) == near_duplicate_pairs(flat[:0]) == []
    assert group_near_duplicates(Fingerprints()) == group_duplicate_files([], 0) == []


def test_versions_of_a_photograph_are_one_group():
    picture = draw_blots(1)
    darker = picture.point(lambda value: int(value * 0.7))
    versions = [
        picture,
        darker,
        darker.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        draw_blots(2),
        draw_blots(3),
        draw_blots(2),
    ]
    fingerprints = Fingerprints()
    for i, (version, quality) in enumerate(zip(versions, (95, 60, 80, 90, 90, 90), strict=True)):
        fingerprints.add(i, jpeg(version, quality), decode_photo(jpeg(version, quality))[0])
    fingerprints.thumbs[5] = np.zeros(THUMB**2, np.uint8)  # 3 and 5 have equal bytes only
    assert group_near_duplicates(fingerprints) == [[0, 1, 2], [3, 5], [4]]


@pytest.mark.parametrize("workers", [0, 1])
def test_files_are_grouped_and_unreadable_ones_are_single(tmp_path, workers):
    picture = draw_blots(1)
    files = {
        "a.jpg": jpeg(picture),
        "b.jpg": b"not a picture",
        "c.jpg": jpeg(draw_blots(2)),
        "d.png": b"not a picture",
        "e.jpg": jpeg(picture.resize((90, 90)), 70),
        "f.jpg": jpeg(draw_blots(2)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in [*files, "absent.jpg", "c.jpg"]]
    assert group_duplicate_files(paths, workers) == [[0, 4], [1], [2, 5, 7], [3], [6]]
    backwards = group_duplicate_files(paths[::-1], workers)
    assert sorted(sorted(7 - i for i in group) for group in backwards) == [
        [0, 4],
        [1],
        [2, 5, 7],
        [3],
        [6],
    ]


@pytest.mark.parametrize("n", [0, 1, 7, 40])
def test_connected_groups_agree_with_merging_sets(n):
    rng = np.random.default_rng(n)
    pairs = [(int(min(pair)), int(max(pair))) for pair in rng.integers(0, max(n, 1), (n // 2, 2))]
    groups = [{i} for i in range(n)]
    for i, j in pairs:
        joined = next(group for group in groups if i in group)
        other = next(group for group in groups if j in group)
        groups = [group for group in groups if group not in (joined, other)] + [joined | other]
    assert connected_groups(n, pairs) == sorted(sorted(group) for group in groups)
