"""start: infer.py on one photograph, against the imports of torch and torchvision."""
import os
import shutil

from benchmarks.harness import Bar, Result, run_command, take_turns
from benchmarks.inputs import Bench


def bench_start(bench: Bench) -> Result:
    """infer.py on one picture, as a user runs it."""
    photo_dir = bench.folder / "one"
    photo_dir.mkdir(exist_ok=True)
    shutil.copy(bench.photos()[0], photo_dir)
    command = ("infer.py", "--input_dir", str(photo_dir), "--output_dir",
               str(bench.folder / "one_out"), "--overwrite", "--ckpt",
               os.path.abspath(bench.ckpt), "--device", str(bench.device))
    ours, imports = figures = take_turns("start", {
        "infer.py on one photograph": (lambda _: run_command(*command), [1]),
        "import torch, torchvision": (
            lambda _: run_command("-c", "import torch, torchvision"), [1])},
        bench.sizes.runs, bench.device)
    return Result(figures, [Bar("start: seconds of infer.py over those of the imports",
                                ours.median / imports.median, most=1.5)])
