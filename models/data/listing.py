"""Lists of pictures: those of a folder, of tar shards, or of a text file with one path a line."""
import codecs
import glob
import heapq
import itertools
import os
import tarfile
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from models.data.decoding import IMAGE_TYPES


class InputError(Exception):
    """A folder, list or set of tar shards that is unreadable or empty; the message names it."""


def walk_images(folder: str | Path, subfolder: str = "") -> Iterator[str]:
    """Relative '/'-separated paths of the pictures in a folder and its subfolders, sorted by bytes.

    Memory does not grow with the size of a folder. Links to folders are followed unless they lead
    back to a folder above. A subfolder without read permission is skipped with a warning.
    """
    current = os.path.join(folder, subfolder)
    for name in map(os.fsdecode, sort_names(scan_names(current))):
        path = f"{subfolder}/{name}" if subfolder else name
        if name.endswith("/"):
            if not is_link_to_parent(current, name):
                try:
                    yield from walk_images(folder, path[:-1])
                except PermissionError as error:
                    warnings.warn(f"skipped a folder: {error}", stacklevel=2)
        elif name.lower().endswith(IMAGE_TYPES):
            yield path


def scan_names(folder: str) -> Iterator[bytes]:
    """Unsorted names in a folder. Names of folders end in '/', so that sorting sorts paths."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield os.fsencode(entry.name) + (b"/" if entry.is_dir() else b"")


def is_link_to_parent(folder: str, name: str) -> bool:
    """True if `name` in a folder is a link to that folder or to one above it."""
    path = os.path.join(folder, name.rstrip("/"))
    real_folder = f"{os.path.realpath(folder)}{os.sep}"
    return os.path.islink(path) and real_folder.startswith(os.path.realpath(path) + os.sep)


def sort_names(names: Iterable[bytes], run_length: int = 100_000) -> Iterator[bytes]:
    """Sorted names by an external merge sort: runs of more than run_length names are on disk."""
    names = iter(names)
    runs: list[IO[bytes]] = []
    while run := sorted(itertools.islice(names, run_length)):
        if len(run) < run_length and not runs:
            yield from run
            return
        file = tempfile.TemporaryFile()  # noqa: SIM115 - open until it is merged
        file.writelines(name.replace(b"\n", b"\0") + b"\n" for name in run)     # names have no NUL
        file.seek(0)
        runs.append(file)
    yield from heapq.merge(*((line[:-1].replace(b"\0", b"\n") for line in run) for run in runs))


def list_images(folder: str | Path) -> list[str]:
    """Sorted relative '/'-separated paths of all pictures in a folder and its subfolders."""
    return list(walk_images(folder))


def resolve_shards(inputs: list[str]) -> list[str]:
    """Sorted paths of the tar shards of paths and patterns such as 'shards/*.tar'; [] for a folder.

    Raises InputError if nothing exists, or if two shards have the same file name.
    """
    if len(inputs) == 1 and os.path.isdir(inputs[0]):
        return []
    paths = sorted({path for text in inputs
                    for path in ([text] if os.path.exists(text) else glob.glob(text))})
    if not paths:
        raise InputError(f"{' '.join(inputs)}: no such folder or tar")
    if not all(os.path.isfile(path) and path.endswith(".tar") for path in paths):
        return []
    if len({os.path.basename(path) for path in paths}) < len(paths):
        raise InputError("two shards have the same file name, so their pictures would share names")
    return paths


def tar_members(shards: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """(shard/member, index of shard, offset, size) of every picture in plain tars, in tar order.

    A link has no bytes of its own: its size is 0, so that it is unreadable when it is decoded.
    """
    for shard, path in enumerate(shards):
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()         # type: ignore[attr-defined] # else all stay in memory
                if not member.isdir() and member.name.lower().endswith(IMAGE_TYPES):
                    size = member.size if member.isreg() else 0
                    yield f"{os.path.basename(path)}/{member.name}", shard, member.offset_data, size


def read_path_list(path: str | Path) -> Iterator[str]:
    """The non-empty lines of a list of paths. A path may hold any bytes except line ends.

    A byte order mark, as spreadsheets and Windows editors write it, is skipped.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            line = line if number else line.removeprefix(codecs.BOM_UTF8)
            if name := line.rstrip(b"\r\n"):
                yield os.fsdecode(name)
