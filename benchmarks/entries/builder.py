"""builder: UTKFace -> a data set, against two processes of the original procedure."""
from pathlib import Path

import utk_dataset_builder as builder
from benchmarks import baseline
from benchmarks.harness import Bar, Figure, Result, run_command, seconds_of
from benchmarks.inputs import Bench


def bench_builder(bench: Bench) -> Result:
    """utk_dataset_builder.py as a user runs it, including the start of Python.

    The processes of the original procedure are started before the clock.
    """
    result, sizes = Result(), bench.sizes
    chips, plain_chips = bench.chips(sizes.built), bench.chips(sizes.plain_built)
    command = ("utk_dataset_builder.py", "--src", str(Path(chips[0]).parent), "--dst",
               str(bench.folder / "built"), "--vis_dir", str(bench.folder / "vis"), "--overwrite")
    case = "UTKFace, smallest face 40"
    ours = Figure(case, "ours, whole command", len(chips), [])
    plain = Figure(case, "two processes of the original procedure", len(plain_chips), [])
    (bench.folder / "plain_built").mkdir(exist_ok=True)
    for _ in range(sizes.builder_runs):
        ours.seconds.append(seconds_of(run_command, *command))
        plain.seconds.append(baseline.build(plain_chips, bench.folder / "plain_built",
                                            builder.MIN_FACE_SIZE, builder.OUT_RES))
    result.figures = [ours, plain]
    result.compare("builder: ratio to two processes of the original procedure", ours, plain, 2.0)
    result.notes.append(
        f"the original procedure is measured on {len(plain_chips):,} chips: at its rate all "
        f"{len(chips):,} take {len(chips) / plain.rate:.0f} s. It only detects, aligns and "
        "encodes; ours also reads, groups, splits and draws")
    if sizes.built is None:
        result.bars.append(Bar("builder: seconds for all of UTKFace", ours.median, most=120))
    return result
