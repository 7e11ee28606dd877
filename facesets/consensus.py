"""Many pictures of each person -> one label per person, where the pictures agree, and a training list of those people.

    python facesets/consensus.py --input_dir people --output_dir out --ckpt checkpoints/stage1.pt
    python facesets/consensus.py --predictions predictions.csv --input_dir people --output_dir out

Reads a folder with a folder for each person, labels at most --max_images random pictures of each, and gives a person
the class that at least --threshold of those with a face are predicted to be. Or reads a predictions.csv of infer.py,
whose files begin with the person's folder, in a stream: it may be larger than the memory. Of a picture with several
faces the largest counts. People whose folders share identical pictures are reported (a table does not tell that).
Writes into the output folder:
  estimated_ethnicities/<class>.txt  the people of each class, one a line
  people.csv                         every person: counts, votes, share of the most voted class, decision, reason
  train_list.csv                     image, class: all pictures of the people kept, but those looked at without a face
  yield.json, votes.png              who is kept and dropped, by class: the rule may cost one class more than another
"""
import csv
import hashlib
import io
import itertools
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from tqdm import tqdm

from models.data.index import PhotoIndex, index_photos
from models.data.listing import InputError
from models.faces.checkpoint import CheckpointError, load_checkpoint
from models.faces.mtcnn import MTCNN
from models.faces.pipeline import (
    Predictor,
    Row,
    Settings,
    classify_files,
    count_chunks,
    count_files,
    decode_workers,
    network_batch,
)
from models.faces.predictions import UNCERTAIN, label_name, quote_cell
from models.running import cli
from models.running.files import atomic_write
from models.running.parts import PartsError, exit_if_finished, missing_parts, open_parts, part_path
from models.running.ranks import barrier, init_distributed, rank_slice, shutdown_distributed

PARTS = "consensus_parts"               # folder of an unfinished run, in the output folder
RESULTS = ("estimated_ethnicities", "people.csv", "train_list.csv", "yield.json", "votes.png")
BLOCK = 1 << 24                         # bytes of a table parsed at once: what parsing needs is ten times that
# What a picture says, beside the position of a class; 6 bits hold it, so there may be 60 classes.
MOST_CLASSES, UNDECIDED, NO_FACE, NOT_ASKED = 60, 61, 62, 63
PERSON_BITS, KEY_BITS, SAID_BITS = 28, 30, 6    # of the 64 into which a picture's vote is packed
BINS = np.append(np.arange(20) / 20 - 1e-9, 1.0)    # of shares: 0.8 lies in the bin that begins with it


def build_parser() -> cli.Parser:
    """All flags and their defaults."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--input_dir", metavar="DIR", help="folder with a folder of pictures for each person")
    add("--output_dir", required=True, metavar="DIR", help="where the results go")
    add("--ckpt", metavar="FILE", help="checkpoint of train.py that labels the pictures")
    add("--predictions", metavar="FILE", help="predictions.csv of infer.py, in place of --ckpt")
    add("--threshold", type=cli.fraction, default=0.8, metavar="T",
        help="least share of a person's faces that are predicted to be of the class (%(default)s)")
    add("--strict", action="store_true", help="more than the threshold, not at least")
    add("--max_images", type=cli.positive_int, default=20, metavar="N", help="pictures of a person asked (%(default)s)")
    add("--min_images", type=cli.positive_int, default=3, metavar="N",
        help="fewest of those with a face, below which a person is dropped (%(default)s)")
    add("--seed", type=cli.non_negative_int, default=0, help="of the random pictures (%(default)s)")
    cli.add_labelling_flags(parser)
    cli.add_rerun_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Counts the votes of each person's pictures, of a table or labelled here, and writes who is kept."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    rank, world_size, device = init_distributed(args.device)
    if args.predictions:
        if rank == 0:
            consensus_of_table(parser, args)
    else:
        consensus_of_folder(parser, args, rank, world_size, device)
    barrier()
    shutdown_distributed()


def check_flags(parser: cli.Parser, args) -> None:
    """The one-line errors that can be told from the flags and the output folder alone."""
    if bool(args.ckpt) == bool(args.predictions):
        parser.error("one of --ckpt and --predictions is needed")
    if args.ckpt and not args.input_dir:
        parser.error("--input_dir is needed with --ckpt")
    if args.input_dir and not os.path.isdir(args.input_dir):
        parser.error(f"--input_dir {args.input_dir}: no such folder")
    if args.input_dir and Path(args.output_dir).resolve().is_relative_to(Path(args.input_dir).resolve()):
        parser.error("--output_dir lies in --input_dir, where it would count as a person")
    if args.predictions and not os.path.isfile(args.predictions):
        parser.error(f"--predictions {args.predictions}: no such file")
    if args.min_images > args.max_images:
        parser.error(f"--min_images {args.min_images} is more than --max_images {args.max_images}, so nobody is kept")
    if args.strict and args.threshold == 1:
        parser.error("--strict --threshold 1: no share is more than 1")
    args.output_dir = cli.output_folder(parser, "--output_dir", args.output_dir)
    if args.resume:
        exit_if_finished(parser, args.output_dir / PARTS, args.output_dir / "people.csv")
    else:
        cli.refuse_existing(parser, "--output_dir", [args.output_dir / name for name in RESULTS], args.overwrite)


def consensus_of_table(parser: cli.Parser, args) -> None:
    """The results, from a predictions.csv."""
    try:
        classes = table_classes(args.predictions)
        votes = count_votes(lambda: table_rows(args.predictions, classes), classes, args)
    except (ValueError, OSError, csv.Error) as error:
        parser.error(f"--predictions {args.predictions}: {error}")
    if not len(votes.ids):
        parser.error(f"--predictions {args.predictions}: no file lies in a folder, so it names no person")
    decisions = decide(votes, args)
    write_results(votes, decisions, lambda: table_rows(args.predictions, classes), {}, args)
    if not args.input_dir:
        print("train_list.csv names the pictures as the table does: with --input_dir train.py would find them")


def consensus_of_folder(parser: cli.Parser, args, rank: int, world_size: int, device) -> None:
    """The results, from a folder of people; the ranks share out the labelling."""
    try:
        checkpoint = load_checkpoint(args.ckpt)
    except CheckpointError as error:
        parser.error(f"--ckpt {args.ckpt}: {error}")
    classes = [os.fsencode(label_name(name)) for name in checkpoint.spec.classes]
    folder = args.output_dir / PARTS
    open_parts(parser, folder, run_flags(args), lambda folder: begin(args, folder), rank,
               resume=args.resume, overwrite=args.overwrite)
    index = PhotoIndex(folder)
    sample = sample_positions(index_rows(index), args.max_images, args.seed)
    photos = Sample(index, sample)
    label_sample(photos, checkpoint, folder, rank, world_size, device, args)
    index.close()
    barrier()
    if rank == 0:
        said, digests = read_parts(folder, len(sample))
        votes = count_votes(lambda: index_rows(index, sample, said), classes, args, empty_folders(args.input_dir))
        same = same_pictures(photos, digests)
        write_results(votes, decide(votes, args), lambda: index_rows(index, sample, said), same, args)
        index.close()
        shutil.rmtree(folder)


# --------------------------------------------------------------------------------------- rows of a table, as columns
@dataclass
class Rows:
    """Some pictures, one each: names end to end, and what each says (a class, UNDECIDED, NO_FACE or NOT_ASKED)."""
    text: np.ndarray            # (m,) uint8; 8 bytes or more follow the last name
    starts: np.ndarray          # (n,) int64 of each name in text
    ends: np.ndarray            # (n,) int64
    said: np.ndarray            # (n,) uint8

    def slashes(self) -> np.ndarray:
        """(n,) int64 position of the first '/' of each name, where the person's folder ends; its end without one."""
        where = np.flatnonzero(self.text == ord("/"))
        first = np.append(where, len(self.text))[np.searchsorted(where, self.starts)]
        return np.minimum(first, self.ends)


def table_columns(path: str | os.PathLike) -> list[str]:
    """The columns of a predictions.csv. Raises ValueError for a file of another kind."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        names = next(csv.reader(file), [])
    if not {"file", "face", "status", "ethnicity"} <= set(names):
        raise ValueError(f"it is no predictions.csv: its first line is {','.join(names)[:200]!r}")
    return names


def table_classes(path: str | os.PathLike) -> list[bytes]:
    """The classes of a predictions.csv, as its column ethnicity spells them."""
    names = [os.fsencode(label_name(name[2:])) for name in table_columns(path) if name.startswith("p_")]
    if not 0 < len(names) <= MOST_CLASSES:
        raise ValueError(f"it has {len(names)} columns p_<class>, wanted 1 to {MOST_CLASSES}")
    return names


def table_rows(path: str | os.PathLike, classes: list[bytes]) -> Iterator[Rows]:
    """The pictures of a predictions.csv, block by block; each by its largest face. Raises ValueError."""
    columns = table_columns(path)
    with open(path, "rb") as file:
        file.readline()
        for block in whole_lines(file):
            fields = split_plain(block, columns) or split_quoted(block, columns)
            yield picture_rows(*fields, classes)


def whole_lines(file) -> Iterator[bytes]:
    """The rest of a CSV file in blocks of whole rows; a row ends at a line's end outside quotes."""
    rest = b""
    while block := file.read(BLOCK):
        block = rest + block
        cut = block.rfind(b"\n") + 1
        quotes = block.count(b'"', 0, cut)
        while quotes % 2:                                       # inside a quoted name: go back to the line before
            last, cut = cut, block.rfind(b"\n", 0, cut - 1) + 1
            quotes -= block.count(b'"', cut, last)
        rest = block[cut:]
        if len(rest) > 8 * BLOCK:
            raise ValueError(f"a quote is opened and never closed, after {rest[:100]!r}")
        if cut:
            yield block[:cut]
    if rest:
        yield rest + b"\n"


Fields = tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]


def split_plain(block: bytes, columns: list[str]) -> Fields | None:
    """Text, and (starts, ends) of the four columns wanted, of rows without quotes; None where there are any."""
    if b'"' in block:
        return None
    text = np.frombuffer(block + bytes(8), np.uint8)
    newlines = np.flatnonzero(text == ord("\n"))
    commas = np.flatnonzero(text == ord(","))
    if len(commas) != len(newlines) * (len(columns) - 1):
        return None
    commas = commas.reshape(len(newlines), -1)
    starts = np.concatenate([[0], newlines[:-1] + 1])
    if (commas[:, 0] < starts).any() or (commas[:, -1] > newlines).any():
        return None
    where = [columns.index(name) for name in ("file", "face", "status", "ethnicity")]
    return text, [(commas[:, i - 1] + 1 if i else starts,
                   commas[:, i].copy() if i < commas.shape[1] else newlines) for i in where]


def split_quoted(block: bytes, columns: list[str]) -> Fields:
    """The same of any rows, by Python's csv: names with commas, quotes and line ends. Raises ValueError."""
    where = [columns.index(name) for name in ("file", "face", "status", "ethnicity")]
    reader = csv.reader(io.StringIO(block.decode("utf-8", "surrogateescape"), newline=""))
    cells = []
    for row in filter(None, reader):
        if len(row) != len(columns):
            raise ValueError(f"a row has {len(row)} cells, wanted {len(columns)}: {','.join(row)[:200]!r}")
        cells += [row[i].encode("utf-8", "surrogateescape") for i in where]
    ends = np.cumsum(np.array([len(cell) for cell in cells], np.int64)).reshape(-1, 4)
    starts = ends - np.array([len(cell) for cell in cells], np.int64).reshape(-1, 4)
    return np.frombuffer(b"".join(cells) + bytes(8), np.uint8), [(starts[:, i], ends[:, i]) for i in range(4)]


def picture_rows(text: np.ndarray, fields: list[tuple[np.ndarray, np.ndarray]], classes: list[bytes]) -> Rows:
    """One row a picture: its largest face, which is face 0, or that it has none. Raises ValueError."""
    (name_starts, name_ends), (face, face_end), (status, status_end), (label, label_end) = fields
    largest = (text[face] == ord("-")) | ((text[face] == ord("0")) & (face_end - face == 1))
    face_found = (text[status] == ord("o")) & (text[status + 1] == ord("k")) & (status_end - status == 2)
    said = np.full(len(label), NOT_ASKED, np.uint8)
    hashes = hash_names(text, label, label_end, 0)
    for i, name in [*enumerate(classes), (UNDECIDED, UNCERTAIN.encode())]:
        said[hashes == hash_one(name, 0)] = i
    said[~face_found] = NO_FACE
    if (said == NOT_ASKED).any():
        i = int((said == NOT_ASKED).argmax())
        unknown = os.fsdecode(text[label[i]:label_end[i]].tobytes())
        raise ValueError(f"the label {unknown!r} is none of its classes {', '.join(map(os.fsdecode, classes))}")
    return Rows(text, name_starts[largest], name_ends[largest], said[largest])


def index_rows(index: PhotoIndex, sample: np.ndarray | None = None, said: np.ndarray | None = None) -> Iterator[Rows]:
    """The pictures of a folder's index, a million at a time; those at the sampled positions with what they say."""
    records = np.memmap(index.rows_path, np.dtype([("start", "<i8"), ("length", "<i4")]), "r")
    names = np.memmap(index.names_path, np.uint8, "r")
    for first in range(0, len(records), 1_000_000):
        some = records[first:first + 1_000_000]
        base, end = int(some["start"][0]), int(some["start"][-1] + some["length"][-1])
        text = np.concatenate([names[base:end], np.zeros(8, np.uint8)])
        starts = some["start"] - base
        known = np.full(len(some), NOT_ASKED, np.uint8)
        if sample is not None:
            inside = (sample >= first) & (sample < first + len(some))
            known[sample[inside] - first] = said[inside]
        yield Rows(text, starts, starts + some["length"], known)


# ---------------------------------------------------------------------------------------------- the sample of a person
def mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser of (n,) uint64: every bit of the outcome hangs on every bit of x. Steele et al., 2014."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_names(text: np.ndarray, starts: np.ndarray, ends: np.ndarray, seed: int) -> np.ndarray:
    """(n,) uint64 hash of the bytes from starts to ends; 8 bytes or more follow the last in text (m,) uint8."""
    words = np.ndarray(len(text) - 7, "<u8", text, strides=(1,))        # the eight bytes from each position on
    lengths = (ends - starts).astype(np.uint64)
    hashes = mixed(lengths + np.uint64(seed * 0x9E3779B97F4A7C15 % (1 << 64)))
    active, at = np.arange(len(starts)), starts.copy()
    while len(active := active[at[active] < ends[active]]):
        left = np.minimum(ends[active] - at[active], 8).astype(np.uint64)
        word = words[at[active]] & (np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - left * np.uint64(8)))
        hashes[active] = mixed(hashes[active] ^ word) + np.uint64(0x9E3779B97F4A7C15)
        at[active] += 8
    return mixed(hashes)


def hash_one(name: bytes, seed: int) -> np.uint64:
    """hash_names of one name."""
    text = np.frombuffer(name + bytes(8), np.uint8)
    return hash_names(text, np.array([0]), np.array([len(name)]), seed)[0]


def number_people(rows: Rows, numbers: dict[bytes, int]) -> np.ndarray:
    """(n,) int64 number of each picture's person, -1 for one in no folder.

    numbers: person -> number; those not seen before are added. Pictures of one person that stand together, as
    infer.py writes them, are looked up once.
    """
    ends = rows.slashes()
    hashes = hash_names(rows.text, rows.starts, ends, 0)
    begins = np.ones(len(hashes), bool)
    begins[1:] = hashes[1:] != hashes[:-1]
    text, firsts = rows.text.tobytes(), np.flatnonzero(begins)
    found = [numbers.setdefault(text[start:end], len(numbers)) if start < end < last else -1 for start, end, last in
             zip(rows.starts[firsts].tolist(), ends[firsts].tolist(), rows.ends[firsts].tolist(), strict=True)]
    return np.repeat(np.array(found, np.int64), np.diff(np.append(firsts, len(hashes))))


def packed_votes(rows: Rows, person: np.ndarray, seed: int) -> np.ndarray:
    """(n,) uint64: a picture's person, random key and what it says, so that sorting numbers draws the samples.

    The key is a hash of seed, person and file name: a person's sample are its smallest keys, which nobody else's
    pictures and no order of the table can change.
    """
    keys = hash_names(rows.text, rows.starts, rows.ends, seed + 1) >> np.uint64(64 - KEY_BITS)
    return ((person.astype(np.uint64) << np.uint64(KEY_BITS + SAID_BITS)) | (keys << np.uint64(SAID_BITS))
            | rows.said.astype(np.uint64))


def sample_positions(blocks: Iterator[Rows], max_images: int, seed: int) -> np.ndarray:
    """(n,) int64 ascending positions, in a list, of at most max_images pictures of each person."""
    numbers, people, keys = {}, [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for rows in blocks:
        people.append(number_people(rows, numbers))
        keys.append(packed_votes(rows, people[-1], seed))
    people = np.concatenate(people)
    order = np.concatenate(keys).argsort(kind="stable")
    order = order[people[order] >= 0]
    return np.sort(order[place_in_group(people[order]) < max_images])


def place_in_group(groups: np.ndarray) -> np.ndarray:
    """(n,) int64: how many of the same group stand before each entry of groups (n,), equal ones side by side."""
    firsts = np.flatnonzero(np.diff(groups, prepend=-1))
    place = np.arange(len(groups))
    place -= np.repeat(firsts, np.diff(np.append(firsts, len(groups))))      # in place: these are the largest arrays
    return place


# ------------------------------------------------------------------------------------------------- pictures to answers
class Sample:
    """The sampled pictures of an index; anything that reads lists of pictures takes it."""

    def __init__(self, index: PhotoIndex, positions: np.ndarray):
        self.index, self.positions = index, positions

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, i: int) -> str:
        """person/.../picture."""
        return self.index.name(int(self.positions[i]))

    def __getitem__(self, i: int) -> str:
        return self.index[int(self.positions[i])]


def begin(args, folder: Path) -> None:
    """Indexes the pictures of all people. Raises PartsError."""
    try:
        index = index_photos(folder, [args.input_dir])
    except InputError as error:
        raise PartsError(f"--input_dir {error}") from None
    people = any("/" in index.name(i) for i in range(len(index)))
    index.close()
    if not people:
        raise PartsError(f"--input_dir {args.input_dir}: no picture lies in a person's folder")


def run_flags(args) -> dict:
    """All that decides what a part holds."""
    names = ("input_dir", "max_images", "seed", "align", "min_face_size", "max_side", "batch_size")
    digest = hashlib.blake2b(Path(args.ckpt).read_bytes(), digest_size=8).hexdigest()
    return {name: getattr(args, name) for name in names} | {"ckpt": digest}


def label_sample(photos: Sample, checkpoint, folder: Path, rank: int, world_size: int, device, args) -> None:
    """Labels this rank's share of the sample; the answers of each chunk are a part."""
    todo = missing_parts(folder, count_chunks(len(photos)), "npz")
    mine = [todo[i] for i in rank_slice(len(todo), rank, world_size)]
    n_files = count_files(len(photos), mine)
    workers = decode_workers(args.num_workers, n_files, device)
    settings = Settings(args.align, "largest", batch_size=args.batch_size or network_batch(device), workers=workers,
                        max_side=args.max_side)
    detector = None if args.align == "never" else MTCNN(min_face_size=args.min_face_size).to(device)
    predictor = Predictor(checkpoint, device)
    with tqdm(total=n_files, unit=" pictures", disable=rank != 0, smoothing=0.05) as bar:
        for chunk, rows in classify_files(photos, predictor, detector, settings, mine) if mine else ():
            with atomic_write(part_path(folder, chunk, "npz")) as beside, open(beside, "wb") as file:
                np.savez(file, said=[answer(row) for row in rows],
                         digests=np.array([digest(photos[row.position]) for row in rows], np.uint64))
            bar.update(len(rows))


def answer(row: Row) -> int:
    """What a picture says: the position of its predicted class, or NO_FACE."""
    return int(row.probs.argmax()) if row.status == "ok" else NO_FACE


def digest(path: str) -> int:
    """A number that tells the contents of a file; 0 where it cannot be read."""
    with suppress(OSError):
        return int.from_bytes(hashlib.blake2b(Path(path).read_bytes(), digest_size=8).digest(), "little")
    return 0


def read_parts(folder: Path, n: int) -> tuple[np.ndarray, np.ndarray]:
    """What each picture of the sample says (n,) uint8, and its digest (n,) uint64."""
    said, digests = [], []
    for chunk in range(count_chunks(n)):
        with np.load(part_path(folder, chunk, "npz")) as part:
            said.append(part["said"])
            digests.append(part["digests"])
    return np.concatenate(said).astype(np.uint8), np.concatenate(digests)


def same_pictures(photos: Sample, digests: np.ndarray) -> dict[bytes, Counter]:
    """Person -> other people with sampled pictures identical to theirs, and how many: perhaps one person twice."""
    values, counts = np.unique(digests, return_counts=True)
    holders = defaultdict(set)
    for i in np.flatnonzero(np.isin(digests, values[(counts > 1) & (values != 0)])).tolist():
        holders[int(digests[i])].add(os.fsencode(photos.name(i).split("/")[0]))
    same = defaultdict(Counter)
    for people in holders.values():
        for one, other in itertools.permutations(sorted(people), 2):
            same[one][other] += 1
    return same


def empty_folders(folder: str) -> list[bytes]:
    """Folders of people in a folder, sorted; those without a picture among them."""
    with os.scandir(folder) as entries:
        return sorted(os.fsencode(entry.name) for entry in entries if entry.is_dir())


# ---------------------------------------------------------------------------------------------------- answers to labels
@dataclass
class Votes:
    """The votes of P people over C classes."""
    classes: list[bytes]
    ids: list[bytes]            # of the people, sorted
    number: dict[bytes, int]    # position in ids
    n_images: np.ndarray        # (P,) int64
    n_used: np.ndarray          # (P,) int64: those asked
    votes: np.ndarray           # (P, C) int64
    n_face: np.ndarray          # (P,) int64: of n_used, with a face (which may be undecided)
    n_stray: int                # pictures in no person's folder


def count_votes(blocks: Callable[[], Iterator[Rows]], classes: list[bytes], args,
                others: list[bytes] = ()) -> Votes:
    """Votes of the sample of every person; others: people who may have no picture.

    A picture is 8 bytes in memory, a person about 300.
    """
    numbers, parts, n_stray = {}, [np.zeros(0, np.uint64)], 0
    for rows in blocks():
        person = number_people(rows, numbers)
        kept = person >= 0
        n_stray += int((~kept).sum())
        parts.append(packed_votes(rows, person, args.seed)[kept])
        if len(numbers) >> PERSON_BITS:
            raise ValueError(f"it has more than {1 << PERSON_BITS:,} people")
    for name in others:
        numbers.setdefault(name, len(numbers))
    packed = np.concatenate(parts)
    del parts
    packed.sort()
    people = (packed >> np.uint64(KEY_BITS + SAID_BITS)).astype(np.int32)
    n_people, n_said = len(numbers), 1 << SAID_BITS
    n_images = np.bincount(people, minlength=n_people)
    asked = place_in_group(people) < args.max_images
    said = (packed[asked] & np.uint64(n_said - 1)).astype(np.int64)
    del packed
    people = people[asked]
    votes = np.stack([np.bincount(people[said == c], minlength=n_people) for c in range(len(classes))], 1)
    n_used = np.bincount(people, minlength=n_people)
    n_face = np.bincount(people[said <= UNDECIDED], minlength=n_people)
    ids = sorted(numbers)
    order = np.array([numbers[name] for name in ids], np.int64)
    return Votes(classes, ids, {name: i for i, name in enumerate(ids)}, n_images[order], n_used[order], votes[order],
                 n_face[order], n_stray)


@dataclass
class Decisions:
    """What the rule makes of each of P people."""
    leading: np.ndarray         # (P,) int64 most voted class, -1 where none leads alone
    share: np.ndarray           # (P,) float64 of the most voted class among the faces; 0 without a face
    decision: np.ndarray        # (P,) int64 class, -1 for a person who is dropped
    reason: np.ndarray          # (P,) int64 position in REASONS


REASONS = ("", "no picture", "no face in any picture", "too few pictures with a face", "two classes lead together",
           "the share is below the threshold")


def decide(votes: Votes, args) -> Decisions:
    """The class of everyone in whose faces its share reaches the threshold (--strict: goes beyond it)."""
    top = votes.votes.max(1)
    leaders = (votes.votes == top[:, None]).sum(1)
    leading = np.where((leaders == 1) & (top > 0), votes.votes.argmax(1), -1)
    share = top / np.maximum(votes.n_face, 1)
    agreed = share > args.threshold if args.strict else share >= args.threshold
    reason = np.select([votes.n_used == 0, votes.n_face == 0, votes.n_face < args.min_images, ~agreed, leading < 0],
                       [1, 2, 3, 5, 4], 0)
    return Decisions(leading, share, np.where(reason == 0, leading, -1), reason)


# --------------------------------------------------------------------------------------------------- labels to results
def write_results(votes: Votes, decisions: Decisions, blocks: Callable[[], Iterator[Rows]],
                  same: dict[bytes, Counter], args) -> None:
    """All files of the output folder, and the report."""
    out = args.output_dir
    write_lists(out / "estimated_ethnicities", votes, decisions)
    write_people(out / "people.csv", votes, decisions, same)
    n_images = write_train_list(out / "train_list.csv", votes, decisions, blocks(), args.input_dir)
    report = yield_report(votes, decisions, n_images, same, args)
    with atomic_write(out / "yield.json") as beside:
        beside.write_text(json.dumps(report, indent=1))
    draw_votes(out / "votes.png", votes, decisions, args)
    print_report(report, out)


def write_lists(folder: Path, votes: Votes, decisions: Decisions) -> None:
    """<class>.txt for every class, empty ones too; a line's end in a person's id is written \\n or \\r."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.txt"):
        old.unlink()
    for c, name in enumerate(votes.classes):
        with atomic_write(folder / f"{os.fsdecode(name)}.txt") as beside, open(beside, "wb") as file:
            for i in np.flatnonzero(decisions.decision == c).tolist():
                file.write(votes.ids[i].replace(b"\n", b"\\n").replace(b"\r", b"\\r") + b"\n")


def write_people(path: Path, votes: Votes, decisions: Decisions, same: dict[bytes, Counter]) -> None:
    """people.csv, a row for every person, sorted by id."""
    names = [os.fsdecode(name) for name in votes.classes]
    columns = ["id", "n_images", "n_used", "n_face", *(f"votes_{name}" for name in names), "share", "decision",
               "reason"]
    numbers = np.column_stack([votes.n_images, votes.n_used, votes.n_face, votes.votes])
    plain = not same
    with atomic_write(path) as beside, open(beside, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(",".join(columns) + "\n")
        for first in range(0, len(votes.ids), 100_000):
            some = slice(first, first + 100_000)
            for person, row, share, decision, why in zip(
                    votes.ids[some], numbers[some].tolist(), decisions.share[some].tolist(),
                    decisions.decision[some].tolist(), decisions.reason[some].tolist(), strict=True):
                reason = REASONS[why] if plain or person not in same else "; ".join(
                    filter(None, (REASONS[why], shared(same[person]))))
                file.write(f"{quote_cell(os.fsdecode(person))},{','.join(map(str, row))},{share:.4f},"
                           f"{names[decision] if decision >= 0 else ''},{quote_cell(reason)}\n")


def shared(others: Counter) -> str:
    """Whose pictures a person's folder holds too."""
    return "; ".join(f"{n} pictures identical to those of {os.fsdecode(other)}" for other, n in sorted(others.items()))


def write_train_list(path: Path, votes: Votes, decisions: Decisions, blocks: Iterator[Rows],
                     input_dir: str | None) -> list[int]:
    """train_list.csv, in the order of the pictures; how many there are of each class.

    All pictures of everyone who is kept, but those that were looked at and show no face.
    """
    root = os.fsencode(os.path.abspath(input_dir)) + b"/" if input_dir else b""
    tails = [b"," + quoted_bytes(name) + b"\n" for name in votes.classes]
    counts = np.zeros(len(tails), np.int64)
    with atomic_write(path) as beside, open(beside, "wb") as file:
        file.write(b"image,class\n")
        for rows in blocks:
            person = number_people(rows, votes.number)
            label = np.where(person >= 0, decisions.decision[person], -1)
            kept = np.flatnonzero((label >= 0) & (rows.said != NO_FACE))
            counts += np.bincount(label[kept], minlength=len(tails))
            text = rows.text.tobytes()
            images = [root + text[start:end] for start, end in
                      zip(rows.starts[kept].tolist(), rows.ends[kept].tolist(), strict=True)]
            if any(mark in b"".join(images) for mark in b',"\r\n'):
                images = [quoted_bytes(image) for image in images]
            file.write(b"".join([image + tails[c] for image, c in zip(images, label[kept].tolist(), strict=True)]))
    return counts.tolist()


def quoted_bytes(cell: bytes) -> bytes:
    """A cell of a CSV whose bytes may be no UTF-8."""
    return quote_cell(cell.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def yield_report(votes: Votes, decisions: Decisions, n_images: list[int], same: dict[bytes, Counter], args) -> dict:
    """What yield.json holds. A person counts to the class that most of its faces are predicted to be.

    kept_share is of those with enough pictures: what the threshold alone does.
    """
    per_class = {}
    for c, name in enumerate(votes.classes):
        led, kept = decisions.leading == c, int((decisions.decision == c).sum())
        too_few = int((led & (votes.n_face < args.min_images)).sum())
        judged = int(led.sum()) - too_few
        per_class[os.fsdecode(name)] = {"people": judged + too_few, "too_few_pictures": too_few, "kept": kept,
                                        "dropped": judged - kept, "kept_share": kept / judged if judged else None,
                                        "train_images": n_images[c]}
    losses = {name: row["dropped"] / (row["dropped"] + row["kept"]) for name, row in per_class.items()
              if row["dropped"]}
    bins = np.histogram(decisions.share[votes.n_face > 0], BINS)[0].tolist()
    pairs = sorted((os.fsdecode(one), os.fsdecode(other), n) for one, others in same.items()
                   for other, n in others.items() if one < other)
    return {"people": len(votes.ids), "kept": int((decisions.decision >= 0).sum()),
            "images": int(votes.n_images.sum()), "asked": int(votes.n_used.sum()), "with_face": int(votes.n_face.sum()),
            "train_images": sum(n_images), "images_of_nobody": votes.n_stray,
            "threshold": args.threshold, "strict": args.strict, "max_images": args.max_images,
            "min_images": args.min_images, "seed": args.seed, "per_class": per_class,
            "loses_most": max(losses, key=losses.get) if losses else None,
            "empty_classes": [name for name, row in per_class.items() if not row["kept"]],
            "dropped_because": {why: int((decisions.reason == i).sum()) for i, why in enumerate(REASONS) if why},
            "share_histogram": bins, "same_pictures": pairs}


def print_report(report: dict, out: Path) -> None:
    """The summary at the end."""
    print(f"{report['kept']:,} of {report['people']:,} people kept, {report['train_images']:,} pictures in "
          f"{out / 'train_list.csv'}; {report['asked']:,} pictures asked, {report['with_face']:,} with a face")
    width = max(len(name) for name in report["per_class"])
    print(f"{'':{width}} {'people':>9} {'too few':>9} {'kept':>9} {'dropped':>9}  kept share")
    for name, row in report["per_class"].items():
        share = "" if row["kept_share"] is None else f"{100 * row['kept_share']:.1f} %"
        print(f"{name:{width}} {row['people']:9,} {row['too_few_pictures']:9,} {row['kept']:9,} {row['dropped']:9,}"
              f"  {share:>10}")
    print("dropped: " + ", ".join(f"{why} {n:,}" for why, n in report["dropped_because"].items()))
    if report["loses_most"]:
        print(f"the rule costs {report['loses_most']} most: the people kept are no fair sample of those before")
    if report["images_of_nobody"]:
        print(f"{report['images_of_nobody']:,} pictures lie in no person's folder and were passed over")
    for one, other, n in report["same_pictures"][:20]:
        print(f"perhaps one person: {one!r} and {other!r} share {n} identical pictures (see people.csv)")
    if len(report["same_pictures"]) > 20:
        print(f"... and {len(report['same_pictures']) - 20:,} more such pairs in yield.json")
    for name in report["empty_classes"]:
        print(f"no person of class {name} is left: train.py cannot learn it from train_list.csv")


def draw_votes(path: Path, votes: Votes, decisions: Decisions, args) -> None:
    """Histogram of the most voted class's share in a person's faces, by that class, with the threshold."""
    from matplotlib.figure import Figure  # a second to import, and only the end needs it
    figure = Figure(figsize=(4.2 * len(votes.classes), 3.6), layout="tight")
    panels = figure.subplots(1, len(votes.classes), squeeze=False)[0]
    for c, (panel, name) in enumerate(zip(panels, votes.classes, strict=True)):
        shares = decisions.share[decisions.leading == c]
        kept = (decisions.decision == c)[decisions.leading == c]
        panel.hist([shares[kept], shares[~kept]], BINS, stacked=True, color=["tab:blue", "0.7"],
                   label=[f"kept {kept.sum():,}", f"dropped {(~kept).sum():,}"])
        panel.axvline(args.threshold, color="tab:red", linewidth=1)
        panel.set_title(os.fsdecode(name), parse_math=False)
        panel.set(xlabel="share of the person's faces", ylabel="people", xlim=(0, 1))
        panel.legend(loc="upper left", frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


if __name__ == "__main__":
    main()
