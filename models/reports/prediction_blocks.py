"""Predictions of many photos as NumPy columns, one block at a time.

The blocks come from a predictions.csv or from an index of photos. Either may hold tens of millions
of photos: as Python objects they would not fit in memory, as columns a block takes about ten times
the bytes of its text.
"""
import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from models.data.index import PhotoIndex
from models.faces.predictions import UNCERTAIN, label_name
from models.reports.name_hashes import hash_name, hash_names

BLOCK_BYTES = 1 << 24       # of a table, parsed at once
INDEX_BLOCK = 1_000_000     # photos of an index in one block
# Codes in PhotoBlock.predictions beside class indices. They fit into 6 bits with 60 classes.
MAX_CLASSES, ABSTAINED, NO_FACE, NOT_CLASSIFIED = 60, 61, 62, 63
COLUMNS = ("file", "face", "status", "ethnicity")       # the columns that are read

Span = tuple[np.ndarray, np.ndarray]                    # starts, ends (n,) int64 in a text


@dataclass
class PhotoBlock:
    """Names and predictions of n photos. The names lie end to end in one array of bytes."""
    text: np.ndarray            # (m,) uint8; at least 8 bytes follow the last name
    starts: np.ndarray          # (n,) int64 first byte of each name
    ends: np.ndarray            # (n,) int64
    predictions: np.ndarray     # (n,) uint8: class index, ABSTAINED, NO_FACE or NOT_CLASSIFIED

    def folder_ends(self) -> np.ndarray:
        """Position (n,) int64 of the first '/' of each name; the name's end without a '/'."""
        slashes = np.flatnonzero(self.text == ord("/"))
        slashes = np.append(slashes, len(self.text))
        return np.minimum(slashes[np.searchsorted(slashes[:-1], self.starts)], self.ends)


# ------------------------------------------------------------------------------ predictions.csv
def table_columns(path: str | os.PathLike) -> list[str]:
    """The column names of a predictions.csv. Raises ValueError for any other file."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        names = next(csv.reader(file), [])
    if not set(COLUMNS) <= set(names):
        raise ValueError(f"not a predictions.csv: the first line is {','.join(names)[:200]!r}")
    return names


def table_classes(path: str | os.PathLike) -> list[bytes]:
    """The class names of a predictions.csv, as in its column `ethnicity`."""
    names = [label_name(name[2:]) for name in table_columns(path) if name.startswith("p_")]
    if not 0 < len(names) <= MAX_CLASSES:
        raise ValueError(f"it has {len(names)} columns p_<class>, expected 1 to {MAX_CLASSES}")
    return [os.fsencode(name) for name in names]


def table_blocks(path: str | os.PathLike, classes: list[bytes]) -> Iterator[PhotoBlock]:
    """The photos of a predictions.csv with the label of their largest face. Raises ValueError."""
    columns = table_columns(path)
    with open(path, "rb") as file:
        file.readline()
        for block in read_row_blocks(file):
            text, spans = split_unquoted(block, columns) or split_quoted(block, columns)
            yield largest_faces(text, spans, classes)


def read_row_blocks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of a CSV file in blocks of whole rows. A row ends at a newline outside quotes."""
    rest = b""
    while block := file.read(BLOCK_BYTES):
        block = rest + block
        cut = block.rfind(b"\n") + 1
        n_quotes = block.count(b'"', 0, cut)
        while n_quotes % 2:                     # the cut is inside a quoted cell: one line back
            previous_cut, cut = cut, block.rfind(b"\n", 0, cut - 1) + 1
            n_quotes -= block.count(b'"', cut, previous_cut)
        rest = block[cut:]
        if len(rest) > 8 * BLOCK_BYTES:
            raise ValueError(f"a quote is opened and never closed, after {rest[:100]!r}")
        if cut:
            yield block[:cut]
    if rest:
        yield rest + b"\n"


def split_unquoted(block: bytes, columns: list[str]) -> tuple[np.ndarray, list[Span]] | None:
    """Text and the spans of COLUMNS in rows without quotes; None for rows of any other form."""
    if b'"' in block:
        return None
    text = np.frombuffer(block + bytes(8), np.uint8)
    newlines = np.flatnonzero(text == ord("\n"))
    all_commas = np.flatnonzero(text == ord(","))
    if len(all_commas) != len(newlines) * (len(columns) - 1):
        return None
    commas: np.ndarray = all_commas.reshape(len(newlines), -1)
    row_starts = np.concatenate([[0], newlines[:-1] + 1])
    if (commas[:, 0] < row_starts).any() or (commas[:, -1] > newlines).any():
        return None
    spans = []
    for i in map(columns.index, COLUMNS):
        starts = commas[:, i - 1] + 1 if i else row_starts
        spans.append((starts, commas[:, i].copy() if i < commas.shape[1] else newlines))
    return text, spans


def split_quoted(block: bytes, columns: list[str]) -> tuple[np.ndarray, list[Span]]:
    """Text and the spans of COLUMNS in any rows, by Python's csv module. Raises ValueError.

    Names may contain commas, quotes and newlines.
    """
    indices = [columns.index(name) for name in COLUMNS]
    reader = csv.reader(io.StringIO(block.decode("utf-8", "surrogateescape"), newline=""))
    cells = []
    for row in filter(None, reader):
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells, expected {len(columns)}: "
                             f"{','.join(row)[:200]!r}")
        cells += [row[i].encode("utf-8", "surrogateescape") for i in indices]
    lengths = np.array([len(cell) for cell in cells], np.int64)
    ends = lengths.cumsum().reshape(-1, len(COLUMNS))
    starts = ends - lengths.reshape(-1, len(COLUMNS))
    text = np.frombuffer(b"".join(cells) + bytes(8), np.uint8)
    return text, [(starts[:, i], ends[:, i]) for i in range(len(COLUMNS))]


def largest_faces(text: np.ndarray, spans: list[Span], classes: list[bytes]) -> PhotoBlock:
    """One entry per photo: its largest face, which is face 0, or NO_FACE. Raises ValueError.

    spans: those of COLUMNS in the text.
    """
    name, (face, face_end), (status, status_end), (label, label_end) = spans
    is_largest = (text[face] == ord("0")) & (face_end - face == 1)
    is_photo = is_largest | (text[face] == ord("-"))                    # -1: a photo without a face
    has_face = ((text[status] == ord("o")) & (text[status + 1] == ord("k"))
                & (status_end - status == 2))
    predictions = np.full(len(label), NOT_CLASSIFIED, np.uint8)
    hashes = hash_names(text, label, label_end, 0)
    for code, class_name in [*enumerate(classes), (ABSTAINED, UNCERTAIN.encode())]:
        predictions[hashes == hash_name(class_name, 0)] = code
    predictions[~has_face] = NO_FACE
    if (predictions == NOT_CLASSIFIED).any():
        i = int((predictions == NOT_CLASSIFIED).argmax())
        unknown = os.fsdecode(text[label[i]:label_end[i]].tobytes())
        raise ValueError(f"unknown label {unknown!r}, expected one of the classes "
                         f"{', '.join(map(os.fsdecode, classes))}")
    return PhotoBlock(text, name[0][is_photo], name[1][is_photo], predictions[is_photo])


# --------------------------------------------------------------------------- an index of photos
def index_blocks(index: PhotoIndex, positions: np.ndarray | None = None,
                 predictions: np.ndarray | None = None) -> Iterator[PhotoBlock]:
    """The photos of a folder's index. Those at `positions` have the given predictions (k,) uint8.

    All other photos are NOT_CLASSIFIED.
    """
    records = np.memmap(index.rows_path, np.dtype([("start", "<i8"), ("length", "<i4")]), "r")
    names = np.memmap(index.names_path, np.uint8, "r")
    for first in range(0, len(records), INDEX_BLOCK):
        rows = records[first:first + INDEX_BLOCK]
        base, end = int(rows["start"][0]), int(rows["start"][-1] + rows["length"][-1])
        text = np.concatenate([names[base:end], np.zeros(8, np.uint8)])
        starts = rows["start"] - base
        codes = np.full(len(rows), NOT_CLASSIFIED, np.uint8)
        if positions is not None and predictions is not None:
            is_inside = (positions >= first) & (positions < first + len(rows))
            codes[positions[is_inside] - first] = predictions[is_inside]
        yield PhotoBlock(text, starts, starts + rows["length"], codes)
