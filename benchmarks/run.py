"""Speed of every step, against the same work done one picture at a time and against upper bounds.

  align     photographs in memory -> aligned crops of all their faces
            against the original MTCNN procedure
  classify  a folder of aligned crops -> predictions.csv
            against batches of one; the network alone
  photos    a folder of photographs -> predictions.csv
            against detection, alignment and classification of one photograph at a time
  epoch     training steps on crops
            against a plain loop; the steps alone
  builder   UTKFace -> a data set (utk_dataset_builder.py)
            against two processes of the original procedure
  start     infer.py on one picture
            against the imports of torch and torchvision
  memory    peak memory of infer.py on 100,000 files and on 5,000, of the index of 5 million names
            and of 50,000 (only with --only memory or --full)

Each entry runs in a process of its own (benchmarks/entries/). The procedures that are compared take
turns within one run, a figure is the median of its runs, and the results of both procedures are
compared too. The machine must not run anything else meanwhile.

Reads   UTKFace.tar and wild.tar in --data (by default FACES_DATA, else ../shared/data), --ckpt.
Writes  --out, JSON: machine, versions, the seconds of every run, targets, agreement. Prints the
        same as Markdown tables.

    python benchmarks/run.py
    python benchmarks/run.py --quick --only classify
"""
import json
import os
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.entries.align import bench_align
from benchmarks.entries.builder import bench_builder
from benchmarks.entries.classify import bench_classify
from benchmarks.entries.epoch import bench_epoch
from benchmarks.entries.memory import bench_memory
from benchmarks.entries.photos import bench_photos
from benchmarks.entries.start import bench_start
from benchmarks.harness import (
    ROOT,
    as_json,
    call_alone,
    describe_machine,
    format_result,
    versions,
)
from benchmarks.inputs import SIZES, Bench
from models.faces.checkpoint import CheckpointError, load_checkpoint
from models.running import cli

ENTRIES = {"align": bench_align, "classify": bench_classify, "photos": bench_photos,
           "epoch": bench_epoch, "builder": bench_builder, "start": bench_start,
           "memory": bench_memory}
DATA = Path(os.environ.get("FACES_DATA", ROOT.parent / "shared" / "data"))


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The checked command line."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    cli.add_device(parser, default="cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true",
                      help="three runs over few pictures, to check that everything works")
    size.add_argument("--full", action="store_true",
                      help="a whole epoch, five runs of the builder, and memory")
    add("--only", choices=ENTRIES, metavar="NAME", help=", ".join(ENTRIES))
    add("--data", type=Path, default=DATA, metavar="DIR",
        help="folder with UTKFace.tar and wild.tar (FACES_DATA, else ../shared/data beside the "
             "repository)")
    cli.add_ckpt(parser, help="checkpoint of the classifier")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results.json", metavar="FILE",
        help="JSON file for the figures")
    args = parser.parse_args(argv)
    for archive in ("UTKFace.tar", "wild.tar"):
        if not (args.data / archive).is_file():
            parser.error(f"--data {args.data}: has no {archive}")
    try:
        load_checkpoint(args.ckpt)
    except CheckpointError as error:
        parser.error(f"--ckpt {args.ckpt}: {error}")
    cli.output_folder(parser, "--out", args.out.parent)
    return args


def main(argv: list[str] | None = None) -> None:
    """Runs the entries, prints their tables and writes the figures after each."""
    args = parse_args(argv)
    names = [name for name in ENTRIES if name != "memory" or args.full]
    if args.only:
        names = [args.only]
    size = "quick" if args.quick else "full" if args.full else "default"
    command = " ".join(["benchmarks/run.py", *(sys.argv[1:] if argv is None else argv)])
    header = {"machine": describe_machine(args.device), "versions": versions(),
              "size": asdict(SIZES[size]), "command": command}
    print(f"{header['machine']}\n{header['versions']}\n", flush=True)
    results = {}
    with tempfile.TemporaryDirectory(prefix="benchmark_") as folder:
        bench = Bench(args.data, Path(folder), args.ckpt, args.device, sizes=SIZES[size],
                      quick=args.quick)
        for name in names:
            start = time.perf_counter()
            results[name] = call_alone(ENTRIES[name], bench)
            print(format_result(name, results[name], time.perf_counter() - start), flush=True)
            content = header | {"results": {name: as_json(r) for name, r in results.items()}}
            args.out.write_text(json.dumps(content, indent=1) + "\n")
    missed = [bar.name for result in results.values() for bar in result.bars if not bar.met]
    print(f"bars missed: {'; '.join(missed)}" if missed else "all bars met", f"({args.out})")


if __name__ == "__main__":
    main()
