"""data/index"""
import json
import os
import struct
import tarfile
from pathlib import Path

from models.data.decoding import IMAGE_TYPES
from models.data.listing import InputError, read_path_list, resolve_shards, tar_members, walk_images


class PhotoIndex:
    """Pictures of a folder, a list or tar shards: len(), name(i), and [i] -> a path, or the bytes of a tar's member.

    The names stay on disk, so memory is the same for five million as for five: names.bin holds them end to end,
    rows.bin a record for each (start and length of the name, and of a member its shard, offset and size), index.json
    the folder or the shards. Every process reads through its own file handles, and in one thread.
    """

    def __init__(self, folder: str | Path):
        self.names_path, self.rows_path = (os.path.join(folder, name) for name in ("names.bin", "rows.bin"))
        about = json.loads((Path(folder) / "index.json").read_text())
        self.root, self.shards = about["root"], about["shards"]
        self.row = row_format(self.shards)
        self.length = os.path.getsize(self.rows_path) // struct.calcsize(self.row)
        self.handles, self.owner = {}, None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict:
        return vars(self) | {"handles": {}, "owner": None}

    def close(self) -> None:
        """Closes this process's files, which Windows could not remove otherwise; reading on opens them again."""
        if self.owner == os.getpid():
            for file in self.handles.values():
                file.close()
        self.handles, self.owner = {}, None

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Bytes of a file; names.bin, rows.bin and the shard read last stay open."""
        if self.owner != os.getpid():                   # after a fork two processes would share one file position
            self.handles, self.owner = {}, os.getpid()
        if path not in self.handles:
            for old in list(self.handles)[2:]:
                self.handles.pop(old).close()
            self.handles[path] = open(path, "rb")       # noqa: SIM115 - closed when the next shard is opened
        self.handles[path].seek(offset)
        return self.handles[path].read(size)

    def record(self, i: int) -> tuple[int, ...]:
        """Start and length of a name, and of a tar's member its shard, offset and size."""
        if not 0 <= i < self.length:
            raise IndexError(i)
        size = struct.calcsize(self.row)
        return struct.unpack(self.row, self.read(self.rows_path, i * size, size))

    def name(self, i: int) -> str:
        """Name of a picture: its path below the folder, its line of the list, or shard/member."""
        start, length = self.record(i)[:2]
        return os.fsdecode(self.read(self.names_path, start, length))

    def __getitem__(self, i: int) -> str | bytes:
        name = self.name(i)
        if not self.shards:
            return os.path.join(self.root, name)
        shard, offset, size = self.record(i)[2:]
        return self.read(self.shards[shard], offset, size)


def row_format(shards: list[str]) -> str:
    """struct's format of a record of rows.bin."""
    return "<qiiqq" if shards else "<qi"


def index_photos(folder: str | Path, inputs: list[str] | None, in_list: str | None = None) -> PhotoIndex:
    """Writes the index of all pictures of the inputs into a folder, and opens it.

    inputs: one folder, or tar shards (paths or patterns). in_list: a file with one path a line, relative to the
    input folder, or to the current one where there is none. Raises InputError.
    """
    shards = [] if in_list else resolve_shards(inputs)
    root = "" if shards or not inputs else inputs[0]
    if not shards and inputs and (len(inputs) > 1 or not os.path.isdir(root)):
        raise InputError(f"{' '.join(inputs)}: wants one folder that exists, or .tar shards")
    entries = (tar_members(shards) if shards else
               ((name,) for name in (read_path_list(in_list) if in_list else walk_images(root))))
    row, start, folder = row_format(shards), 0, Path(folder)
    try:
        with open(folder / "names.bin", "wb") as names, open(folder / "rows.bin", "wb") as rows:
            for name, *member in entries:
                encoded = os.fsencode(name)
                names.write(encoded)
                rows.write(struct.pack(row, start, len(encoded), *member))
                start += len(encoded)
    except (PermissionError, FileNotFoundError, IsADirectoryError, tarfile.TarError) as error:
        raise InputError(f"{in_list or ' '.join(inputs)}: cannot be read ({error})") from None
    if start == 0:
        raise InputError(f"{in_list or ' '.join(inputs)}: holds no picture ({' '.join(IMAGE_TYPES)})")
    (folder / "index.json").write_text(json.dumps({"root": root, "shards": shards}))
    return PhotoIndex(folder)
