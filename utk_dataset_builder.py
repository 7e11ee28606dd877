"""UTKFace chips -> a labelled set of aligned faces in stratified splits without leakage.

    python utk_dataset_builder.py --input_dir data/UTKFace --output_dir data/utk_races
    python utk_dataset_builder.py --input_dir UTKFace.tar.gz --split_csv utk_seed_split.csv \\
        --output_dir data/utk_published

Reads the folder of UTKFace "aligned & cropped" chips, or the archive as downloaded (.tar, .tar.gz,
.tgz, .zip), whose file names are age_gender_race_date. Writes to the output folder:
  {train,val,test}/{0,1,2,3}/*.jpg   crops of the whole template; with --no_align the chips
  faceset.json                       classes, template, resolution, kind of split, counts
  manifest.csv                       a row for each picture, with its group of near-duplicates
  label_conflicts.csv                groups of near-duplicates whose labels disagree
  skipped.csv                        files that could not be used, with the reason
  {train,val,test}_dist.png          number of pictures of each class

Near-duplicates form a group, and a group lies in one split. A group whose labels disagree has no
true label, so it is left out of all splits. With --split_csv the listed split is used as it is:
groups may be divided, and label conflicts stay in.
"""
import argparse
import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from models.data.archives import ARCHIVES, ArchiveError, folder_of_source
from models.data.decoding import PhotoError, decode_photo
from models.data.duplicates import FINGERPRINT_MAX_SIDE, group_duplicate_files
from models.data.faceset import SPLITS
from models.data.group_splits import split_groups
from models.data.utk import (
    CLASSES,
    Chip,
    ChipCollection,
    SplitListError,
    UtkError,
    collect_chips,
    read_split_list,
)
from models.faces.align import TEMPLATE, TEMPLATE_SIZE, WHOLE_TEMPLATE
from models.faces.pipeline import AlignedBatch, FacePolicy, Loading, ViewSpec, align_photos
from models.faces.second_look import load_detector
from models.running import cli
from models.running.command import run_command
from models.running.locks import LockedError, acquire_lock, release_lock
from models.running.threads import OrderedThreadPool

RATIOS = (0.6, 0.2, 0.2)        # train, val, test
SEED = 101
OUT_RES = 224                   # about a chip's own resolution: the template's 112 would halve it
MIN_FACE_SIZE = 40              # pixels; a chip's face is about 100 wide
BATCH_SIZE = 64                 # fixed: the batch may change the last bit of a landmark


class OutputError(Exception):
    """An output folder that cannot be written; the message says why."""


def build_parser() -> cli.Parser:
    """All flags and their defaults."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_input_dir(parser, f"folder of chips, or an archive: {', '.join(ARCHIVES)} "
                      "(%(default)s)", default="data/UTKFace")
    cli.add_output_dir(parser, "folder of the data set", default="data/utk_races")
    add("--split_csv", metavar="FILE",
        help="CSV with the columns file, split, label: use this split instead of drawing one")
    add("--ratios", type=cli.fraction, nargs=3, default=RATIOS, metavar=("TRAIN", "VAL", "TEST"),
        help="shares of the drawn splits (%(default)s)")
    cli.add_seed(parser, SEED, "seed of the drawn splits")
    add("--out_res", type=cli.positive_int, default=OUT_RES, metavar="PX",
        help="size of a crop in pixels (%(default)s)")
    add("--no_align", action="store_true", help="copy the chips as they are")
    cli.add_num_workers(parser, "decoding processes; 0 decodes in the threads that align and "
                        "encode. The result is the same for any number (%(default)s)", default=0)
    cli.add_second_look(parser)
    cli.add_device(parser, default="cpu")
    add("--vis_dir", metavar="DIR", help="folder for the plots (the output folder)")
    cli.add_overwrite(parser, "replace a finished data set")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Source -> chips -> groups and crops -> splits -> files."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_flags(parser, args)
    try:
        split_list = read_split_list(Path(args.split_csv)) if args.split_csv else None
        with replaced_folder(Path(args.output_dir)) as partial:
            with folder_of_source(Path(args.input_dir), partial) as source:
                collection = collect_chips(source, split_list)
                groups = find_groups(source, collection, cli.worker_count())
                failures = write_chips(source, collection.chips, partial / "staged",
                                       crop_settings(args))
            groups = drop_failures(collection, groups, failures)
            if split_list is None:
                labels = [chip.label for chip in collection.chips]
                splits = split_groups(labels, groups, args.ratios, args.seed)
                for chip, split in zip(collection.chips, splits, strict=True):
                    chip.split = split
            counts = write_faceset(partial, collection, groups, faceset_json(args))
            plot_folder = Path(args.vis_dir) if args.vis_dir else partial
            plot_distributions(counts, plot_folder)
    except (UtkError, ArchiveError) as error:
        parser.error(f"--input_dir {args.input_dir}: {error}")
    except SplitListError as error:
        parser.error(f"--split_csv {error}")
    except OutputError as error:
        parser.error(f"--output_dir {args.output_dir}: {error}")
    print_summary(collection, groups, args.output_dir, is_listed=split_list is not None)


def check_flags(parser: cli.Parser, args: argparse.Namespace) -> None:
    """Ends with a one-line error where the flags or the output folder alone show a mistake."""
    if abs(sum(args.ratios) - 1) > 1e-6:
        parser.error(f"--ratios {' '.join(map(str, args.ratios))}: must sum to 1, they sum to "
                     f"{sum(args.ratios):g}")
    output_dir = Path(args.output_dir)
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not (output_dir / "faceset.json").is_file():
            parser.error(f"--output_dir {output_dir}: is not empty and not a data set of this "
                         "command; choose another folder")
        if not args.overwrite:
            parser.error(f"--output_dir {output_dir}: a finished data set exists; --overwrite "
                         "replaces it")
    elif output_dir.exists() and not output_dir.is_dir():
        parser.error(f"--output_dir {output_dir}: is a file")
    if Path(args.input_dir).resolve().is_relative_to(output_dir.resolve()):
        parser.error(f"--input_dir {args.input_dir}: lies inside --output_dir {output_dir}")
    if args.vis_dir:
        cli.output_folder(parser, "--vis_dir", args.vis_dir)


# -------------------------------------------------------------------------------- chips to groups
def find_groups(source: Path, collection: ChipCollection, num_workers: int) -> list[list[int]]:
    """Groups of near-duplicates: lists of positions in collection.chips; singles too."""
    paths = [str(source / chip.file) for chip in collection.chips]
    return group_duplicate_files(paths, num_workers, "near-duplicates")


def drop_failures(collection: ChipCollection, groups: list[list[int]],
                  failures: dict[int, str]) -> list[list[int]]:
    """Moves unreadable chips to collection.skipped; the groups of the others, renumbered.

    Groups of two and more are numbered from 1 in chip.group. Raises UtkError without any chip left.
    """
    chips = collection.chips
    collection.skipped += [(chips[position].file, reason) for position, reason in failures.items()]
    readable = [position for position in range(len(chips)) if position not in failures]
    if not readable:
        reason = next(iter(failures.values()))
        raise UtkError(f"none of {len(chips)} pictures can be read ({reason})")
    collection.chips = [chips[position] for position in readable]
    new_position = {position: i for i, position in enumerate(readable)}
    groups = [[new_position[i] for i in group if i in new_position] for group in groups]
    groups = [group for group in groups if group]
    number_groups(collection.chips, groups)
    return groups


def number_groups(chips: list[Chip], groups: list[list[int]]) -> None:
    """Numbers the groups of two and more chips in chip.group, from 1."""
    for number, group in enumerate((group for group in groups if len(group) > 1), 1):
        for i in group:
            chips[i].group = number


# --------------------------------------------------------------------------------- chips to crops
@dataclass(frozen=True)
class CropSettings:
    """How chips are written: the size of a crop in pixels, None for chips as they are."""
    out_res: int | None
    num_workers: int
    device: torch.device
    second_look: bool


def crop_settings(args: argparse.Namespace) -> CropSettings:
    """The settings of the flags."""
    return CropSettings(None if args.no_align else args.out_res, args.num_workers, args.device,
                        args.second_look)


def write_chips(source: Path, chips: list[Chip], folder: Path,
                settings: CropSettings) -> dict[int, str]:
    """Writes the crop of every readable chip to folder/<name> and sets chip.aligned_by.

    Returns the reasons of the others by position.
    """
    folder.mkdir()
    failures: dict[int, str] = {}
    with tqdm(total=len(chips), desc="chips", unit=" chips", smoothing=0.05) as bar:
        if settings.out_res is None:
            for position, reason in copy_chips(source, chips, folder):
                bar.update()
                if reason:
                    failures[position] = reason
            return failures
        for batch in align_chips(source, chips, folder, settings.out_res, settings):
            for row in batch.rows:
                chips[row.position].aligned_by = row.aligned_by
            failures |= {row.position: row.error for row in batch.failures}
            bar.update(len(batch.rows) + len(batch.failures))
    return failures


def align_chips(source: Path, chips: list[Chip], folder: Path, out_res: int,
                settings: CropSettings) -> Iterator[AlignedBatch]:
    """Aligned batches of all chips, whose crops are written."""
    paths = [str(source / chip.file) for chip in chips]
    detector = load_detector(settings.device, MIN_FACE_SIZE, settings.second_look)
    with OrderedThreadPool(settings.device) as pool:
        aligned = align_photos(
            paths, detector, ViewSpec(WHOLE_TEMPLATE, out_res),
            FacePolicy("central", "mean_landmarks", "always"),
            Loading(BATCH_SIZE, settings.num_workers, FINGERPRINT_MAX_SIDE), pool=pool)
        yield from pool.ordered_map(lambda batch: save_crops(batch, chips, folder), aligned)


def save_crops(batch: AlignedBatch, chips: list[Chip], folder: Path) -> AlignedBatch:
    """Writes the crops of a batch as JPEG files of quality 95, 4:4:4; returns the batch."""
    crops = batch.views.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    for position, crop in zip(batch.positions(), crops, strict=True):
        Image.fromarray(crop).save(folder / chips[position].name, quality=95, subsampling=0)
    return batch


def copy_chips(source: Path, chips: list[Chip], folder: Path) -> Iterator[tuple[int, str]]:
    """Copies the chips that can be decoded; (position, reason), '' for those that were copied."""
    def copy(position: int) -> tuple[int, str]:
        try:
            data = (source / chips[position].file).read_bytes()
            decode_photo(data, FINGERPRINT_MAX_SIDE)
        except (PhotoError, OSError) as error:
            return position, str(error)
        (folder / chips[position].name).write_bytes(data)
        return position, ""

    with OrderedThreadPool(torch.device("cpu")) as pool:
        yield from pool.ordered_map(copy, range(len(chips)))


# --------------------------------------------------------------------------------- crops to files
def faceset_json(args: argparse.Namespace) -> dict:
    """What faceset.json states about the flags."""
    return {"classes": CLASSES, "template": TEMPLATE, "template_size": TEMPLATE_SIZE,
            "out_res": None if args.no_align else args.out_res, "aligned": not args.no_align,
            "ratios": None if args.split_csv else args.ratios,
            "seed": None if args.split_csv else args.seed,
            "split": Path(args.split_csv).name if args.split_csv else "leak-free"}


def write_faceset(partial: Path, collection: ChipCollection, groups: list[list[int]],
                  about: dict) -> dict[str, dict[str, int]]:
    """Moves the staged crops into their splits and writes the lists.

    Returns the number of pictures by split and class.
    """
    chips = collection.chips
    for split in SPLITS:
        for label in range(len(CLASSES)):
            (partial / split / str(label)).mkdir(parents=True)
    used_chips = [chip for chip in chips if chip.split]
    for chip in used_chips:
        os.rename(partial / "staged" / chip.name, partial / crop_file(chip))
    shutil.rmtree(partial / "staged")
    write_csv(partial / "manifest.csv",
              ("file", "split", "label", "class", "age", "gender", "aligned_by",
               "duplicate_group"),
              [(crop_file(chip), chip.split, chip.label, CLASSES[chip.label], chip.age, chip.gender,
                chip.aligned_by, chip.group or "") for chip in used_chips])
    write_csv(partial / "label_conflicts.csv",
              ("duplicate_group", "file", "split", "label", "class"),
              [(chip.group, chip.name, chip.split or "none", chip.label, CLASSES[chip.label])
               for group in label_conflicts(chips, groups)
               for chip in (chips[i] for i in group)])
    write_csv(partial / "skipped.csv", ("file", "reason"), sorted(collection.skipped))
    n_pictures = Counter((chip.split, chip.label) for chip in chips)
    counts = {split: {name: n_pictures[split, i] for i, name in enumerate(CLASSES)}
              for split in SPLITS}
    (partial / "faceset.json").write_text(json.dumps(about | {"counts": counts}, indent=1) + "\n")
    return counts


def crop_file(chip: Chip) -> str:
    """Path of a chip of a split below the folder of the data set."""
    return f"{chip.split}/{chip.label}/{chip.name}"


def label_conflicts(chips: list[Chip], groups: list[list[int]]) -> list[list[int]]:
    """The groups whose labels disagree."""
    return [group for group in groups if len({chips[i].label for i in group}) > 1]


def write_csv(path: Path, header: tuple, rows: list[tuple]) -> None:
    """A CSV file with a header."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` if the block succeeds.

    It is removed if the block fails. Raises OutputError where it cannot be made.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    lock = folder.with_name(f".{folder.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        acquire_lock(lock)
        shutil.rmtree(partial, ignore_errors=True)          # of a run that was killed
        partial.mkdir()
    except LockedError as error:
        raise OutputError(str(error)) from None
    except OSError as error:
        raise OutputError(f"cannot write there ({error.strerror})") from None
    try:
        yield partial
        old = folder.with_name(f"{folder.name}.old")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(folder, old)
        os.rename(partial, folder)
        if old.exists():
            shutil.rmtree(old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        release_lock(lock)


def plot_distributions(counts: dict[str, dict[str, int]], folder: Path) -> None:
    """<split>_dist.png for each split."""
    from models.reports.plots import draw_class_distribution  # matplotlib is slow to import

    for split, class_counts in counts.items():
        draw_class_distribution(class_counts, split, folder / f"{split}_dist.png")


def print_summary(collection: ChipCollection, groups: list[list[int]], output_dir: str,
                  is_listed: bool) -> None:
    """Prints counts by split and class, kinds of alignment, near-duplicates and omissions."""
    chips = collection.chips
    print(f"{'':6}" + "".join(f"{name:>9}" for name in (*CLASSES, "all")))
    for split in SPLITS:
        n_pictures = Counter(chip.label for chip in chips if chip.split == split)
        counts = [n_pictures[i] for i in range(len(CLASSES))]
        print(f"{split:6}" + "".join(f"{n:9,}" for n in (*counts, sum(counts))))
    several = [group for group in groups if len(group) > 1]
    conflicts = label_conflicts(chips, groups)
    kinds = Counter(chip.aligned_by for chip in chips if chip.split)
    print(f"aligned by landmarks {kinds['mtcnn']:,}, by the mean landmarks "
          f"{kinds['template']:,}, not aligned {kinds['none']:,}")
    print(f"near-duplicates: {len(several):,} groups of {sum(map(len, several)):,} pictures; "
          f"labels disagree in {len(conflicts):,} groups of {sum(map(len, conflicts)):,}, "
          f"{'kept as listed' if is_listed else 'left out'}")
    listed = (f", {collection.n_unlisted:,} not in --split_csv; {collection.n_absent:,} of its "
              "files are not in --input_dir") if is_listed else ""
    print(f"left out: {collection.n_others:,} of race 4 (others), {len(collection.skipped):,} "
          f"skipped (see skipped.csv){listed}")
    print(f"wrote {output_dir}")


if __name__ == "__main__":
    run_command(main, "run the command again")
