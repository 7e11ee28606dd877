"""Time and peak memory of the consensus over a predictions.csv of the size of WebFace-42M.

Writes a synthetic table with the published statistics of that set (42.5 million photos of 2.06
million people, 3 to over 300 each, 21 on average; Zhu et al., "WebFace260M", 2021), runs
facesets/consensus.py --predictions on it in a separate process, and compares the people in the
first rows with plain code that reads row by row.

    python benchmarks/consensus_scale.py                    # the full size: 6 GB of disk
    python benchmarks/consensus_scale.py --rows 1000000
"""
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from models.faces.predictions import prediction_columns
from models.reports.name_hashes import hash_name
from models.reports.votes import KEY_BITS, ConsensusRule
from models.running import cli

COMMAND = Path(__file__).resolve().parent.parent / "facesets" / "consensus.py"
CLASSES = ("African", "Asian", "Caucasian", "Indian")
PHOTOS_PER_PERSON = 42.5 / 2.06             # on average
CLASS_SHARES = (0.10, 0.14, 0.68, 0.08)     # of the people; any unequal shares would do
RECALLS = (0.80, 0.90, 0.95, 0.75)          # share of a person's faces with the right prediction
NO_FACE_SHARE = 0.01                        # of the photos
N_ENDINGS = 2048                            # of each class; a row is a name and one of them
MAX_IMAGES = ConsensusRule().max_images     # photos of a person that vote


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The checked command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--rows", type=cli.positive_int, default=42_500_000, help="photos (%(default)s)")
    add("--folder", help="parent of a temporary folder for the table and the results")
    add("--checked", type=cli.positive_int, default=200_000,
        help="rows compared with plain code (%(default)s)")
    add("--out", help="JSON file for the figures")
    cli.add_seed(parser, 0)
    return parser.parse_args(argv)


def photos_per_person(n: int, rng: np.random.Generator) -> np.ndarray:
    """Photos of n people: 3 and a log-normal number more, 20.6 on average; 1 in 2,000 over 300."""
    return 3 + rng.lognormal(np.log(PHOTOS_PER_PERSON - 2.5) - 0.5, 1.0, n).astype(np.int64)


def row_endings(rng: np.random.Generator) -> list[list[bytes]]:
    """N_ENDINGS ends of rows for each predicted class, and for photos without a face."""
    endings = []
    for c, name in enumerate(CLASSES):
        concentrations = np.where(np.arange(len(CLASSES)) == c, 8.0, 0.7)
        probs = rng.dirichlet(concentrations, N_ENDINGS).tolist()
        boxes = rng.uniform(5, 240, (N_ENDINGS, 4)).tolist()
        endings.append([row_ending(name, p, box) for p, box in zip(probs, boxes, strict=True)])
    n_empty = len(prediction_columns(CLASSES)) - 4
    return [*endings, [b",-1,no_face," + b"," * n_empty + b"\n"] * N_ENDINGS]


def row_ending(name: str, probs: list[float], box: list[float]) -> bytes:
    """The cells after the file name for a face of the predicted class `name`."""
    prob_cells = ",".join(f"{p:.6f}" for p in probs)
    box_cells = ",".join(f"{x:.2f}" for x in box)
    ending = f",0,ok,{name},{max(probs):.6f},{prob_cells},{name},{box_cells},0.999871,upright,\n"
    return ending.encode()


def write_table(path: Path, n_rows: int, rng: np.random.Generator) -> int:
    """Writes the table; returns the number of people in it."""
    endings = row_endings(rng)
    n_people, n_written = 0, 0
    with open(path, "wb") as file:
        file.write(",".join(prediction_columns(CLASSES)).encode() + b"\n")
        while n_written < n_rows:
            counts = photos_per_person(20_000, rng)
            counts = counts[:np.searchsorted(counts.cumsum(), n_rows - n_written) + 1]
            labels = rng.choice(len(CLASSES), len(counts), p=CLASS_SHARES).repeat(counts)
            predictions = np.where(rng.random(len(labels)) < np.array(RECALLS)[labels], labels,
                                   rng.integers(0, len(CLASSES), len(labels)))
            predictions[rng.random(len(labels)) < NO_FACE_SHARE] = len(CLASSES)
            choices = rng.integers(0, N_ENDINGS, len(labels)).tolist()
            names = (b"%d_%07d/%d_%d.jpg" % (person // 100_000, person, person % 10, i)
                     for person, count in enumerate(counts.tolist(), n_people)
                     for i in range(count))
            file.writelines([name + endings[c][i] for name, c, i in
                             zip(names, predictions.tolist(), choices, strict=True)])
            n_people, n_written = n_people + len(counts), n_written + len(labels)
    return n_people


def count_row_by_row(table: Path, n_rows: int) -> dict[str, list[str]]:
    """n_images, n_used, n_face and votes of the people in the first rows, by a plain loop."""
    people = defaultdict(list)
    with open(table, newline="") as file:
        for row in islice(csv.DictReader(file), n_rows):
            key = hash_name(row["file"].encode(), 1) >> np.uint64(64 - KEY_BITS)
            people[row["file"].split("/")[0]].append((key, row["status"], row["ethnicity"]))
    people.popitem()                                    # further rows may belong to the last person
    cells = {}
    for person, photos in people.items():
        labels = [label for _, status, label in sorted(photos)[:MAX_IMAGES] if status == "ok"]
        numbers = [len(photos), min(MAX_IMAGES, len(photos)), len(labels),
                   *(labels.count(name) for name in CLASSES)]
        cells[person] = [str(number) for number in numbers]
    return cells


def main(argv: list[str] | None = None) -> None:
    """Writes the table, times the command, compares the counts and prints the figures."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table, output_dir = Path(folder) / "predictions.csv", Path(folder) / "out"
        n_people = write_table(table, args.rows, np.random.default_rng(args.seed))
        print(f"{args.rows:,} rows or a few more, {n_people:,} people, "
              f"{table.stat().st_size / 1e9:.2f} GB", flush=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, COMMAND, "--predictions", table, "--output_dir",
                        output_dir], check=True)
        seconds = time.perf_counter() - started
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        expected = count_row_by_row(table, args.checked)
        with open(output_dir / "people.csv", newline="") as file:
            counted = {row[0]: row[1:8] for row in csv.reader(file) if row[0] in expected}
    n_differing = sum(counted.get(person) != cells for person, cells in expected.items())
    figures = {"rows": args.rows, "people": n_people, "seconds": round(seconds, 1),
               "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
               "peak_gb": round(usage.ru_maxrss / 1e6, 2),
               "rows_per_second": round(args.rows / seconds), "cores": os.cpu_count(),
               "numpy": np.__version__, "people_checked": len(expected),
               "people_differing": n_differing}
    print(json.dumps(figures))
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1) + "\n")
    if n_differing:
        sys.exit(f"{n_differing} of {len(expected)} people differ from the plain count")


if __name__ == "__main__":
    main()
