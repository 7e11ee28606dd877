"""models/data: listing in order, decoding of every format or a reason, batches."""
import gc
import io
import os
import pickle
import tarfile
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from models.data import batches as photo_batches
from models.data.batches import PhotoBatch, collate_photos, group_sizes, join_batches, load_photos
from models.data.decoding import PhotoError, decode_photo
from models.data.index import PhotoIndex, index_photos
from models.data.listing import InputError, list_images, sort_names, walk_images
from models.running.threads import OrderedThreadPool


def picture(height=40, width=60, seed=0) -> Image.Image:
    """A smooth random picture without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------ listing
NAMES = [
    "a.jpg",
    "a/x.PNG",
    "a/b/y.webp",
    "a b/z z.jpeg",
    "ä/ö.tif",
    "new\nline.bmp",
    "z.avif",
    "a-1.jpg",
    "b.heic",
]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "in"
    for name in [*NAMES, "notes.txt", "a/readme", os.fsdecode(b"bad\xff\xfe.jpg")]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_all_types_are_listed_in_byte_order(folder):
    paths = list_images(folder)
    assert sorted(paths) == sorted([*NAMES, os.fsdecode(b"bad\xff\xfe.jpg")])
    assert paths == sorted(paths, key=os.fsencode)


def test_links_are_followed_except_to_a_folder_above(folder):
    os.symlink(folder / "a", folder / "link")
    os.symlink(folder, folder / "a" / "up")
    os.symlink(folder / "a" / "b", folder / "a" / "b" / "self")
    os.symlink("nowhere.jpg", folder / "broken.jpg")
    paths = list_images(folder)
    assert {"link/x.PNG", "broken.jpg"} <= set(paths)
    assert not any("up/" in path or "self/" in path for path in paths)


def test_external_merge_sort_equals_sorted():
    names = [os.urandom(5).replace(b"\0", b"\n") for _ in range(1000)]
    assert list(sort_names(names, run_length=64)) == sorted(names)
    assert list(sort_names([], run_length=64)) == []


def test_index_returns_names_and_paths(folder, tmp_path):
    index = index_photos(tmp_path, [str(folder)])
    assert [index.name(i) for i in range(len(index))] == list_images(folder)
    assert all(os.path.isfile(index[i]) for i in range(len(index)))
    unpickled = pickle.loads(pickle.dumps(index))
    assert unpickled[3] == index[3]
    files = list(index.files.values())
    index.close()
    assert files and all(file.closed for file in files) and not index.files
    assert unpickled[3] == index[3]
    assert index[3] == unpickled[3]  # a closed index opens its files again
    with pytest.raises(IndexError):
        index[len(index)]


def test_index_of_a_list_keeps_order_and_bytes(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfz.jpg\r\n\nsub dir/a.jpg\nz.jpg\nbad\xff.png")
    (tmp_path / "root").mkdir()
    index = index_photos(tmp_path, [str(tmp_path / "root")], str(tmp_path / "list.txt"))
    names = ["z.jpg", "sub dir/a.jpg", "z.jpg", os.fsdecode(b"bad\xff.png")]
    assert [index.name(i) for i in range(len(index))] == names
    assert index[0] == str(tmp_path / "root" / "z.jpg")


def test_index_of_shards_returns_the_bytes_of_members(tmp_path):
    contents = {}
    for shard in ("s-0.tar", "s-1.tar"):
        with tarfile.open(tmp_path / shard, "w") as tar:
            for name in ("0001.jpg", "0001.json", "ü/" + "long" * 60 + ".png"):
                content = f"{shard} {name}".encode()
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                if not name.endswith("json"):
                    contents[f"{shard}/{name}"] = content
    (tmp_path / "index").mkdir()
    index = index_photos(tmp_path / "index", [str(tmp_path / "s-*.tar")])
    assert {index.name(i): index[i] for i in range(len(index))} == contents
    assert (
        index_photos(tmp_path / "index", [str(tmp_path / "s-1.tar"), str(tmp_path / "s-0.tar")])[0]
        == index[0]
    )


@pytest.mark.parametrize(
    "inputs",
    [["nowhere"], ["none-*.tar"], ["list.txt"], ["empty"], ["empty", "list.txt"], ["broken.tar"]],
)
def test_inputs_without_pictures_are_an_error(tmp_path, monkeypatch, inputs):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text("")
    (tmp_path / "broken.tar").write_text("no tar at all")
    with pytest.raises(InputError, match=inputs[0].replace("*", r"\*")):
        index_photos(tmp_path, inputs)


def test_index_of_a_long_list_stays_on_disk(tmp_path):
    with open(tmp_path / "list.txt", "w") as file:
        file.writelines(f"folder/of/some/length/{i:09d}.jpg\n" for i in range(20_000))
    tracemalloc.start()
    index = index_photos(tmp_path, None, str(tmp_path / "list.txt"))
    names = sum(len(index.name(i)) for i in range(0, len(index), 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert names == 1000 * len("folder/of/some/length/000000000.jpg")
    assert peak < 300_000                                       # the names alone are 700 kB


# ----------------------------------------------------------------------------------------- decoding
def test_every_exif_orientation_is_applied():
    upright = picture()
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    expected, _ = decode_photo(saved(upright, "PNG"))
    for orientation, turn in stored.items():
        exif = Image.Exif()
        exif[274] = orientation
        turned = upright.transpose(turn) if turn is not None else upright
        decoded, scale = decode_photo(saved(turned, "PNG", exif=exif))
        assert scale == 1 and torch.equal(decoded, expected), orientation


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"])
def test_every_mode_becomes_rgb_uint8(mode):
    grey = picture().convert("L")
    if mode in ("I;16", "I"):
        image = Image.fromarray(
            np.asarray(grey).astype(np.uint16 if mode == "I;16" else np.int32) * 257
        )
    else:
        image = grey.convert(mode)
    form = "TIFF" if mode in ("CMYK", "F", "I") else "PNG"
    decoded, _ = decode_photo(saved(image, form))
    expected = torch.from_numpy(np.array(image.convert("L") if mode == "1" else grey)).expand(
        3, -1, -1
    )
    assert decoded.dtype == torch.uint8 and decoded.shape == (3, 40, 60)
    assert (decoded.int() - expected.int()).abs().max() <= 2


def test_transparency_is_blended_with_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode_photo(saved(clear, "PNG"))[0] == 255).all()
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([200, 0, 0] * 256)
    assert (decode_photo(saved(palette, "PNG", transparency=0))[0] == 255).all()


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_is_decoded(form):
    content = saved(picture(seed=1), form, save_all=True, append_images=[picture(seed=2)])
    decoded, _ = decode_photo(content)
    assert decoded.shape == (3, 40, 60)
    assert (
        decoded.float() - torch.from_numpy(np.array(picture(seed=1))).permute(2, 0, 1)
    ).abs().mean() < 8


def test_large_pictures_are_reduced_and_the_scale_is_returned():
    for form in ("JPEG", "PNG"):
        decoded, scale = decode_photo(saved(picture(400, 1000), form), max_side=300)
        assert decoded.shape == (3, 120, 300) and scale == pytest.approx(0.3)
    assert decode_photo(saved(picture(1, 900), "PNG"), max_side=300)[0].shape == (3, 1, 300)


@pytest.mark.parametrize("content", [b"", b"not a picture", saved(picture(), "JPEG")[:300],
                                     saved(picture(), "PNG")[:60]])
def test_broken_files_raise_a_reason_of_one_line(content):
    with pytest.raises(PhotoError) as raised:
        decode_photo(content)
    assert (
        raised.value.status == "unreadable" and str(raised.value) and "\n" not in str(raised.value)
    )


def test_a_decompression_bomb_is_too_large(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for size in (40, 100):                      # Pillow warns of the first and refuses the second
        with pytest.raises(PhotoError) as raised:
            decode_photo(saved(picture(size, size), "PNG"))
        assert raised.value.status == "too_large"


# ----------------------------------------------------------------------------------------- batching
def test_batches_have_every_picture_once(monkeypatch):
    monkeypatch.setattr(photo_batches, "GROUP_PIXELS", 2000)
    sizes = [(20, 30), (1, 1), (200, 150), (25, 25), (300, 4), (20, 30), (4, 300)]
    photos = [saved(picture(*size), "PNG") for size in sizes]
    photos.insert(2, b"broken")
    batches = list(load_photos(photos, 4, 0))
    positions = [position for batch in batches for position in batch.positions]
    assert sorted(positions) == [0, 1, 3, 4, 5, 6, 7]
    assert [failure[:2] for batch in batches for failure in batch.failures] == [(2, "unreadable")]
    for batch in batches:
        assert list(batch.sizes.shape) == [len(batch.positions), 2]
        for position, image, size in zip(
            batch.positions, batch.images, batch.sizes.tolist(), strict=True
        ):
            photo = decode_photo(photos[position])[0]
            assert list(photo.shape[1:]) == size
            assert torch.equal(image[:, :size[0], :size[1]], photo)
            assert image[:, size[0]:].sum() == 0 and image[:, :, size[1]:].sum() == 0


def test_padding_is_at_most_half_of_a_batch():
    sizes = [(4000, 100), (100, 4000), (50, 50), (3000, 2000)] * 4
    photos = [torch.empty(3, height, width, dtype=torch.uint8) for height, width in sizes]
    groups = group_sizes(photos)
    assert sorted(i for group in groups for i in group) == list(range(16))
    for group in groups:
        batch, sizes = collate_photos([photos[i] for i in group])
        assert batch[:, 0].numel() <= max(4_000_000, 2 * sizes.prod(1).sum())
    assert group_sizes([torch.empty(3, 112, 112)] * 5) == [[0, 1, 2, 3, 4]]


def test_batches_do_not_depend_on_workers_or_threads(tmp_path, two_threads):
    for i in range(10):
        picture(20 + i, 30, seed=i).save(tmp_path / f"{i}.png")
    photos = [str(tmp_path / name) for name in walk_images(tmp_path)]
    with OrderedThreadPool(torch.device("cpu")) as pool:
        loads = [
            load_photos(photos, 4, 0),
            load_photos(photos, 4, 2),
            load_photos(photos, 4, 0, pool=pool),
        ]
        for batch, *others in zip(*loads, strict=True):
            for other in others:
                assert batch.positions == other.positions
                assert torch.equal(batch.images, other.images)
        for shared_pool in (None, pool):
            batches = list(load_photos(photos, 4, 0, batches=[2], pool=shared_pool))
            assert [batch.positions for batch in batches] == [[8, 9]]


def test_only_the_calling_thread_reads_the_index(tmp_path, monkeypatch, two_threads):
    """An index has one file position, so concurrent reads would return wrong names."""
    (tmp_path / "in").mkdir()
    for i in range(9):
        picture(seed=i).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "4.png").write_bytes(b"broken")
    index, threads = (
        index_photos(tmp_path, [str(tmp_path / "in")]),
        {"read": set(), "decode": set()},
    )
    for name, owner, function in (
        ("read", PhotoIndex, PhotoIndex.read),
        ("decode", photo_batches, photo_batches.decode_photo),
    ):
        monkeypatch.setattr(owner, function.__name__, lambda *args, name=name, function=function:
                            threads[name].add(threading.current_thread().name) or function(*args))
    with OrderedThreadPool(torch.device("cpu")) as pool:
        batches = list(load_photos(index, 2, 0, pool=pool))
    assert [batch.positions for batch in batches] == [[0, 1], [2, 3], [5], [6, 7], [8]]
    assert [(position, status) for position, status, _ in batches[2].failures] == [
        (4, "unreadable")
    ]
    assert threads["read"] == {threading.current_thread().name}
    assert threads["decode"] and not threads["read"] & threads["decode"]


def test_a_skipped_picture_keeps_no_batch_in_memory():
    class Photos(list):
        def __getitem__(self, i):
            if i == 1:
                raise PhotoError("exists", "its crop is there")
            return super().__getitem__(i)

    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    gc.disable()
    try:
        batch, = load_photos(Photos([buffer.getvalue()] * 3), 3, 0)
        images_reference = weakref.ref(batch.images)
        assert (batch.positions, batch.failures) == ([0, 2], [(1, "exists", "its crop is there")])
        del batch
        assert images_reference() is None
    finally:
        gc.enable()


def test_index_works_in_workers(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(6):
        picture(seed=i).save(tmp_path / "in" / f"{i}.png")
    index = index_photos(tmp_path, [str(tmp_path / "in")])
    index.name(0)  # its files are open when the workers fork
    assert sum(len(batch.positions) for batch in load_photos(PhotoIndex(tmp_path), 2, 2)) == 6
    assert sum(len(batch.positions) for batch in load_photos(index, 2, 2)) == 6


@pytest.mark.parametrize(
    ("max_photos", "pixels", "calls"), [(64, 10**9, 2), (3, 10**9, 5), (64, 2500, 4)]
)
def test_joined_batches_have_the_same_pictures(max_photos, pixels, calls, monkeypatch):
    """Batches as for a GPU: in chunks of 8, as many pictures as the limits allow."""
    monkeypatch.setitem(photo_batches.MAX_JOINED_PHOTOS, "cpu", max_photos)
    monkeypatch.setattr(photo_batches, "MAX_JOINED_PIXELS", pixels)
    generator = torch.Generator().manual_seed(0)
    photos = [
        torch.randint(1, 256, (3, 10 + i, 40 - 2 * i), generator=generator, dtype=torch.uint8)
        for i in range(13)
    ]
    batches = [PhotoBatch([i, i + 1], *collate_photos(photos[i:i + 2]), torch.tensor([1.0, i]), [])
               for i in (0, 2, 4, 8, 10)]
    failures = [(6, "unreadable", "x"), (7, "too_large", "")]
    batches.insert(3, PhotoBatch([], *collate_photos([]), torch.zeros(0), failures))
    batches.append(PhotoBatch([12], *collate_photos(photos[12:]), torch.ones(1), []))
    joined = [
        pickle.loads(pickle.dumps(batch)) for batch in join_batches(batches, 8, torch.device("cpu"))
    ]
    assert [i for batch in joined for i in batch.positions] == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12]
    assert [failure[0] for batch in joined for failure in batch.failures] == [6, 7]
    assert len(joined) == calls
    for batch in joined:
        assert len({i // 8 for i in batch.positions}) <= 1 and len(batch.positions) <= max_photos
        for image, size, scale, i in zip(
            batch.images, batch.sizes.tolist(), batch.scales.tolist(), batch.positions, strict=True
        ):
            assert torch.equal(image[:, : size[0], : size[1]], photos[i]) and scale == (
                1 if i % 2 == 0 else i - 1
            )
            assert not image[:, size[0]:].any() and not image[:, :, size[1]:].any()
