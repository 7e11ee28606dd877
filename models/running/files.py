"""Output files that are written completely or not at all."""
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder, whose file replaces `path` when the block ends.

    An exception in the block removes the temporary file and leaves `path` as it was.
    """
    path = Path(path)
    # The suffix stays the same, because writers choose the file format by it.
    temporary_path = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary_path
        os.replace(temporary_path, path)
    finally:
        temporary_path.unlink(missing_ok=True)


def merge_parts(parts: list[Path], target: str | Path, header: bytes = b"") -> None:
    """Writes the header and then the bytes of all parts, in order, as one file.

    The files are copied in blocks, so memory does not grow with their sizes.
    """
    with atomic_write(target) as temporary_path, open(temporary_path, "wb") as merged:
        merged.write(header)
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, merged, 1 << 20)
