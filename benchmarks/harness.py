"""Timing of procedures that take turns, peak memory, targets, and the tables of the results."""
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision

from models.running import cli

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Figure:
    """A measured procedure: the seconds of its runs, each over n items."""
    case: str
    procedure: str
    n: int
    seconds: list[float]
    cores: float | None = None          # busy CPU cores, on average
    gpu: float | None = None            # percent of the time in which the GPU computed
    peak_mb: float | None = None        # of a process that does nothing else

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def rate(self) -> float:
        return self.n / self.median


@dataclass
class Bar:
    """A target for a value: at least, or at most."""
    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def met(self) -> bool:
        return self.value >= self.least if self.least is not None else self.value <= self.most


@dataclass
class Result:
    """The results of an entry."""
    figures: list[Figure] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    agreement: dict[str, dict] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def compare(self, name: str, ours: Figure, other: Figure, least: float) -> None:
        """Adds a target for the ratio of two rates."""
        self.bars.append(Bar(name, ours.rate / other.rate, least))


def take_turns(case: str, procedures: dict[str, tuple[Callable, list]], runs: int,
               device: torch.device, warm: int | None = None,
               always: bool = False) -> list[Figure]:
    """A figure for each procedure (function, items). The procedures take turns, `runs` times.

    warm: items of a warm-up before the first run. always: warm up before every run, for short
    pieces of long work, so that regaining memory from the previous procedure is not measured.
    """
    for function, items in procedures.values():
        function(items[:warm])
    figures = [Figure(case, name, len(items), []) for name, (_, items) in procedures.items()]
    busy, gpu = [0.0] * len(figures), [[] for _ in figures]
    for _ in range(runs):
        for i, (function, items) in enumerate(procedures.values()):
            if always:
                function(items[:warm])
            with GpuMeter(device) as meter:
                cpu, start = sum(os.times()[:4]), time.perf_counter()
                function(items)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                figures[i].seconds.append(time.perf_counter() - start)
                busy[i] += sum(os.times()[:4]) - cpu
            gpu[i] += meter.percents
    for figure, seconds, percents in zip(figures, busy, gpu, strict=True):
        figure.cores = seconds / sum(figure.seconds)
        figure.gpu = statistics.mean(percents) if percents else None
    return figures


class GpuMeter:
    """Samples of a CUDA device's utilisation, by nvidia-smi every 100 ms; none on a CPU."""

    def __init__(self, device: torch.device):
        self.device, self.percents, self.process = device, [], None

    def __enter__(self):
        if self.device.type == "cuda" and shutil.which("nvidia-smi"):
            gpu_id = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
            self.process = subprocess.Popen(
                ["nvidia-smi", "-i", gpu_id, "--query-gpu=utilization.gpu",
                 "--format=csv,noheader,nounits", "-lms", "100"],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.terminate()
            output = self.process.communicate()[0]
            self.percents = [int(line) for line in output.split() if line.isdecimal()]


def call_alone(function: Callable, *args):
    """The result of a function in a new process, which no earlier work affects."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_alone(function: Callable, *args) -> float | None:
    """Peak resident memory, in MB, of a new process that calls a function; None without /proc."""
    return call_alone(peak_after, function, args)


def peak_after(function: Callable, args: tuple) -> float | None:
    """Calls a function; the peak resident memory of this process, in MB."""
    function(*args)
    return memory_line(Path("/proc/self/status"), "VmHWM")


def memory_line(path: Path, name: str) -> float | None:
    """A value in kB of a file of /proc, in MB; None if the file or the line is missing."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    values = (int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
    return next(values, None)


def seconds_of(function: Callable, *args) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def run_command(*words: str) -> None:
    """Runs python with these arguments in the repository's root; shows the output of a failure."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout}")


def describe_machine(device: torch.device) -> str:
    """Processor, cores, memory, GPU, and the load before the start."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.processor())
    memory = memory_line(Path("/proc/meminfo"), "MemTotal")
    parts = [f"{model} ({torch.backends.cpu.get_cpu_capability()})",
             f"{cli.worker_count()} cores used", f"{torch.get_num_threads()} threads"]
    parts += [f"{memory / 1024:.0f} GB"] if memory else []
    parts += [torch.cuda.get_device_name(device)] if device.type == "cuda" else []
    return ", ".join([*parts, f"load before the start {os.getloadavg()[0]:.1f}"])


def versions() -> str:
    """Versions of Python and of the libraries that determine the speed."""
    return (f"Python {platform.python_version()}, torch {torch.__version__}, "
            f"torchvision {torchvision.__version__}, Pillow {PIL.__version__}, "
            f"numpy {np.__version__}")


def as_json(result: Result) -> dict:
    """A result, with medians, rates and whether each target is met."""
    return {"figures": [asdict(figure) | {"median_s": figure.median, "per_second": figure.rate}
                        for figure in result.figures],
            "bars": [asdict(bar) | {"met": bar.met} for bar in result.bars],
            "agreement": result.agreement, "notes": result.notes}


def format_result(name: str, result: Result, seconds: float) -> str:
    """The tables of an entry in Markdown."""
    lines = [f"### {name} ({seconds:.0f} s)", "",
             "| case | procedure | n | runs | seconds, median (least to most) | per second "
             "| cores busy | GPU % | MB |",
             "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for figure in result.figures:
        low, high = min(figure.seconds), max(figure.seconds)
        cells = [figure.case, figure.procedure, f"{figure.n:,}", len(figure.seconds),
                 f"{figure.median:.2f} ({low:.2f} to {high:.2f})", f"{figure.rate:.1f}",
                 format_optional(figure.cores, ".2f"), format_optional(figure.gpu, ".0f"),
                 format_optional(figure.peak_mb, ".0f")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| bar | asked | measured | met |", "|---|--:|--:|---|"]
    for bar in result.bars:
        target = f"at least {bar.least:g}" if bar.least is not None else f"at most {bar.most:g}"
        verdict = "yes" if bar.met else "**no**"
        lines.append(f"| {bar.name} | {target} | {bar.value:.4g} | {verdict} |")
    lines.append("")
    for case, agreement in result.agreement.items():
        values = ", ".join(f"{key.replace('_', ' ')} {value:.4g}"
                           for key, value in agreement.items())
        lines.append(f"- {case}: {values}")
    lines += [f"- {note}" for note in result.notes]
    return "\n".join(lines) + "\n"


def format_optional(value: float | None, spec: str) -> str:
    """A formatted number; '' for None."""
    return "" if value is None else format(value, spec)
