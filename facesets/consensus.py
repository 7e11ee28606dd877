"""Many photos of each person -> one label per person whose photos agree, and a training list.

    python facesets/consensus.py --input_dir people --output_dir out --ckpt checkpoints/stage1.pt
    python facesets/consensus.py --predictions predictions.csv --input_dir people --output_dir out

--input_dir holds a folder of photos for each person. At most --max_images random photos of each
person are classified by their largest face. A person gets a class if at least --threshold of the
person's faces are predicted to be of that class. With --predictions the votes come from a
predictions.csv of infer.py, whose file names begin with the person's folder. The table is read as a
stream and may be larger than the memory. Without it, folders with identical photos are reported.
Writes into the output folder:
  estimated_ethnicities/<class>.txt  the people of each class, one per line
  people.csv                         every person: counts, votes, share, decision, reason
  train_list.csv                     image, class: photos of the people kept; a classified photo
                                     without a face is left out
  yield.json, votes.png              people kept and dropped by class, which need not be in
                                     proportion
"""
import csv
import hashlib
import itertools
import json
import os
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from models.data.chunks import count_chunks, count_files
from models.data.index import PhotoIndex, index_photos
from models.data.listing import InputError
from models.faces.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from models.faces.pipeline import (
    Classification,
    FacePolicy,
    FaceRow,
    Loading,
    classify_photos,
    decode_workers,
)
from models.faces.predictions import label_name, quote_cell
from models.faces.predictor import Predictor, network_batch_size
from models.faces.second_look import load_detector
from models.reports import consensus_yield
from models.reports.consensus_yield import DuplicatePhotos
from models.reports.prediction_blocks import (
    NO_FACE,
    PhotoBlock,
    index_blocks,
    table_blocks,
    table_classes,
)
from models.reports.votes import (
    REASONS,
    ConsensusRule,
    Decisions,
    VoteTable,
    apply_rule,
    count_votes,
    number_people,
    sample_positions,
)
from models.running import cli, parts
from models.running.command import run_command
from models.running.files import atomic_write
from models.running.ranks import barrier, init_distributed, rank_slice, shutdown_distributed

PARTS = "consensus_parts"           # folder of an unfinished run, in the output folder
RESULTS = ("estimated_ethnicities", "people.csv", "train_list.csv", "yield.json", "votes.png")


def build_parser() -> cli.Parser:
    """All flags and their defaults."""
    rule = ConsensusRule()
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_input_dir(parser, "folder with a folder of photos for each person")
    cli.add_output_dir(parser)
    source = parser.add_mutually_exclusive_group()
    cli.add_ckpt(source)
    source.add_argument("--predictions", metavar="FILE",
                        help="predictions.csv of infer.py; nothing is classified")
    add("--threshold", type=cli.fraction, default=rule.threshold, metavar="T",
        help="least share of a person's faces predicted to be of the class (%(default)s)")
    add("--strict", action="store_true", help="the share must exceed the threshold")
    add("--max_images", type=cli.positive_int, default=rule.max_images, metavar="N",
        help="photos of a person that are classified, at most (%(default)s)")
    add("--min_images", type=cli.positive_int, default=rule.min_images, metavar="N",
        help="those with a face, at least; a person with fewer is dropped (%(default)s)")
    cli.add_seed(parser, rule.seed, "seed of the random samples of photos")
    cli.add_labelling_flags(parser)
    cli.add_rerun_flags(parser)
    return parser


@dataclass(frozen=True)
class Output:
    """Where the results go, and the rule that they follow."""
    folder: Path
    input_dir: str | None           # folder of the people, if it is known
    rule: ConsensusRule


def main(argv: list[str] | None = None) -> None:
    """Counts the votes of every person's photos, applies the rule and writes the results."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    output = open_output(parser, args)
    rank, world_size, device = init_distributed(args.device)
    if args.predictions:
        if rank == 0:
            consensus_of_table(parser, args.predictions, output)
    else:
        checkpoint = open_checkpoint(parser, args.ckpt)
        photos = open_sample(parser, args, output.folder / PARTS, rank)
        label_sample(photos, checkpoint, args, rank, world_size, device)
        barrier()
        if rank == 0:
            consensus_of_folder(photos, checkpoint.spec.classes, output)
    barrier()
    shutdown_distributed()


def check_flags(parser: cli.Parser, args: Namespace) -> None:
    """Ends the program with a one-line error for flags that contradict each other."""
    if not args.predictions and not args.input_dir:
        parser.error("--input_dir is required with --ckpt, --predictions otherwise")
    if args.input_dir and not os.path.isdir(args.input_dir):
        parser.error(f"--input_dir {args.input_dir}: no such folder")
    output_dir = Path(args.output_dir).resolve()
    if args.input_dir and output_dir.is_relative_to(Path(args.input_dir).resolve()):
        parser.error("--output_dir is inside --input_dir, where it would count as a person")
    if args.predictions and not os.path.isfile(args.predictions):
        parser.error(f"--predictions {args.predictions}: no such file")
    if args.min_images > args.max_images:
        parser.error(f"--min_images {args.min_images} exceeds --max_images {args.max_images}, "
                     "so nobody would be kept")
    if args.strict and args.threshold == 1:
        parser.error("--strict --threshold 1: no share exceeds 1")


def open_output(parser: cli.Parser, args: Namespace) -> Output:
    """The output folder, which must not hold earlier results unless they may be replaced."""
    folder = cli.output_folder(parser, "--output_dir", args.output_dir)
    if args.resume:
        parts.exit_if_finished(parser, folder / PARTS, folder / "people.csv")
    else:
        cli.refuse_existing(parser, "--output_dir", [folder / name for name in RESULTS],
                            args.overwrite)
    rule = ConsensusRule(threshold=args.threshold, strict=args.strict, max_images=args.max_images,
                         min_images=args.min_images, seed=args.seed)
    return Output(folder, args.input_dir, rule)


def open_checkpoint(parser: cli.Parser, path: str) -> Checkpoint:
    """The checkpoint of --ckpt; a one-line error for any other file."""
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        parser.error(f"--ckpt {path}: {error}")


def consensus_of_table(parser: cli.Parser, path: str, output: Output) -> None:
    """Writes the results for a predictions.csv."""
    rule = output.rule
    try:
        classes = table_classes(path)
        read_blocks = partial(table_blocks, path, classes)
        votes = count_votes(read_blocks, classes, rule.max_images, rule.seed)
    except (ValueError, OSError, csv.Error) as error:
        parser.error(f"--predictions {path}: {error}")
    if not votes.person_ids:
        parser.error(f"--predictions {path}: no file lies in a folder, so it names no person")
    write_results(votes, read_blocks, {}, output)
    if not output.input_dir:
        print("train_list.csv has the file names of the table; with --input_dir it has full paths, "
              "which train.py needs")


def consensus_of_folder(photos: "SampledPhotos", classes: tuple[str, ...], output: Output) -> None:
    """Writes the results for the labelled sample of a folder of people."""
    predictions, digests = read_parts(photos.folder, len(photos))
    class_names = [os.fsencode(label_name(name)) for name in classes]
    read_blocks = partial(index_blocks, photos.index, photos.positions, predictions)
    votes = count_votes(read_blocks, class_names, output.rule.max_images, output.rule.seed,
                        person_folders(output.input_dir))
    write_results(votes, read_blocks, find_duplicates(photos, digests), output)
    photos.index.close()
    parts.close_parts(photos.folder)


# -------------------------------------------------------------------------- labelling the sample
class SampledPhotos:
    """Paths of the sampled photos of an index. folder holds the index and the finished parts."""

    def __init__(self, folder: Path, max_images: int, seed: int):
        self.folder, self.index = folder, PhotoIndex(folder)
        self.positions = sample_positions(index_blocks(self.index), max_images, seed)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, i: int) -> str:
        return self.index[int(self.positions[i])]

    def person(self, i: int) -> bytes:
        """The folder of photo i's person."""
        return os.fsencode(self.index.name(int(self.positions[i])).split("/")[0])


def open_sample(parser: cli.Parser, args: Namespace, folder: Path, rank: int) -> SampledPhotos:
    """The sample of every person's photos; rank 0 first indexes the photos or resumes a run."""
    flags = ("input_dir", "max_images", "seed", "align", "min_face_size", "max_side",
             "second_look", "batch_size")
    run_flags = {name: getattr(args, name) for name in flags} | {"ckpt": digest_file(args.ckpt)}
    parts.open_parts(parser, folder, run_flags, partial(index_people, args.input_dir), rank,
                     resume=args.resume, overwrite=args.overwrite)
    return SampledPhotos(folder, args.max_images, args.seed)


def index_people(input_dir: str, folder: Path) -> None:
    """Writes the index of all people's photos into a folder. Raises PartsError."""
    try:
        index = index_photos(folder, [input_dir])
    except InputError as error:
        raise parts.PartsError(f"--input_dir {error}") from None
    has_people = any("/" in index.name(i) for i in range(len(index)))
    index.close()
    if not has_people:
        raise parts.PartsError(f"--input_dir {input_dir}: no photo lies in a person's folder")


def label_sample(photos: SampledPhotos, checkpoint: Checkpoint, args: Namespace, rank: int,
                 world_size: int, device: torch.device) -> None:
    """Classifies this rank's chunks of the sample and writes a part for each chunk."""
    missing = parts.missing_parts(photos.folder, count_chunks(len(photos)), "npz")
    chunks = [missing[i] for i in rank_slice(len(missing), rank, world_size)]
    n_files = count_files(len(photos), chunks)
    loading = Loading(num_workers=decode_workers(args.num_workers, n_files, device),
                      max_side=args.max_side)
    classification = Classification(args.batch_size or network_batch_size(device))
    detector = None
    if args.align != "never":
        detector = load_detector(device, args.min_face_size, args.second_look)
    predictor = Predictor(checkpoint, device)
    with tqdm(total=n_files, unit=" photos", disable=rank != 0, smoothing=0.05) as bar:
        labelled = classify_photos(photos, predictor, detector, FacePolicy(align=args.align),
                                   loading, classification, chunks=chunks)
        for chunk, rows in labelled:
            write_part(parts.part_path(photos.folder, chunk, "npz"), rows, photos)
            bar.update(len(rows))
    photos.index.close()


def write_part(path: Path, rows: list[FaceRow], photos: SampledPhotos) -> None:
    """Writes the prediction and the digest of each photo of a chunk."""
    predictions = [int(row.probs.argmax()) if row.status == "ok" else NO_FACE for row in rows]
    digests = [digest_file(photos[row.position]) for row in rows]
    with atomic_write(path) as temporary_path, open(temporary_path, "wb") as file:
        np.savez(file, predictions=predictions, digests=np.array(digests, np.uint64))


def digest_file(path: str) -> int:
    """A 64-bit digest of a file's bytes; 0 if it cannot be read."""
    try:
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=8).digest()
    except OSError:
        return 0
    return int.from_bytes(digest, "little")


def read_parts(folder: Path, n_photos: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (n,) uint8 and digests (n,) uint64 of the sample."""
    predictions, digests = [], []
    for chunk in range(count_chunks(n_photos)):
        with np.load(parts.part_path(folder, chunk, "npz")) as part:
            predictions.append(part["predictions"])
            digests.append(part["digests"])
    return np.concatenate(predictions).astype(np.uint8), np.concatenate(digests)


def find_duplicates(photos: SampledPhotos, digests: np.ndarray) -> DuplicatePhotos:
    """Counts of byte-identical photos in two people's samples, who may be the same person."""
    values, counts = np.unique(digests, return_counts=True)
    people_of = defaultdict(set)
    for i in np.flatnonzero(np.isin(digests, values[(counts > 1) & (values != 0)])).tolist():
        people_of[int(digests[i])].add(photos.person(i))
    duplicates = defaultdict(Counter)
    for people in people_of.values():
        for person, other in itertools.permutations(sorted(people), 2):
            duplicates[person][other] += 1
    return duplicates


def person_folders(folder: str) -> list[bytes]:
    """Names of the people's folders, sorted, including folders without a photo."""
    with os.scandir(folder) as entries:
        return sorted(os.fsencode(entry.name) for entry in entries if entry.is_dir())


# --------------------------------------------------------------------------- writing the results
def write_results(votes: VoteTable, read_blocks: Callable[[], Iterator[PhotoBlock]],
                  duplicates: DuplicatePhotos, output: Output) -> None:
    """Applies the rule, writes all files of the output folder and prints the summary."""
    folder, decisions = output.folder, apply_rule(votes, output.rule)
    write_class_lists(folder / "estimated_ethnicities", votes, decisions)
    write_people(folder / "people.csv", votes, decisions, duplicates)
    n_images = write_train_list(folder / "train_list.csv", votes, decisions, read_blocks(),
                                output.input_dir)
    report = consensus_yield.yield_report(votes, decisions, n_images, duplicates, output.rule)
    with atomic_write(folder / "yield.json") as temporary_path:
        temporary_path.write_text(json.dumps(report, indent=1))
    consensus_yield.draw_votes(folder / "votes.png", votes, decisions, output.rule.threshold)
    consensus_yield.print_report(report, folder)


def write_class_lists(folder: Path, votes: VoteTable, decisions: Decisions) -> None:
    """Writes <class>.txt for every class, even an empty one. Newlines in ids become \\n and \\r."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.txt"):
        old.unlink()
    for c, name in enumerate(votes.classes):
        with (atomic_write(folder / f"{os.fsdecode(name)}.txt") as temporary_path,
              open(temporary_path, "wb") as file):
            for i in np.flatnonzero(decisions.labels == c).tolist():
                person = votes.person_ids[i]
                file.write(person.replace(b"\n", b"\\n").replace(b"\r", b"\\r") + b"\n")


def write_people(path: Path, votes: VoteTable, decisions: Decisions,
                 duplicates: DuplicatePhotos) -> None:
    """Writes people.csv, a row for every person, sorted by id."""
    names = [os.fsdecode(name) for name in votes.classes]
    header = ["id", "n_images", "n_used", "n_face", *(f"votes_{name}" for name in names), "share",
              "decision", "reason"]
    numbers = np.column_stack([votes.n_images, votes.n_sampled, votes.n_faces, votes.counts])
    with atomic_write(path) as temporary_path, open(
            temporary_path, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.write(",".join(header) + "\n")
        for first in range(0, len(votes.person_ids), 100_000):
            rows = slice(first, first + 100_000)
            columns = (numbers, decisions.share, decisions.labels, decisions.reasons)
            for person, counts, share, label, reason in zip(
                    votes.person_ids[rows], *(c[rows].tolist() for c in columns), strict=True):
                decision = names[label] if label >= 0 else ""
                text = REASONS[reason]
                if person in duplicates:
                    text = "; ".join(filter(None, (text, describe_duplicates(duplicates[person]))))
                file.write(f"{quote_cell(os.fsdecode(person))},{','.join(map(str, counts))},"
                           f"{share:.4f},{decision},{quote_cell(text)}\n")


def describe_duplicates(counts: Counter) -> str:
    """The people with whom a person shares identical photos."""
    return "; ".join(f"{n} pictures identical to those of {os.fsdecode(other)}"
                     for other, n in sorted(counts.items()))


def write_train_list(path: Path, votes: VoteTable, decisions: Decisions,
                     blocks: Iterator[PhotoBlock], input_dir: str | None) -> list[int]:
    """Writes train_list.csv in the order of the photos; returns the number of each class.

    It holds all photos of the people kept, except classified photos without a face.
    """
    root = os.fsencode(os.path.abspath(input_dir)) + b"/" if input_dir else b""
    tails = [b"," + quote_bytes(name) + b"\n" for name in votes.classes]
    counts = np.zeros(len(tails), np.int64)
    with atomic_write(path) as temporary_path, open(temporary_path, "wb") as file:
        file.write(b"image,class\n")
        for block in blocks:
            people = number_people(block, votes.person_index)
            labels = np.where(people >= 0, decisions.labels[people], -1)
            listed = np.flatnonzero((labels >= 0) & (block.predictions != NO_FACE))
            counts += np.bincount(labels[listed], minlength=len(tails))
            text = block.text.tobytes()
            images = [root + text[start:end] for start, end in zip(
                block.starts[listed].tolist(), block.ends[listed].tolist(), strict=True)]
            if any(mark in b"".join(images) for mark in b',"\r\n'):
                images = [quote_bytes(image) for image in images]
            file.write(b"".join([image + tails[c] for image, c in zip(
                images, labels[listed].tolist(), strict=True)]))
    return counts.tolist()


def quote_bytes(cell: bytes) -> bytes:
    """A cell of a CSV file, whose bytes need not be valid UTF-8."""
    text = quote_cell(cell.decode("utf-8", "surrogateescape"))
    return text.encode("utf-8", "surrogateescape")


if __name__ == "__main__":
    run_command(main, "--resume finishes the run")
