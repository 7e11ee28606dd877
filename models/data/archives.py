"""Pictures in .tar, .tar.gz and .zip archives, unpacked to a folder without leaving it."""
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from models.data.decoding import IMAGE_TYPES

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
# Errors of damaged archives. RuntimeError: an encrypted zip, or an unknown compression.
ARCHIVE_ERRORS = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError,
                  ValueError)


class ArchiveError(Exception):
    """A source that is neither a folder nor a readable archive; the message says why."""


@contextmanager
def folder_of_source(source: Path, temporary_folder: Path) -> Iterator[Path]:
    """A folder with the pictures of a source, which is a folder or an archive.

    An archive is unpacked below temporary_folder and removed at the end. Raises ArchiveError.
    """
    if source.is_dir():
        yield source
        return
    if not source.is_file():
        raise ArchiveError("no such folder or archive")
    if not source.name.lower().endswith(ARCHIVES):
        raise ArchiveError(f"expects a folder or a file of type {', '.join(ARCHIVES)}")
    unpacked = temporary_folder / "unpacked"
    unpacked.mkdir()
    try:
        for name, data in archive_pictures(source):
            target = unpacked.joinpath(*name.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    except ARCHIVE_ERRORS as error:
        raise ArchiveError(f"cannot be unpacked ({error})") from None
    yield unpacked
    shutil.rmtree(unpacked)


def archive_pictures(source: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """(path, bytes) of the pictures in an archive, without links and paths that leave it."""
    if source.name.lower().endswith(".zip"):
        with zipfile.ZipFile(source) as archive:
            for member in archive.infolist():
                name = PurePosixPath(member.filename)
                if is_safe_picture(name):
                    yield name, archive.read(member)
        return
    with tarfile.open(source) as tar:
        for tar_member in tar:
            name = PurePosixPath(tar_member.name)
            if tar_member.isfile() and is_safe_picture(name):
                file = tar.extractfile(tar_member)
                if file is not None:
                    yield name, file.read()


def is_safe_picture(name: PurePosixPath) -> bool:
    """Whether a member is a picture whose path stays inside the folder of the archive."""
    has_unsafe_part = any(part == ".." or re.search(r"[\\:\0]", part) for part in name.parts)
    return (not name.is_absolute() and not has_unsafe_part
            and name.name.lower().endswith(IMAGE_TYPES))
