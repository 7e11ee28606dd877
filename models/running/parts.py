"""Resumable runs: a folder with the finished parts of a run and its settings."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from models.running.cli import Parser
from models.running.locks import LockedError, acquire_lock, release_lock
from models.running.ranks import broadcast_from_rank0


class PartsError(Exception):
    """A run that cannot be started or resumed; the message is one line that names the flag."""


def exit_if_finished(parser: Parser, folder: Path, result: Path) -> None:
    """Ends the program with exit code 0 if the run to resume has its result and no parts left."""
    if result.exists() and not folder.exists():
        parser.exit(0, f"{result} is finished: nothing to resume\n")


def open_parts(parser: Parser, folder: Path, settings: dict, initialise: Callable[[Path], None],
               rank: int, *, resume: bool, overwrite: bool) -> None:
    """Creates a folder of parts on rank 0 and fills it by initialise(folder), or resumes one.

    settings: the flags that determine the contents of a part, as JSON values. A run can only be
    resumed with the same settings. A PartsError ends every rank with one line; a folder created by
    a failing start is removed. The folder is locked until close_parts.
    """
    problem = ""
    if rank == 0:
        try:
            acquire_lock(lock_path(folder))
            prepare_parts(folder, settings, initialise, resume, overwrite)
        except LockedError as error:
            problem = f"{folder.parent}: {error}"
        except PartsError as error:
            release_lock(lock_path(folder))
            problem = str(error)
    if problem := broadcast_from_rank0(problem):
        parser.error(problem) if rank == 0 else parser.exit(2)


def lock_path(folder: Path) -> Path:
    """The lock file of a folder of parts."""
    return folder.with_name(f".{folder.name}.lock")


def close_parts(folder: Path) -> None:
    """Removes the parts of a finished run, and its lock."""
    shutil.rmtree(folder)
    release_lock(lock_path(folder))


def prepare_parts(folder: Path, settings: dict, initialise: Callable[[Path], None], resume: bool,
                  overwrite: bool) -> None:
    """open_parts for the one process that writes. Raises PartsError."""
    settings = json.loads(json.dumps(settings))         # tuples become lists, as in the file
    if resume and (folder / "run.json").exists():
        check_settings(folder, settings)
        return
    if folder.exists() and not (overwrite or resume):
        raise PartsError(f"{folder} holds an unfinished run; --resume finishes it, --overwrite "
                         "starts again")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        initialise(folder)
        (folder / "run.json").write_text(json.dumps(settings))
    except BaseException:
        shutil.rmtree(folder)
        raise


def check_settings(folder: Path, settings: dict) -> None:
    """Raises PartsError if the run in the folder was started with other settings."""
    saved = json.loads((folder / "run.json").read_text())
    for name, value in settings.items():
        if saved.get(name) != value:
            raise PartsError(f"--resume: the run in {folder} was started with another --{name} "
                             f"({saved.get(name)}, now {value})")


def missing_parts(folder: Path, n_chunks: int, kind: str) -> list[int]:
    """Chunks without a part of this kind, as seen by rank 0; the same list on every rank."""
    missing = [chunk for chunk in range(n_chunks) if not part_path(folder, chunk, kind).exists()]
    return broadcast_from_rank0(missing)


def part_path(folder: Path, chunk: int, kind: str) -> Path:
    """File with the results of one chunk of the list; kind is the file's extension."""
    return folder / f"{chunk:06d}.{kind}"
