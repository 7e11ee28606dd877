"""Time and peak memory of the consensus over a predictions table of the size of WebFace-42M.

Writes a synthetic predictions.csv with that set's published statistics (42.5 million pictures of 2.06 million people,
3 to over 300 each, 21 on average; Zhu et al., "WebFace260M", 2021), runs facesets/consensus.py --predictions on it in a
process of its own, and checks the people at the head of the table against a plain version, row by row.

    python benchmarks/consensus_scale.py                        # the whole size: 6 GB of disk for the table
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
from collections import defaultdict
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from models.faces.predictions import columns
from models.reports.name_hashes import hash_name
from models.reports.votes import KEY_BITS
from models.running import cli

CLASSES = ("African", "Asian", "Caucasian", "Indian")
PER_PERSON = 42.5 / 2.06                    # pictures
MIXTURE = (0.10, 0.14, 0.68, 0.08)          # of the people; any that are unequal do
RIGHT = (0.80, 0.90, 0.95, 0.75)            # share of a person's faces that are predicted to be of their class
NO_FACE = 0.01
TAILS = 2048                                # rows are a name and one of so many endings a class


def parse_args(argv: list[str] | None = None):
    """The checked command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--rows", type=cli.positive_int, default=42_500_000, help="pictures (%(default)s)")
    add("--folder", help="where the table and the results go for the time of the run (a temporary folder)")
    add("--checked", type=cli.positive_int, default=200_000, help="rows checked one by one (%(default)s)")
    add("--out", help="JSON file for the figures")
    add("--seed", type=cli.non_negative_int, default=0)
    return parser.parse_args(argv)


def images_per_person(n: int, rng: np.random.Generator) -> np.ndarray:
    """Pictures of n people: 3 and a log-normal number more, 20.6 on average, one in 2,000 over 300."""
    return 3 + rng.lognormal(np.log(PER_PERSON - 2.5) - 0.5, 1.0, n).astype(np.int64)


def row_endings(rng: np.random.Generator) -> list[list[bytes]]:
    """TAILS ends of rows for each predicted class, and for pictures without a face."""
    endings = []
    for c, name in enumerate(CLASSES):
        probs = rng.dirichlet(np.where(np.arange(len(CLASSES)) == c, 8.0, 0.7), TAILS)
        boxes = rng.uniform(5, 240, (TAILS, 4))
        endings.append([(f",0,ok,{name},{max(p):.6f}," + ",".join(f"{x:.6f}" for x in p) + f",{name},"
                         + ",".join(f"{x:.2f}" for x in box) + ",0.999871,\n").encode()
                        for p, box in zip(probs.tolist(), boxes.tolist(), strict=True)])
    return [*endings, [b",-1,no_face," + b"," * (len(columns(CLASSES)) - 4) + b"\n"] * TAILS]


def write_table(path: Path, n_rows: int, rng: np.random.Generator) -> int:
    """Writes the table; the number of people in it."""
    endings = row_endings(rng)
    n_people, written = 0, 0
    with open(path, "wb") as file:
        file.write(",".join(columns(CLASSES)).encode() + b"\n")
        while written < n_rows:
            counts = images_per_person(20_000, rng)
            counts = counts[:np.searchsorted(counts.cumsum(), n_rows - written) + 1]
            truth = rng.choice(len(CLASSES), len(counts), p=MIXTURE).repeat(counts)
            said = np.where(rng.random(len(truth)) < np.array(RIGHT)[truth], truth,
                            rng.integers(0, len(CLASSES), len(truth)))
            said[rng.random(len(truth)) < NO_FACE] = len(CLASSES)
            picks = iter(zip(said.tolist(), rng.integers(0, TAILS, len(truth)).tolist(), strict=True))
            names = (b"%d_%07d/%d_%d.jpg" % (person // 100_000, person, person % 10, i)
                     for person, count in enumerate(counts.tolist(), n_people) for i in range(count))
            file.writelines([name + endings[c][i] for name, (c, i) in zip(names, picks, strict=True)])
            n_people, written = n_people + len(counts), written + len(truth)
    return n_people


def plain_votes(table: Path, n_rows: int) -> dict[str, list[str]]:
    """n_images, n_used, n_face and votes of the people in the first rows of a table, one row after another."""
    people = defaultdict(list)
    with open(table, newline="") as file:
        for row in islice(csv.DictReader(file), n_rows):
            people[row["file"].split("/")[0]].append((hash_name(row["file"].encode(), 1) >> np.uint64(64 - KEY_BITS),
                                                      row["status"], row["ethnicity"]))
    people.popitem()                                                    # whose rows may go on
    votes = {}
    for person, pictures in people.items():
        asked = [label for _, status, label in sorted(pictures)[:20] if status == "ok"]
        numbers = [len(pictures), min(20, len(pictures)), len(asked), *(asked.count(name) for name in CLASSES)]
        votes[person] = [str(number) for number in numbers]
    return votes


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table, out = Path(folder) / "predictions.csv", Path(folder) / "out"
        n_people = write_table(table, args.rows, np.random.default_rng(args.seed))
        print(f"{args.rows:,} rows or a few more, {n_people:,} people, {table.stat().st_size / 1e9:.2f} GB", flush=True)
        command = Path(__file__).resolve().parent.parent / "facesets" / "consensus.py"
        started = time.perf_counter()
        subprocess.run([sys.executable, command, "--predictions", table, "--output_dir", out], check=True)
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        wanted = plain_votes(table, args.checked)
        with open(out / "people.csv", newline="") as file:
            found = {row[0]: row[1:8] for row in csv.reader(file) if row[0] in wanted}
    differing = sum(found.get(person) != votes for person, votes in wanted.items())
    figures = {"rows": args.rows, "people": n_people, "seconds": round(seconds, 1),
               "cpu_seconds": round(used.ru_utime + used.ru_stime, 1), "peak_gb": round(used.ru_maxrss / 1e6, 2),
               "rows_per_second": round(args.rows / seconds), "cores": os.cpu_count(), "numpy": np.__version__,
               "people_checked": len(wanted), "people_differing": differing}
    print(json.dumps(figures))
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1) + "\n")
    if differing:
        sys.exit(f"{differing} of {len(wanted)} people differ from the plain version")


if __name__ == "__main__":
    main()
