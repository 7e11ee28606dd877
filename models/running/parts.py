"""An unfinished run: a folder of its finished parts and what was asked of it, begun anew or resumed."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from models.running.cli import Parser
from models.running.ranks import broadcast_from_rank0


class PartsError(Exception):
    """Why a run cannot be begun or resumed, in a line that names the flag."""


def exit_if_finished(parser: Parser, folder: Path, result: Path) -> None:
    """Ends the program, with nothing done, where the run to resume has its result and no folder of parts any more."""
    if result.exists() and not folder.exists():
        parser.exit(0, f"{result} is finished: nothing to resume\n")


def open_parts(parser: Parser, folder: Path, asked: dict, begin: Callable[[Path], None], rank: int, *, resume: bool,
               overwrite: bool) -> None:
    """Makes the folder of parts and lets begin(folder) fill it, or finds it again; rank 0 does so for all ranks.

    asked: all flags that decide what a part holds (values as JSON knows them); a run is resumed with the same only.
    A PartsError, of begin or of the folder found, ends every rank with one line; a folder made for nothing is gone
    then.
    """
    problem = ""
    if rank == 0:
        try:
            prepare_parts(folder, asked, begin, resume, overwrite)
        except PartsError as error:
            problem = str(error)
    if problem := broadcast_from_rank0(problem):
        parser.error(problem) if rank == 0 else parser.exit(2)


def prepare_parts(folder: Path, asked: dict, begin: Callable[[Path], None], resume: bool, overwrite: bool) -> None:
    """What open_parts does, for the one process that does it."""
    asked = json.loads(json.dumps(asked))                       # tuples become lists, as they come back from the file
    if resume and (folder / "run.json").exists():
        begun = json.loads((folder / "run.json").read_text())
        if differing := [name for name in asked if begun.get(name) != asked[name]]:
            raise PartsError(f"--resume: the run in {folder} was begun with another --{differing[0]} "
                             f"({begun.get(differing[0])}, now {asked[differing[0]]})")
        return
    if folder.exists() and not (overwrite or resume):
        raise PartsError(f"{folder} holds an unfinished run; --resume finishes it, --overwrite begins anew")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        begin(folder)
        (folder / "run.json").write_text(json.dumps(asked))
    except BaseException:
        shutil.rmtree(folder)
        raise


def missing_parts(folder: Path, n_chunks: int, kind: str) -> list[int]:
    """The chunks that have no part of a kind yet, as rank 0 sees it for all ranks."""
    return broadcast_from_rank0([chunk for chunk in range(n_chunks) if not part_path(folder, chunk, kind).exists()])


def part_path(folder: Path, chunk: int, kind: str) -> Path:
    """File of what a chunk of the list gave; kind is its extension."""
    return folder / f"{chunk:06d}.{kind}"
