"""Command lines: parser, argument types, the flags that commands share, checks of output paths.

A shared flag has one name and one meaning in every command, and --ckpt one default. The spellings
of the two original projects are aliases.
"""
import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

import torch

from models.running.version import read_version

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT_NAME = "checkpoints/resnet18_general.pt"
DEFAULT_CHECKPOINT = str(ROOT / CHECKPOINT_NAME)    # does not depend on the current directory


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --version, whose errors are one line (no usage) and exit code 2."""

    def __init__(self, description: str | None):
        super().__init__(description=description, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--version", action="version", version=f"%(prog)s {read_version()}")
        for stream in (sys.stdout, sys.stderr):     # escapes the bytes of names that are not UTF-8
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expects an integer of at least 1, got {text!r}")
    return int(text)


def non_negative_int(text: str) -> int:
    """argparse type: an integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expects an integer of at least 0, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expects a number above 0, got {text!r}")
    return value


def fraction(text: str) -> float:
    """argparse type: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expects a number from 0 to 1, got {text!r}")
    return value


def on_off(text: str) -> bool:
    """argparse type: 'on' or 'off'."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expects on or off, got {text!r}")
    return text == "on"


def class_map(text: str) -> dict[str, str]:
    """argparse type: 'Caucasian=White,East_Asian=Asian' -> {'Caucasian': 'White', ...}."""
    pairs = [pair.split("=") for pair in text.split(",") if pair.strip()]
    if not pairs or any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in pairs):
        raise argparse.ArgumentTypeError(f"expects FROM=TO,FROM=TO, got {text!r}")
    return {source.strip(): target.strip() for source, target in pairs}


def device(text: str) -> torch.device:
    """argparse type: auto (CUDA if available, else the CPU), cpu, cuda or cuda:N."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    expected = f"expects auto, cpu, cuda or cuda:N, got {text!r}"
    try:
        parsed = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(expected) from None
    if parsed.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(expected)
    n_devices = torch.cuda.device_count() if parsed.type == "cuda" else 0
    if parsed.type == "cuda" and (parsed.index or 0) >= n_devices:
        raise argparse.ArgumentTypeError(f"{text}: this machine has {n_devices} CUDA devices; "
                                         "--device cpu runs everywhere")
    return parsed


def add_data(parser: Parser, help: str, default: str | list[str] = "data/utk_races",
             nargs: str | None = None) -> None:
    """--data, one labelled set of faces, or several with nargs "+"."""
    parser.add_argument("--data", default=default, nargs=nargs, metavar="PATH",
                        help=f"{help} (%(default)s)")


def add_class_map(parser: Parser) -> None:
    """--class_map, a dict of class names; empty by default."""
    parser.add_argument("--class_map", type=class_map, default={}, metavar="FROM=TO,...",
                        help="rename classes")


def add_input_dir(parser: Parser, help: str, nargs: str | None = None, required: bool = False,
                  default: str | None = None) -> None:
    """--input_dir (--in_dir, --src): one folder, or several inputs with nargs "+"."""
    parser.add_argument("--input_dir", "--in_dir", "--src", nargs=nargs, required=required,
                        default=default, metavar="DIR", help=help)


def add_output_dir(parser: Parser, help: str = "folder for the results",
                   default: str | None = None) -> None:
    """--output_dir (--out_dir, --dst), which is required if it has no default."""
    parser.add_argument("--output_dir", "--out_dir", "--dst", required=default is None,
                        default=default, metavar="DIR",
                        help=help if default is None else f"{help} (%(default)s)")


def add_ckpt(parser: Parser, default: str | None = DEFAULT_CHECKPOINT,
             help: str = "checkpoint of train.py, or a published Lightning checkpoint") -> None:
    """--ckpt; by default the one shipped checkpoint that every command uses."""
    if default == DEFAULT_CHECKPOINT:
        help += f" (default: {CHECKPOINT_NAME} of this repository)"
    parser.add_argument("--ckpt", default=default, metavar="FILE", help=help)


def add_seed(parser: Parser, default: int, help: str = "seed of all random choices") -> None:
    """--seed, an integer of at least 0."""
    parser.add_argument("--seed", type=non_negative_int, default=default, metavar="N",
                        help=f"{help} (%(default)s)")


def add_num_workers(parser: Parser, help: str = "number of decoding processes (%(default)s)",
                    default: int | None = None) -> None:
    """--num_workers (--workers, --n_threads), at least 0; None leaves the choice to the command."""
    parser.add_argument("--num_workers", "--workers", "--n_threads", type=non_negative_int,
                        default=default, metavar="N", help=help)


def add_batch_size(parser: Parser, help: str, default: int | None = None) -> None:
    """--batch_size, an integer of at least 1; None leaves the choice to the command."""
    parser.add_argument("--batch_size", type=positive_int, default=default, metavar="N",
                        help=help if default is None else f"{help} (%(default)s)")


def add_device(parser: Parser, default: str = "auto") -> None:
    """--device, whose value is a torch.device."""
    parser.add_argument("--device", type=device, default=default, metavar="DEVICE",
                        help="auto, cpu, cuda or cuda:N (%(default)s)")


def add_second_look(parser: Parser) -> None:
    """--second_look, whose value is a bool."""
    parser.add_argument("--second_look", type=on_off, default=True, metavar="on|off",
                        help="look again with a second detector, and turned, where the first finds "
                             "no certain upright face (on)")


def add_photo_flags(parser: Parser) -> None:
    """Flags of decoding and detection: --min_face_size, --max_side, --num_workers and --device."""
    parser.add_argument("--min_face_size", type=positive_float, default=20, metavar="PX",
                        help="smallest face that is detected (%(default)s)")
    parser.add_argument("--max_side", type=positive_int, default=3000, metavar="PX",
                        help="photographs with a longer edge are reduced to this length before "
                             "detection (%(default)s)")
    add_second_look(parser)
    add_num_workers(parser, "number of decoding processes; 0 decodes in the threads that run the "
                            "networks (CPU 0; CUDA: by the number of cores and photographs)")
    add_device(parser)


def add_labelling_flags(parser: Parser) -> None:
    """Flags of classification, --align and --batch_size, and those of add_photo_flags."""
    parser.add_argument("--align", choices=("auto", "always", "never"), default="auto",
                        help="detect and align: auto: all pictures except those of exactly 112 x "
                             "112, which are aligned crops; always: all pictures; never: no "
                             "picture, all are aligned crops of any resolution (%(default)s)")
    add_batch_size(parser, "views per forward pass of the classifier (CPU 16, CUDA 256)")
    add_photo_flags(parser)


def add_overwrite(parser: Parser | argparse._MutuallyExclusiveGroup,
                  help: str = "replace the results of an earlier run") -> None:
    """--overwrite."""
    parser.add_argument("--overwrite", action="store_true", help=help)


def add_rerun_flags(parser: Parser) -> argparse._MutuallyExclusiveGroup:
    """--overwrite and --resume. Returns their group, of which a command line may hold one flag."""
    group = parser.add_mutually_exclusive_group()
    add_overwrite(group)
    group.add_argument("--resume", action="store_true",
                       help="finish an interrupted run, keeping its finished parts")
    return group


def worker_count() -> int:
    """Default number of decoding workers: the cores this process may use, at most 8."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return min(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1, 8)


def output_folder(parser: Parser, flag: str, folder: str | Path) -> Path:
    """The folder as a Path, created if missing; the error for an unwritable one names the flag."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write_test_{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        parser.error(f"{flag} {folder}: cannot write to this folder ({error.strerror})")
    return path


def refuse_existing(parser: Parser, flag: str, paths: list[Path], overwrite: bool) -> None:
    """Without --overwrite, an output file of an earlier run is an error that names the flag."""
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        parser.error(f"{flag}: {existing[0]} exists; --overwrite replaces it")
