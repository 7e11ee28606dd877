"""UTKFace chips -> a labelled set of aligned faces in leak-free, stratified splits.

    python utk_dataset_builder.py --src data/UTKFace --dst data/utk_races
    python utk_dataset_builder.py --src UTKFace.tar.gz --split_csv utk_seed_split.csv --dst data/utk_published

Reads the folder of UTKFace "aligned & cropped" chips, or the archive as downloaded (.tar, .tar.gz, .tgz, .zip), whose
file names are age_gender_race_date. Writes below --dst

    {train,val,test}/{0,1,2,3}/*.jpg   crops of the whole template, or with --no_align the chips untouched
    faceset.json                       classes, template, resolution, how it was split, counts
    manifest.csv                       a row for every picture, with the group of near-identical ones it belongs to
    label_conflicts.csv                groups of near-identical pictures that carry different labels
    skipped.csv                        files that could not be used, with the reason

and visualizations/{train,val,test}_dist.png. Near-identical pictures form a group, and a group lies in one split. A
group whose labels disagree has no true label that could be trained on or tested against: all of it is set aside, out
of train, val and test. With --split_csv the listed split is taken as it is, groups divided and conflicts kept.
"""
import csv
import json
import os
import re
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models.data.batches import collate_photos
from models.data.decoding import IMAGE_TYPES, PhotoError, decode_photo
from models.data.duplicates import FINGERPRINT_MAX_SIDE, Fingerprints, group_near_duplicates
from models.data.faceset import SPLITS
from models.data.listing import walk_images
from models.faces.align import CHIP_LANDMARKS, TEMPLATE, TEMPLATE_SIZE, WHOLE_TEMPLATE, align_faces
from models.faces.labelled import most_central_face
from models.faces.mtcnn import MTCNN
from models.running.cli import Parser, fraction, non_negative_int, output_folder, positive_int, worker_count
from models.running.files import atomic_write

SRC = "data/UTKFace"
DST = "data/utk_races"
RATIOS = (0.6, 0.2, 0.2)        # train, val, test
SEED = 101

CLASSES = ("White", "Black", "Asian", "Indian")
OTHERS = 4                      # UTKFace's fifth race, "others", names no group of people: left out
OUT_RES = 224                   # about a chip's own resolution: the template's 112 would halve it
MIN_FACE_SIZE = 40              # a chip's face is about 100 px wide
BATCH_SIZE = 64                 # fixed, as its composition may move the last bit of a landmark
ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip")
# What unpacking a damaged archive raises; RuntimeError: an encrypted zip, or one packed in a way zipfile does not know.
BROKEN = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


class SourceError(Exception):
    """A source, list or destination that cannot be used: the flag at fault and the reason."""


@dataclass
class Chip:
    """A usable picture of the source: where it lies, what its name says, and what is found out about it."""
    file: str                   # below the source's folder, '/'-separated
    name: str                   # of the file to write, unique
    age: int
    gender: int                 # 0 male, 1 female
    label: int                  # position in CLASSES
    split: str = ""             # '' while undecided, and in the end where set aside
    group: int = 0              # number of its group of near-identical pictures, 0 for a picture alone
    aligned_by: str = "none"    # 'mtcnn', 'template' or 'none'


@dataclass
class Collection:
    """What a source holds."""
    chips: list[Chip] = field(default_factory=list)                         # sorted by name
    skipped: list[tuple[str, str]] = field(default_factory=list)            # file, reason
    n_others: int = 0
    n_unlisted: int = 0                                                     # not in --split_csv
    n_absent: int = 0                                                       # in --split_csv alone


def parse_args(argv=None):
    """The command line; values are checked here."""
    parser = Parser(__doc__)
    parser.add_argument("--src", default=SRC, help="folder of chips, or .tar, .tar.gz, .tgz, .zip (%(default)s)")
    parser.add_argument("--dst", default=DST, help="folder to write (%(default)s)")
    parser.add_argument("--split_csv", help="list with columns file, split, label to follow instead of drawing a split")
    parser.add_argument("--ratios", type=fraction, nargs=3, default=RATIOS, metavar=("TRAIN", "VAL", "TEST"),
                        help="shares of the drawn splits (%(default)s)")
    parser.add_argument("--seed", type=non_negative_int, default=SEED, help="of the drawn splits (%(default)s)")
    parser.add_argument("--out_res", type=positive_int, default=OUT_RES, help="side of a crop in pixels (%(default)s)")
    parser.add_argument("--no_align", action="store_true", help="copy the chips untouched")
    parser.add_argument("--workers", type=non_negative_int, default=worker_count(),
                        help="processes that align and encode; the result is that of any number (%(default)s)")
    parser.add_argument("--vis_dir", default="visualizations", help="folder for the plots (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished --dst")
    args = parser.parse_args(argv)
    if abs(sum(args.ratios) - 1) > 1e-6:
        parser.error(f"--ratios {' '.join(map(str, args.ratios))}: must sum to 1, they sum to {sum(args.ratios):g}")
    check_destination(parser, args)
    args.vis_dir = output_folder(parser, "--vis_dir", args.vis_dir)
    return parser, args


def check_destination(parser: Parser, args) -> None:
    """One-line errors where --dst is taken, is not ours to replace, or holds the source."""
    dst = Path(args.dst)
    if dst.is_dir() and any(dst.iterdir()):
        if not (dst / "faceset.json").is_file():
            parser.error(f"--dst {dst}: is there and is no finished data set of this command; choose another folder")
        if not args.overwrite:
            parser.error(f"--dst {dst}: a finished data set is there already; --overwrite replaces it")
    elif dst.exists() and not dst.is_dir():
        parser.error(f"--dst {dst}: is a file")
    if Path(args.src).resolve().is_relative_to(dst.resolve()):
        parser.error(f"--src {args.src}: lies inside --dst {dst}")


def main(argv=None) -> int:
    """Source -> chips -> crops and groups -> splits -> files."""
    parser, args = parse_args(argv)
    try:
        listed = read_split_csv(Path(args.split_csv)) if args.split_csv else None
        with new_folder(Path(args.dst)) as partial:
            with source_folder(Path(args.src), partial) as source:
                found = collect_chips(source, listed)
                groups = process_chips(source, found, partial / "staged", None if args.no_align else args.out_res,
                                       args.workers)
            if listed is None:
                split_groups(found.chips, groups, args.ratios, args.seed)
            about = write_faceset(partial, found, groups, args)
    except SourceError as error:
        parser.error(str(error))
    plot_distributions(about["counts"], args.vis_dir)
    report(args, found, groups)
    return 0


# Source -> chips

@contextmanager
def source_folder(src: Path, partial: Path) -> Iterator[Path]:
    """The source as a folder; an archive is unpacked below `partial` and removed in the end."""
    if src.is_dir():
        yield src
        return
    if not src.is_file():
        raise SourceError(f"--src {src}: no such folder or archive")
    if not src.name.lower().endswith(ARCHIVES):
        raise SourceError(f"--src {src}: wants a folder or a file of {', '.join(ARCHIVES)}")
    unpacked = partial / "unpacked"
    unpacked.mkdir()
    try:
        for name, data in archive_pictures(src):
            target = unpacked.joinpath(*name.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    except BROKEN as error:
        raise SourceError(f"--src {src}: cannot be unpacked ({error})") from None
    yield unpacked
    shutil.rmtree(unpacked)


def archive_pictures(src: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    """(path, bytes) of the pictures in an archive. Links and paths that lead out of the archive are left out."""
    if src.name.lower().endswith(".zip"):
        with zipfile.ZipFile(src) as archive:
            for member in archive.infolist():
                name = PurePosixPath(member.filename)
                if is_plain_picture(name):
                    yield name, archive.read(member)
        return
    with tarfile.open(src) as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if member.isfile() and is_plain_picture(name):
                yield name, archive.extractfile(member).read()


def is_plain_picture(name: PurePosixPath) -> bool:
    """Whether an archive's member is a picture whose path stays inside the folder it is unpacked into."""
    inside = not name.is_absolute() and not any(part == ".." or re.search(r"[\\:\0]", part) for part in name.parts)
    return inside and name.name.lower().endswith(IMAGE_TYPES)


def parse_utk_name(name: str) -> tuple[int, int, int] | str:
    """Age, gender and race of a file name age_gender_race_date..., or the reason why it has none."""
    fields = name.split("_")
    if len(fields) != 4:
        return f"malformed name: wants age_gender_race_date, has {len(fields)} of the 4 fields"
    for title, text, top in zip(("age", "gender", "race"), fields, (130, 1, OTHERS), strict=False):
        if not (text.isascii() and text.isdecimal() and int(text) <= top):
            return f"malformed name: {title} wants 0 to {top}, has {text!r}"
    age, gender, race = map(int, fields[:3])
    return age, gender, race


def collect_chips(source: Path, listed: dict[str, tuple[str, int]] | None) -> Collection:
    """The chips of a folder, or those of them that a --split_csv lists; what is left out, and why."""
    found, taken = Collection(), {}
    for file in walk_images(source):
        base = file.rsplit("/", 1)[-1]
        parsed = parse_utk_name(base)
        name = base[:base.rindex(".")] + ".jpg"
        if isinstance(parsed, str):
            found.skipped.append((file, parsed))
        elif parsed[2] == OTHERS:
            found.n_others += 1
        elif name.lower() in taken:
            found.skipped.append((file, f"same name as {taken[name.lower()]}"))
        elif listed is not None and base not in listed:
            found.n_unlisted += 1
        else:
            taken[name.lower()] = file
            found.chips.append(Chip(file, name, *parsed))
    if listed is not None:
        follow_split(found, listed)
    if not found.chips:
        raise SourceError(f"--src {source}: no chip named age_gender_race_date.jpg of races 0 to 3 is there"
                          + (" that --split_csv lists" if found.n_unlisted else ""))
    found.chips.sort(key=lambda chip: chip.name)
    return found


def read_split_csv(path: Path) -> dict[str, tuple[str, int]]:
    """file -> (split, label) of a list with the columns file, split, label."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:          # spreadsheets write a byte order mark
            reader = csv.DictReader(file)
            if not {"file", "split", "label"} <= set(reader.fieldnames or ()):
                raise SourceError(f"--split_csv {path}: wants the columns file, split, label, has {reader.fieldnames}")
            listed = {row["file"]: (row["split"], int(row["label"])) for row in reader}
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"--split_csv {path}: {error}") from None
    odd = next((f"{name}: {split!r}" for name, (split, _) in listed.items() if split not in SPLITS), None)
    if odd:
        raise SourceError(f"--split_csv {path}: a split is one of {', '.join(SPLITS)}, not as in {odd}")
    return listed


def follow_split(found: Collection, listed: dict[str, tuple[str, int]]) -> None:
    """Gives each chip the split that the list says; a label that contradicts the file name is an error."""
    for chip in found.chips:
        chip.split, label = listed[os.path.basename(chip.file)]
        if label != chip.label:
            raise SourceError(f"--split_csv: label {label} of {chip.file} contradicts the file's name")
    found.n_absent = len(listed) - len(found.chips)


# Chips -> crops, thumbnails, groups

@dataclass
class DoneBatch:
    """What a worker says of a batch whose crops it has written."""
    positions: list[int]                # of those written
    missed: list[int]                   # of those without a detected face, still to be written
    landmark_sum: np.ndarray            # (5, 2) float64, of those with a detected face, relative to the picture's size
    prints: Fingerprints                # of those decoded
    failures: dict[int, str]            # position -> reason


class ChipBatches(Dataset):
    """Items are batches of chips, each decoded, aligned, encoded and written within one worker process.

    Whole chips stay in one process on one thread: small networks on small batches gain more from a core each than
    from sharing two, and only the outcome crosses between processes. With `landmarks` (5, 2), relative to a picture's
    size, nothing is detected and all chips are placed by them. out_res None copies the files untouched.
    """

    def __init__(self, source: Path, chips: list[Chip], positions: list[int], folder: Path, out_res: int | None,
                 landmarks: Tensor | None = None):
        self.source, self.chips, self.positions, self.folder = source, chips, positions, folder
        self.out_res, self.landmarks = out_res, landmarks
        self.detector = MTCNN(min_face_size=MIN_FACE_SIZE)

    def __len__(self) -> int:
        return -(-len(self.positions) // BATCH_SIZE)

    def __getitem__(self, batch: int) -> DoneBatch:
        done = DoneBatch([], [], np.zeros((5, 2)), Fingerprints(), {})
        photos = {}
        for position in self.positions[batch * BATCH_SIZE:(batch + 1) * BATCH_SIZE]:
            try:
                data = (self.source / self.chips[position].file).read_bytes()
                photos[position], _ = decode_photo(data, FINGERPRINT_MAX_SIDE)
            except (PhotoError, OSError) as error:
                done.failures[position] = str(error)
                continue
            done.prints.add(position, data, photos[position])
            if self.out_res is None:
                (self.folder / self.chips[position].name).write_bytes(data)
                done.positions.append(position)
        if photos and self.out_res is not None:
            self.write_crops(photos, done)
        return done

    def write_crops(self, photos: dict[int, Tensor], done: DoneBatch) -> None:
        """Aligns decoded chips and writes the crops of those whose landmarks are known."""
        positions = list(photos)
        images, sizes = collate_photos(list(photos.values()))
        index, landmarks = self.find_landmarks(images, sizes)
        extents = sizes[index].flip(1)[:, None]                                     # (n, 1, 2) width, height
        done.landmark_sum += (landmarks.double() / extents).sum(0).numpy()
        crops = align_faces(images, sizes, index, landmarks, WHOLE_TEMPLATE, self.out_res)
        done.positions += [positions[i] for i in index.tolist()]
        done.missed += sorted(set(positions) - set(done.positions))
        for position, crop in zip(done.positions, crops.permute(0, 2, 3, 1).numpy(), strict=True):
            Image.fromarray(crop).save(self.folder / self.chips[position].name, quality=95, subsampling=0)

    def find_landmarks(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Which pictures of a batch are placed, (n,) int64, and by which landmarks, (n, 5, 2) float32."""
        if self.landmarks is not None:
            return torch.arange(len(sizes)), (self.landmarks * sizes.flip(1)[:, None]).float()
        faces = self.detector.detect(images, sizes)
        rows = most_central_face(faces, sizes)
        index = (rows >= 0).nonzero()[:, 0]
        return index, faces.landmarks[rows[index]]


def process_chips(source: Path, found: Collection, folder: Path, out_res: int | None,
                  workers: int) -> list[list[int]]:
    """Writes every readable chip's crop to folder/<name> and returns the groups of near-identical chips.

    Unreadable chips move from found.chips to found.skipped. Groups are lists of positions in found.chips.
    """
    folder.mkdir()
    chips, prints, failures, missed = found.chips, Fingerprints(), {}, []
    landmark_sum, n_found = np.zeros((5, 2)), 0
    for done in run_batches(ChipBatches(source, chips, list(range(len(chips))), folder, out_res), workers, "chips"):
        for position in done.positions:
            chips[position].aligned_by = "none" if out_res is None else "mtcnn"
        landmark_sum += done.landmark_sum
        n_found += len(done.positions)
        missed += done.missed
        prints.extend(done.prints)
        failures.update(done.failures)
    mean = torch.from_numpy(landmark_sum / n_found) if n_found else torch.tensor(CHIP_LANDMARKS).double() / 200
    if missed:
        batches = ChipBatches(source, chips, missed, folder, out_res, mean)
        for done in run_batches(batches, workers, "chips without a face"):
            for position in done.positions:
                chips[position].aligned_by = "template"
    found.skipped += [(chips[position].file, reason) for position, reason in failures.items()]
    found.chips = [chips[position] for position in prints.positions]
    if not found.chips:
        raise SourceError(f"--src: not one of {len(chips)} pictures can be read ({next(iter(failures.values()))})")
    return group_chips(found.chips, prints)


def run_batches(batches: ChipBatches, workers: int, title: str) -> Iterator[DoneBatch]:
    """The outcomes of all batches, in order, with a progress bar; in `workers` processes of one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tqdm(total=len(batches.positions), desc=title, unit=" chips", smoothing=0.05) as bar:
            for done in DataLoader(batches, batch_size=None, num_workers=min(workers, len(batches))):
                yield done
                bar.update(len(done.prints.positions) + len(done.failures))
    finally:
        torch.set_num_threads(threads)


def group_chips(chips: list[Chip], prints: Fingerprints) -> list[list[int]]:
    """Groups of near-identical chips, as group_near_duplicates gives them; numbers those of two and more in chip.group, from 1."""
    groups = group_near_duplicates(prints)
    for number, group in enumerate((group for group in groups if len(group) > 1), 1):
        for i in group:
            chips[i].group = number
    return groups


# Groups -> splits -> files

def split_groups(chips: list[Chip], groups: list[list[int]], ratios: tuple, seed: int) -> None:
    """Draws chip.split: class by class exact to rounding, a group never divided, groups with two labels left without.

    Large groups are dealt first, each to a split with probability in proportion to the room left in it.
    """
    rng = np.random.default_rng(seed)
    by_label: dict[int, list[list[int]]] = {}
    for group in groups:
        labels = {chips[i].label for i in group}
        if len(labels) == 1:
            by_label.setdefault(labels.pop(), []).append(group)
    for label in sorted(by_label):
        own = by_label[label]
        room = np.array(split_sizes(sum(map(len, own)), ratios))
        for k in sorted(rng.permutation(len(own)).tolist(), key=lambda k: -len(own[k])):
            fits = np.where(room >= len(own[k]), room, 0)
            weights = fits if fits.any() else room                  # too large for any: where most is left
            split = int(rng.choice(len(SPLITS), p=weights / weights.sum())) if fits.any() else int(room.argmax())
            room[split] -= len(own[k])
            for i in own[k]:
                chips[i].split = SPLITS[split]


def split_sizes(n: int, ratios: tuple) -> list[int]:
    """n divided by ratios into whole numbers that sum to n, each within one of its share; the largest rests win."""
    shares = [n * ratio for ratio in ratios]
    sizes = [int(share + 1e-9) for share in shares]
    for i in sorted(range(len(ratios)), key=lambda i: sizes[i] - shares[i])[:n - sum(sizes)]:
        sizes[i] += 1
    return sizes


def write_faceset(partial: Path, found: Collection, groups: list[list[int]], args) -> dict:
    """Moves the staged crops into their splits and writes the lists; returns what faceset.json says."""
    for split in SPLITS:
        for label in range(len(CLASSES)):
            (partial / split / str(label)).mkdir(parents=True)
    for chip in found.chips:
        if chip.split:
            os.rename(partial / "staged" / chip.name, partial / file_of(chip))
    shutil.rmtree(partial / "staged")
    write_csv(partial / "manifest.csv",
              ("file", "split", "label", "class", "age", "gender", "aligned_by", "duplicate_group"),
              [(file_of(chip), chip.split, chip.label, CLASSES[chip.label], chip.age, chip.gender, chip.aligned_by,
                chip.group or "") for chip in found.chips if chip.split])
    write_csv(partial / "label_conflicts.csv", ("duplicate_group", "file", "split", "label", "class"),
              [(chip.group, chip.name, chip.split or "none", chip.label, CLASSES[chip.label])
               for group in conflicts(found.chips, groups) for chip in (found.chips[i] for i in group)])
    write_csv(partial / "skipped.csv", ("file", "reason"), sorted(found.skipped))
    counted = Counter((chip.split, chip.label) for chip in found.chips)
    about = {"classes": CLASSES, "template": TEMPLATE, "template_size": TEMPLATE_SIZE,
             "out_res": None if args.no_align else args.out_res, "aligned": not args.no_align,
             "ratios": None if args.split_csv else args.ratios, "seed": None if args.split_csv else args.seed,
             "split": Path(args.split_csv).name if args.split_csv else "leak-free",
             "counts": {split: {name: counted[split, i] for i, name in enumerate(CLASSES)} for split in SPLITS}}
    (partial / "faceset.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


def file_of(chip: Chip) -> str:
    """Where a chip of a split lies below the data set's folder."""
    return f"{chip.split}/{chip.label}/{chip.name}"


def conflicts(chips: list[Chip], groups: list[list[int]]) -> list[list[int]]:
    """The groups whose members disagree on the label."""
    return [group for group in groups if len({chips[i].label for i in group}) > 1]


def write_csv(path: Path, header: tuple, rows: list[tuple]) -> None:
    """A CSV file with a header."""
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


@contextmanager
def new_folder(dst: Path) -> Iterator[Path]:
    """A folder beside dst that takes dst's place when the block ends well, and is removed when it does not."""
    partial = dst.with_name(f"{dst.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise SourceError(f"--dst {dst}: cannot write there ({error.strerror})") from None
    try:
        yield partial
        old = dst.with_name(f"{dst.name}.old-{os.getpid()}")
        if dst.exists():
            os.rename(dst, old)
        os.rename(partial, dst)
        if old.exists():
            shutil.rmtree(old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def plot_distributions(counts: dict[str, dict[str, int]], folder: Path) -> None:
    """<split>_dist.png for each split: a bar for each class, its count and share on it."""
    from matplotlib.figure import Figure

    for split, by_class in counts.items():
        total = max(1, sum(by_class.values()))
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        bars = axes.bar(list(by_class), list(by_class.values()), color="tab:blue", width=0.7)
        axes.bar_label(bars, [f"{n:,}\n{100 * n / total:.1f} %" for n in by_class.values()], padding=2)
        axes.set(title=f"{split}: {sum(by_class.values()):,} pictures", ylabel="pictures")
        axes.margins(y=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(folder / f"{split}_dist.png") as beside:
            figure.savefig(beside, dpi=120)


def report(args, found: Collection, groups: list[list[int]]) -> None:
    """Prints what was built."""
    chips = found.chips
    print(f"{'':6}" + "".join(f"{name:>9}" for name in (*CLASSES, "all")))
    for split in SPLITS:
        counted = Counter(chip.label for chip in chips if chip.split == split)
        row = [counted[i] for i in range(len(CLASSES))]
        print(f"{split:6}" + "".join(f"{n:9,}" for n in (*row, sum(row))))
    several, odd = [g for g in groups if len(g) > 1], conflicts(chips, groups)
    used = [chip for chip in chips if chip.split]
    by = Counter(chip.aligned_by for chip in used)
    print(f"aligned by landmarks {by['mtcnn']:,}, by the mean landmarks {by['template']:,}, not aligned {by['none']:,}")
    print(f"near-identical pictures: {len(several):,} groups of {sum(map(len, several)):,}; labels disagree in "
          f"{len(odd):,} groups of {sum(map(len, odd)):,}, {'kept as listed' if args.split_csv else 'set aside'}")
    print(f"left out: {found.n_others:,} of race 4 (others), {len(found.skipped):,} skipped (see skipped.csv)"
          + (f", {found.n_unlisted:,} not in --split_csv; {found.n_absent:,} listed there are not in --src"
             if args.split_csv else ""))
    print(f"wrote {args.dst}")


if __name__ == "__main__":
    sys.exit(main())
