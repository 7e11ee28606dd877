"""An index on disk of the pictures in a folder, a list or tar shards."""
import json
import os
import struct
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from models.data.decoding import IMAGE_TYPES
from models.data.listing import InputError, read_path_list, resolve_shards, tar_members, walk_images


class PhotoIndex:
    """Indexed pictures: len(), name(i), and [i] -> a path, or the bytes of a tar member.

    Names stay on disk, so memory does not grow with their number. names.bin holds all names without
    separators. rows.bin holds a record per picture: start and length of its name and, for a tar
    member, its shard, offset and size. index.json holds the folder or the shards. Every process
    opens files of its own; within a process only one thread may read.
    """

    def __init__(self, folder: str | Path):
        self.names_path = os.path.join(folder, "names.bin")
        self.rows_path = os.path.join(folder, "rows.bin")
        content = json.loads((Path(folder) / "index.json").read_text())
        self.root: str = content["root"]
        self.shards: list[str] = content["shards"]
        self.row_format = row_format(self.shards)
        self.row_size = struct.calcsize(self.row_format)
        self.length = os.path.getsize(self.rows_path) // self.row_size
        self.files: dict[str, BinaryIO] = {}
        self.process_id: int | None = None      # of the process that opened the files

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"files": {}, "process_id": None}

    def close(self) -> None:
        """Closes the files, so that Windows can remove them. Reading opens them again."""
        if self.process_id == os.getpid():
            for file in self.files.values():
                file.close()
        self.files, self.process_id = {}, None

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Bytes of a file. names.bin, rows.bin and the current shard stay open."""
        if self.process_id != os.getpid():      # a forked process would share the file position
            self.files, self.process_id = {}, os.getpid()
        if path not in self.files:
            for other_shard in list(self.files)[2:]:
                self.files.pop(other_shard).close()
            self.files[path] = open(path, "rb")     # noqa: SIM115 - closed at the next shard
        self.files[path].seek(offset)
        return self.files[path].read(size)

    def record(self, i: int) -> tuple[int, ...]:
        """Start and length of a name and, for a tar member, its shard, offset and size."""
        if not 0 <= i < self.length:
            raise IndexError(i)
        data = self.read(self.rows_path, i * self.row_size, self.row_size)
        return struct.unpack(self.row_format, data)

    def name(self, i: int) -> str:
        """Name of a picture: its path in the folder, its line of the list, or shard/member."""
        start, length = self.record(i)[:2]
        return os.fsdecode(self.read(self.names_path, start, length))

    def __getitem__(self, i: int) -> str | bytes:
        name = self.name(i)
        if not self.shards:
            return os.path.join(self.root, name)
        shard, offset, size = self.record(i)[2:]
        return self.read(self.shards[shard], offset, size)


def row_format(shards: list[str]) -> str:
    """Format, for struct, of a record of rows.bin."""
    return "<qiiqq" if shards else "<qi"


def index_photos(folder: str | Path, inputs: list[str] | None,
                 in_list: str | None = None) -> PhotoIndex:
    """Writes the index of all pictures of the inputs into a folder, and opens it.

    inputs: one folder, or tar shards (paths or patterns). in_list: a file with one path a line,
    relative to the input folder or, without one, to the current folder. Raises InputError.
    """
    folder = Path(folder)
    shards = [] if in_list else resolve_shards(inputs or [])
    root = "" if shards or not inputs else inputs[0]
    if not shards and inputs and (len(inputs) > 1 or not os.path.isdir(root)):
        raise InputError(f"{' '.join(inputs)}: expects one existing folder, or .tar shards")
    input_name = in_list or " ".join(inputs or [])
    try:
        names_length = write_index(folder, list_entries(shards, in_list, root), row_format(shards))
    except (PermissionError, FileNotFoundError, IsADirectoryError, tarfile.TarError) as error:
        raise InputError(f"{input_name}: cannot be read ({error})") from None
    if names_length == 0:
        raise InputError(f"{input_name}: has no pictures ({' '.join(IMAGE_TYPES)})")
    (folder / "index.json").write_text(json.dumps({"root": root, "shards": shards}))
    return PhotoIndex(folder)


def list_entries(shards: list[str], in_list: str | None, root: str) -> Iterator[tuple]:
    """(name,) of every picture of the list or else of the folder, or members of tar shards."""
    if shards:
        return tar_members(shards)
    return ((name,) for name in (read_path_list(in_list) if in_list else walk_images(root)))


def write_index(folder: Path, entries: Iterable[tuple], record_format: str) -> int:
    """Writes names.bin and rows.bin of entries (name, *member). Returns the bytes of all names."""
    start = 0
    with open(folder / "names.bin", "wb") as names, open(folder / "rows.bin", "wb") as rows:
        for name, *member in entries:
            encoded = os.fsencode(name)
            names.write(encoded)
            rows.write(struct.pack(record_format, start, len(encoded), *member))
            start += len(encoded)
    return start
