"""FairFace's class folders -> train and val folders without pictures of evaluation sets.

    python facesets/fairface_set.py --input_dir FairFace_train --labels FairFace_train.csv \
        --avoid FairFace_val foreign --output_dir data/fairface

A training picture is left out if it is a near-duplicate of a picture of --avoid. Near-duplicates
among the training pictures share a split; a group of them with two labels is for training.
Writes  --output_dir/<train or val>/<class>/: links to the pictures
        --output_dir/manifest.csv: with the age range and gender of --labels (CSV: file, age,
        gender), for the auxiliary heads of train.py
"""
import csv
import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from models.data.duplicates import group_duplicate_files
from models.data.listing import list_images
from models.running import cli

GENDERS = {"Male": "0", "Female": "1"}
COLUMNS = ["file", "split", "age", "gender", "aligned_by", "duplicate_group"]


def read_labels(path: Path | None) -> dict[str, tuple[str, str]]:
    """Age range ('20-29') and gender ('0' male, '1' female) by file; empty without a table."""
    if not path:
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return {row["file"]: (row["age"], GENDERS.get(row["gender"], ""))
                for row in csv.DictReader(file)}


def sample_files(files: list[str], limit: int, seed: int) -> list[str]:
    """At most `limit` files (0: all), as equally from the class folders as they allow; sorted."""
    if not limit or limit >= len(files):
        return files
    generator = torch.Generator().manual_seed(seed)
    queues: dict[str, list[str]] = {}
    for position in torch.randperm(len(files), generator=generator).tolist():
        queues.setdefault(class_folder(files[position]), []).append(files[position])
    rounds = itertools.zip_longest(*queues.values())
    return sorted(list(filter(None, itertools.chain(*rounds)))[:limit])


def class_folder(file: str) -> str:
    """The first folder of a relative path."""
    return file.split("/")[0]


def assign_splits(groups: list[list[int]], files: list[str], val_share: float, seed: int,
                  val_above: int = 0) -> list[str]:
    """Split of each file: 'train', 'val', or '' if it is left out.

    groups: positions of near-duplicates; those from len(files) on are evaluation pictures, whose
    near-duplicates are left out. So are held-out files whose number (of NUMBER.jpg) is at most
    `val_above`: weights to be fine-tuned were trained on them.
    """
    splits, candidates = ["train"] * len(files), {}
    for group in groups:
        positions = [position for position in group if position < len(files)]
        classes = {class_folder(files[position]) for position in positions}
        if positions and len(positions) < len(group):
            for position in positions:
                splits[position] = ""
        elif len(classes) == 1:
            candidates.setdefault(classes.pop(), []).append(positions)
    generator = torch.Generator().manual_seed(seed)
    for _, class_groups in sorted(candidates.items()):
        order = torch.randperm(len(class_groups), generator=generator).tolist()
        for i in order[:round(val_share * len(class_groups))]:
            for position in class_groups[i]:
                is_new = not val_above or int(Path(files[position]).stem) > val_above
                splits[position] = "val" if is_new else ""
    return splits


def link(source: Path, target: Path) -> None:
    """Makes a hard link, or a symbolic one across file systems."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        os.symlink(source.resolve(), target)


def write_set(args, files: list[str], splits: list[str], groups: list[list[int]]) -> None:
    """Links the pictures of both splits and writes the manifest."""
    labels = read_labels(args.labels)
    group_of = {position: number for number, group in enumerate(groups) for position in group}
    rows = []
    for position, (file, split) in enumerate(zip(files, splits, strict=True)):
        if split:
            link(args.src / file, args.dst / split / file)
            age, gender = labels.get(file, ("", ""))
            rows.append([f"{split}/{file}", split, age, gender, "", group_of[position]])
    with open(args.dst / "manifest.csv", "w", newline="", encoding="utf-8") as out:
        csv.writer(out, lineterminator="\n").writerows([COLUMNS, *rows])


def report(files: list[str], splits: list[str], groups: list[list[int]],
           avoided: list[str]) -> None:
    """Prints the sizes of the splits, and the near-duplicates of evaluation pictures."""
    n = len(files)
    leaked = [group for group in groups if group[0] < n <= group[-1]]
    pictures = [files[position] for group in leaked for position in group if position < n]
    matches = [avoided[position - n] for group in leaked for position in group if position >= n]
    n_groups = sum(len(group) > 1 and group[-1] < n for group in groups)
    print(f"{n} pictures: {splits.count('train')} train, {splits.count('val')} val, "
          f"{splits.count('')} left out; {n_groups} groups of near-duplicates")
    print(f"{len(pictures)} near-duplicates of {len(matches)} evaluation pictures: "
          f"{', '.join(pictures) or 'none'}; {', '.join(matches) or 'none'}")


def parse_args(argv: list[str] | None = None):
    """The flags; mistakes that can be found before anything slow starts end the program."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--input_dir", "--src", dest="src", type=Path, required=True, metavar="DIR",
        help="folder of class folders")
    add("--labels", type=Path, metavar="FILE.csv", help="file, age, gender of the pictures")
    add("--avoid", nargs="+", default=[], metavar="DIR", help="evaluation sets")
    add("--output_dir", "--dst", dest="dst", type=Path, required=True, metavar="DIR",
        help="the new folder")
    add("--val_share", type=cli.fraction, default=0.06, metavar="SHARE",
        help="hold-out share of each class's groups (%(default)s)")
    add("--val_above", type=cli.non_negative_int, default=0, metavar="NUMBER",
        help="leave out held-out pictures NUMBER.jpg and below: weights to be fine-tuned saw them")
    add("--limit", type=cli.non_negative_int, default=0, metavar="N",
        help="use at most N pictures, equally from the classes; 0: all (%(default)s)")
    cli.add_seed(parser, 2023)
    cli.add_num_workers(parser, default=cli.worker_count())
    args = parser.parse_args(argv)
    folders = [("--input_dir", args.src), *(("--avoid", Path(root)) for root in args.avoid)]
    for flag, folder in folders:
        if not folder.is_dir():
            parser.error(f"{flag} {folder}: no such folder")
    if args.dst.exists():
        parser.error(f"--output_dir {args.dst}: exists already")
    return args


def main(argv: list[str] | None = None) -> None:
    """Lists the pictures, groups near-duplicates, splits, and links."""
    args = parse_args(argv)
    files = sample_files(list_images(args.src), args.limit, args.seed)
    avoided = [os.path.join(root, file) for root in args.avoid for file in list_images(root)]
    groups = group_duplicate_files([str(args.src / file) for file in files] + avoided,
                                   args.num_workers, "near-duplicates")
    splits = assign_splits(groups, files, args.val_share, args.seed, args.val_above)
    write_set(args, files, splits, groups)
    report(files, splits, groups, avoided)


if __name__ == "__main__":
    main()
