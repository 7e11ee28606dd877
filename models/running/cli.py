"""What every command line shares: the one-line error, argument types, the choice of device, guarded outputs."""
import argparse
import os
import sys
from pathlib import Path

import torch


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and exit code 2, with no usage block."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)
        for stream in (sys.stdout, sys.stderr):             # a file name need not be UTF-8: print it as it can be
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wants a whole number of at least 1, got {text!r}")
    return int(text)


def non_negative_int(text: str) -> int:
    """argparse type: a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"wants a whole number of at least 0, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"wants a number above 0, got {text!r}")
    return value


def fraction(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wants a number from 0 to 1, got {text!r}")
    return value


def class_map(text: str) -> dict[str, str]:
    """argparse type: 'East_Asian=Asian,Caucasian=White' -> {'East_Asian': 'Asian', 'Caucasian': 'White'}."""
    pairs = [part.split("=") for part in text.split(",") if part.strip()]
    if not pairs or any(len(pair) != 2 or not pair[0].strip() or not pair[1].strip() for pair in pairs):
        raise argparse.ArgumentTypeError(f"wants FROM=TO,FROM=TO, got {text!r}")
    return {source.strip(): target.strip() for source, target in pairs}


def device(text: str) -> torch.device:
    """argparse type: auto (CUDA where there is one, else the CPU), cpu, cuda or cuda:N."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"wants auto, cpu, cuda or cuda:N, got {text!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"wants auto, cpu, cuda or cuda:N, got {text!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"{text}: this machine has {torch.cuda.device_count()} CUDA devices; "
                                         "--device cpu runs everywhere")
    return chosen


def add_device(parser: Parser) -> None:
    """--device, whose value is a torch.device."""
    parser.add_argument("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")


def add_photo_flags(parser: Parser, workers: str = "--num_workers") -> None:
    """How photographs are decoded and searched for faces: --min_face_size, --max_side, the workers' flag, --device."""
    add = parser.add_argument
    add("--min_face_size", type=positive_float, default=20, metavar="PX", help="smallest face (%(default)s)")
    add("--max_side", type=positive_int, default=3000, metavar="PX",
        help="longest side at which a photograph is searched; larger ones are reduced (%(default)s)")
    add(workers, type=non_negative_int, metavar="N", help="decoding processes; with 0 a CPU's threads decode and run the "
        "networks in turns (0 on a CPU; before CUDA by cores and list)")
    add_device(parser)


def add_labelling_flags(parser: Parser) -> None:
    """How faces come to the classifier: --align, --batch_size (None where it is left open), and add_photo_flags."""
    parser.add_argument("--align", choices=("auto", "always", "never"), default="auto", help="auto: pictures of "
                        "exactly 112 x 112 are finished crops; never: all are, at any resolution (%(default)s)")
    parser.add_argument("--batch_size", type=positive_int, metavar="N",
                        help="views a call of the network (CPU 16, CUDA 256)")
    add_photo_flags(parser)


def add_rerun_flags(parser: Parser):
    """--overwrite and --resume, what to do about an earlier run; the group, in which one flag alone may stand."""
    found = parser.add_mutually_exclusive_group()
    found.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
    found.add_argument("--resume", action="store_true", help="finish an interrupted run, keeping its finished parts")
    return found


def worker_count() -> int:
    """Default number of decoding workers: the cores this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def output_folder(parser: Parser, flag: str, folder: str) -> Path:
    """The folder, made if need be and known to be writable; else the one-line error that names the flag."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"{flag} {folder}: cannot write there ({error.strerror})")
    return path


def refuse_existing(parser: Parser, flag: str, paths: list[Path], overwrite: bool) -> None:
    """The one-line error where an output of an earlier run would be lost and --overwrite was not given."""
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        parser.error(f"{flag}: {there[0]} exists; --overwrite replaces it")
