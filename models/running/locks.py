"""A lock on an output: two runs that write to one place would mix or destroy their results."""
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class LockedError(Exception):
    """Another run is writing to the same place; the message names its process."""


def process_start(pid: int) -> str:
    """When a process started, as the system counts it; '' for a process that does not exist.

    Where the system has no /proc, 'running' for an existing process.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass                                            # it exists and belongs to another user
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]       # field 22, starttime
    except OSError:
        return "running"


def lock_owner(path: Path) -> dict | None:
    """What a lock file states about its owner, if that is another process that still runs.

    None for a damaged file and for this process, which does not compete with itself.
    """
    try:
        owner = json.loads(path.read_text())
        is_alive = process_start(int(owner["pid"])) == owner["process_start"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return owner if is_alive and owner["pid"] != os.getpid() else None


def acquire_lock(path: Path) -> None:
    """Makes a lock file for this process. Raises LockedError.

    A lock that a dead process left behind is taken over.
    """
    owner = {"pid": os.getpid(), "process_start": process_start(os.getpid()),
             "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    temporary_path = path.with_name(f"{path.name}.{os.getpid()}")
    temporary_path.write_text(json.dumps(owner))
    try:
        for _ in range(3):                              # others may take over at the same time
            try:
                os.link(temporary_path, path)           # fails if the lock exists
                return
            except FileExistsError:
                if other := lock_owner(path):
                    raise LockedError(f"process {other['pid']} has been writing there since "
                                      f"{other['since']}") from None
                path.unlink(missing_ok=True)
        raise LockedError("another run has just begun to write there")
    finally:
        temporary_path.unlink(missing_ok=True)


def release_lock(path: Path) -> None:
    """Removes the lock file of this process."""
    path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock file while the block runs. Raises LockedError."""
    acquire_lock(path)
    try:
        yield
    finally:
        release_lock(path)
