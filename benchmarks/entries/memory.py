"""memory: peak memory of infer.py and of the index of names, on few files and on many."""
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import ROOT, Bar, Figure, Result, memory_line, peak_alone
from benchmarks.inputs import Bench
from models.data.index import index_photos
from models.faces.align import TEMPLATE_SIZE


def bench_memory(bench: Bench) -> Result:
    """Peak memory of infer.py with its workers, and of a process that indexes a list of names.

    The files are links to the same few hundred crops. Linux only.
    """
    infer_figures = [measure_infer(bench, n) for n in bench.sizes.memory_runs]
    index_figures = []
    for n in bench.sizes.listed:
        start = time.perf_counter()
        peak = peak_alone(index_names, bench.folder / f"list_{n}", n)
        index_figures.append(Figure("memory", f"index of a list of {n:,} names", n,
                                    [time.perf_counter() - start], peak_mb=peak))
    result = Result(infer_figures + index_figures)
    few, many = (figure.peak_mb for figure in infer_figures)
    result.bars.append(Bar("memory: MB more on many files than on few", many - few, most=60))
    few, many = (figure.peak_mb for figure in index_figures)
    result.bars.append(Bar("memory: MB more for the index of many names than of few", many - few,
                           most=60))
    result.notes.append("memory of infer.py is the sum of the peaks of the process and its "
                        "workers; pages they share count for each")
    return result


def measure_infer(bench: Bench, n: int) -> Figure:
    """Seconds and peak memory of infer.py on n files."""
    crops, folder = bench.crops(300, TEMPLATE_SIZE), bench.folder / f"links_{n}"
    folder.mkdir()
    for i in range(n):
        os.link(crops[i % len(crops)], folder / f"{i:07d}.jpg")
    command = [sys.executable, "infer.py", "--input_dir", str(folder), "--output_dir",
               str(bench.folder / f"links_out_{n}"), "--ckpt", os.path.abspath(bench.ckpt),
               "--device", str(bench.device)]
    start, peak = time.perf_counter(), peak_of_tree(command)
    return Figure("memory", f"infer.py on {n:,} files", n, [time.perf_counter() - start],
                  peak_mb=peak)


def index_names(folder: Path, n: int) -> None:
    """Writes a list of n names, indexes it like infer.py --in_list, reads every thousandth name."""
    folder.mkdir()
    with open(folder / "list.txt", "w") as file:
        file.writelines(f"{name_of(i)}\n" for i in range(n))
    index = index_photos(folder, None, str(folder / "list.txt"))
    if len(index) != n or any(index.name(i) != name_of(i) for i in range(0, n, 1000)):
        raise RuntimeError("the index does not hold the names of the list")


def name_of(i: int) -> str:
    """A file name, 20 in each folder."""
    return f"people/{i // 20:07d}/{i:09d}.jpg"


def peak_of_tree(command: list[str]) -> float:
    """Runs a command in the repository's root; the sum of the peaks of all its processes, in MB."""
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    peaks: dict[int, float] = {}
    while process.poll() is None:
        for pid in process_tree(process.pid):
            peaks[pid] = memory_line(Path(f"/proc/{pid}/status"), "VmHWM") or peaks.get(pid, 0.0)
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return sum(peaks.values())


def process_tree(pid: int) -> list[int]:
    """A process and its running descendants."""
    pids = [pid]
    for parent in pids:                                         # grows during the loop
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            pids += [int(child) for task in tasks
                     for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return pids
