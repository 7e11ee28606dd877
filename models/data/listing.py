"""data/listing"""
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

from models.data.decoding import IMAGE_TYPES


class InputError(Exception):
    """A folder, list or set of tar shards that cannot be read or holds no picture; the message says which."""


def walk_images(folder: str | Path, below: str = "") -> Iterator[str]:
    """Relative '/'-separated paths of the pictures under a folder, sorted by their bytes.

    Memory stays flat in huge folders. Links to folders are followed, never in a circle; a subfolder that may not be
    read is passed over with a warning.
    """
    here = os.path.join(folder, below)
    for name in map(os.fsdecode, sort_names(scan_names(here))):
        path = f"{below}/{name}" if below else name
        if name.endswith("/"):
            if not is_circle(here, name):
                try:
                    yield from walk_images(folder, path[:-1])
                except PermissionError as error:
                    warnings.warn(f"passed over: {error}", stacklevel=2)
        elif name.lower().endswith(IMAGE_TYPES):
            yield path


def scan_names(folder: str) -> Iterator[bytes]:
    """Names in a folder as they come; those of folders end in '/', so that sorting levels sorts whole paths."""
    with os.scandir(folder) as entries:
        for entry in entries:
            yield os.fsencode(entry.name) + (b"/" if entry.is_dir() else b"")


def is_circle(folder: str, name: str) -> bool:
    """Whether `name` in a folder is a link back to that folder or one above it."""
    path = os.path.join(folder, name.rstrip("/"))
    return os.path.islink(path) and f"{os.path.realpath(folder)}{os.sep}".startswith(os.path.realpath(path) + os.sep)


def sort_names(names: Iterable[bytes], held: int = 100_000) -> Iterator[bytes]:
    """Names sorted; at most `held` of them in memory, longer series as sorted runs in temporary files."""
    names = iter(names)
    runs = []
    while some := sorted(itertools.islice(names, held)):
        if len(some) < held and not runs:
            yield from some
            return
        run = tempfile.TemporaryFile()  # noqa: SIM115 - lives until the merge has read it
        run.writelines(name.replace(b"\n", b"\0") + b"\n" for name in some)      # no name holds a NUL
        run.seek(0)
        runs.append(run)
    yield from heapq.merge(*((line[:-1].replace(b"\0", b"\n") for line in run) for run in runs))


def list_images(folder: str | Path) -> list[str]:
    """Sorted relative '/'-separated paths of all pictures under a folder."""
    return list(walk_images(folder))


def resolve_shards(inputs: list[str]) -> list[str]:
    """Sorted paths of the tar shards that inputs name, patterns such as 'shards/*.tar' resolved; [] for a folder."""
    if len(inputs) == 1 and os.path.isdir(inputs[0]):
        return []
    found = sorted({path for text in inputs for path in ([text] if os.path.exists(text) else glob.glob(text))})
    if not found:
        raise InputError(f"{' '.join(inputs)}: no such folder or tar")
    if not all(os.path.isfile(path) and path.endswith(".tar") for path in found):
        return []
    names = [os.path.basename(path) for path in found]
    if len(set(names)) < len(names):
        raise InputError("two shards share a file name, and their pictures would share names")
    return found


def tar_members(shards: list[str]) -> Iterator[tuple[str, int, int, int]]:
    """(shard/member, number of the shard, offset, size) of every picture in plain tars, in their order.

    A link, whose bytes lie elsewhere, has size 0 and is found unreadable when its turn comes.
    """
    for number, path in enumerate(shards):
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()                     # tarfile remembers them all otherwise
                if not member.isdir() and member.name.lower().endswith(IMAGE_TYPES):
                    size = member.size if member.isreg() else 0
                    yield f"{os.path.basename(path)}/{member.name}", number, member.offset_data, size


def read_path_list(path: str | Path) -> Iterator[str]:
    """The lines of a list of paths, without empty ones; any bytes but line ends may be in a path.

    A byte order mark, which spreadsheets and Windows editors put first, is none of the first path.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            line = line if number else line.removeprefix(codecs.BOM_UTF8)
            if name := line.rstrip(b"\r\n"):
                yield os.fsdecode(name)
