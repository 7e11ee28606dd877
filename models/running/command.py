"""How a command ends: interrupts, full disks and closed pipes are one line, not a traceback."""
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TextIO

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
INTERRUPTED = 130           # exit status by convention: 128 + SIGINT
FAILED = 1


class PipeTolerantStream:
    """A text stream that goes silent when its reader is gone, so that the run goes on.

    `infer.py ... | head -1` still writes all of its files.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes text, or discards it if the pipe is closed."""
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.silence()
            return len(text)

    def flush(self) -> None:
        """Flushes the stream, unless the pipe is closed."""
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.silence()

    def silence(self) -> None:
        """Sends everything to the null device from now on, also what is buffered."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def raise_interrupt(*_: object) -> NoReturn:
    """Signal handler: SIGTERM ends a command as Ctrl-C does, so that it cleans up."""
    raise KeyboardInterrupt


def run_command(main: Callable[[], Any], after_interrupt: str) -> NoReturn:
    """Runs main() and exits; what a user or a machine may cause is one line on stderr.

    after_interrupt: what to do next, such as '--resume finishes the run'.
    """
    sys.stdout, sys.stderr = PipeTolerantStream(sys.stdout), PipeTolerantStream(sys.stderr)
    with contextlib.suppress(ValueError):               # not in the main thread
        signal.signal(signal.SIGTERM, raise_interrupt)
    try:
        main()
    except KeyboardInterrupt:
        end(INTERRUPTED, f"interrupted; {after_interrupt}")
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        place = f" at {error.filename}" if error.filename else ""
        end(FAILED, f"cannot write{place}: {error.strerror}; make room, then {after_interrupt}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        end(FAILED, f"a decoding process died ({str(error).splitlines()[0]}); {after_interrupt}")
    sys.stdout.flush()
    sys.exit(0)


def end(status: int, reason: str) -> NoReturn:
    """Exits with one line that names the command."""
    program = os.path.basename(sys.argv[0])
    print(f"{program}: {' '.join(reason.split())}", file=sys.stderr)
    sys.stderr.flush()
    sys.exit(status)
