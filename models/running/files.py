"""running/files"""
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A place beside `path` to write to; what lies there at the end is moved to `path`, whole or not at all."""
    path = Path(path)
    beside = path.with_name(f"{path.stem}.{os.getpid()}.tmp{path.suffix}")      # its ending tells writers the format
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def merge_parts(parts: list[Path], target: str | Path, head: bytes = b"") -> None:
    """Writes head and then the bytes of all parts, in their order, as one file; memory does not grow with them."""
    with atomic_write(target) as beside, open(beside, "wb") as merged:
        merged.write(head)
        for part in parts:
            with open(part, "rb") as file:
                shutil.copyfileobj(file, merged, 1 << 20)
