"""A list of files in chunks: the unit of work that ranks share and that a resumed run keeps.

The chunks of a list depend on its length alone, so the pictures that are processed together, and
with them the last bit of every number, are the same for any number of ranks and workers.
"""
from collections.abc import Iterable

DECODE_BATCH = 16       # pictures decoded together; 16 of 3 megapixels take 150 MB
MAX_CHUNK = 2048        # files: the most that an interrupted run repeats


def chunk_size(n_files: int) -> int:
    """Files in a chunk: a multiple of DECODE_BATCH, about a 32nd of the list, at most MAX_CHUNK."""
    return min(MAX_CHUNK, -(-n_files // (32 * DECODE_BATCH)) * DECODE_BATCH)


def count_chunks(n_files: int) -> int:
    """Number of chunks of a list of n_files > 0 files; the last chunk may be short."""
    return -(-n_files // chunk_size(n_files))


def count_files(n_files: int, chunks: Iterable[int]) -> int:
    """Number of files in the given chunks of a list of n_files files."""
    size = chunk_size(n_files)
    return sum(min(size, n_files - chunk * size) for chunk in chunks)
