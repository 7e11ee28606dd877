"""Inputs of the entries: how much is measured, and the pictures that they read."""
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from models.data.listing import list_images
from models.faces.align import WHOLE_TEMPLATE
from models.faces.checkpoint import Checkpoint, load_checkpoint
from models.faces.mtcnn import MTCNN
from models.faces.pipeline import ViewSpec, align_labelled_set


@dataclass(frozen=True)
class Sizes:
    """How much is measured. plain_*: items of the plain procedure, which is slower.

    Rates are compared, so the numbers of items may differ.
    """
    runs: int = 5
    chips: int = 512
    photos: int | None = None               # None is all of wild.tar
    agreed: int = 512                       # chips labelled by both procedures, to compare them
    crops: int = 4096
    plain_crops: int = 384
    steps: int | None = 20                  # of the 207 of an epoch on 13,207 crops; None is all
    plain_steps: int = 8
    built: int | None = None                # None is all of UTKFace
    plain_built: int = 2000
    builder_runs: int = 1                   # all of UTKFace takes minutes
    memory_runs: tuple[int, int] = (5_000, 100_000)
    listed: tuple[int, int] = (50_000, 5_000_000)


SIZES = {"default": Sizes(),
         "quick": Sizes(runs=3, chips=64, photos=64, agreed=32, crops=512, plain_crops=96, steps=4,
                        plain_steps=2, built=400, plain_built=400, builder_runs=1,
                        memory_runs=(500, 2_000), listed=(1_000, 50_000)),
         "full": Sizes(steps=None, builder_runs=5)}


class Bench:
    """Settings of the run, and pictures, which are unpacked into its folder on first use.

    data: folder of the archives. folder: temporary, shared by the entries.
    """

    def __init__(self, data: Path, folder: Path, ckpt: str, device: torch.device, *, sizes: Sizes,
                 quick: bool):
        self.data, self.folder, self.ckpt, self.device = data, folder, ckpt, device
        self.sizes, self.quick = sizes, quick

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint, read on first use in the process of the entry."""
        return load_checkpoint(self.ckpt)

    def chips(self, n: int | None) -> list[str]:
        """Paths of n chips of UTKFace of races 0 to 3, evenly over the sorted names, or of all."""
        return self.unpack("UTKFace.tar", n,
                           lambda name: name.split("_")[2:3] in (["0"], ["1"], ["2"], ["3"]))

    def photos(self) -> list[str]:
        """Paths of ordinary photographs."""
        return self.unpack("wild.tar", self.sizes.photos, lambda name: True)

    def unpack(self, archive: str, n: int | None, is_used: Callable[[str], bool]) -> list[str]:
        """Sorted paths of n pictures of an archive, in a folder of their own."""
        target = self.folder / f"{archive.removesuffix('.tar')}_{n or 'all'}"
        if not target.exists():
            target.mkdir()
            with tarfile.open(self.data / archive) as tar:
                members = [m for m in tar if m.isfile() and is_used(Path(m.name).name)]
                members.sort(key=lambda member: member.name)
                if n is not None and n < len(members):
                    members = [members[i * len(members) // n] for i in range(n)]
                for member in members:
                    (target / Path(member.name).name).write_bytes(tar.extractfile(member).read())
        return [str(target / name) for name in list_images(target)]

    def crops(self, n: int, size: int) -> list[str]:
        """Paths of n aligned crops of the whole template, JPEG of quality 95, in a folder."""
        target = self.folder / f"crops_{n}_{size}"
        if not target.exists():
            target.mkdir()
            chips, detector = self.chips(n), MTCNN(min_face_size=40).to(self.device)
            for batch in align_labelled_set(chips, False, detector, ViewSpec(WHOLE_TEMPLATE, size)):
                for position, view in zip(batch.positions(), batch.views, strict=True):
                    picture = Image.fromarray(view.permute(1, 2, 0).numpy())
                    picture.save(target / Path(chips[position]).name, quality=95, subsampling=0)
        return [str(target / name) for name in list_images(target)]
