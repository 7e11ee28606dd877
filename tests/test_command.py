"""Ends of a command that a user or a machine causes: one line, and no half-written results."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from models.running.locks import LockedError, acquire_lock, locked, process_start

SCRIPT = """
import errno, os, sys, time
sys.path.insert(0, {root!r})
from models.running.command import run_command


def main():
    {body}


if __name__ == "__main__":
    run_command(main, "--resume finishes the run")
"""


def script(tmp_path: Path, body: str) -> list[str]:
    """A command line that runs this body as a command."""
    path = tmp_path / "cmd.py"
    path.write_text(SCRIPT.format(root=str(ROOT), body=body))
    return [sys.executable, str(path)]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_one_line_that_names_the_way_on(tmp_path, signal_number):
    command = script(tmp_path, "print('ready', flush=True); time.sleep(60)")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert error == "cmd.py: interrupted; --resume finishes the run\n"


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path):
    command = script(
        tmp_path, "raise OSError(errno.ENOSPC, 'No space left on device', 'out/x.csv')"
    )
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "out/x.csv" in done.stderr and "--resume" in done.stderr


def test_a_closed_pipe_does_not_end_the_work(tmp_path):
    body = (f"[print('line', i, flush=True) for i in range(2000)]; print('x', file=sys.stderr); "
            f"open({str(tmp_path / 'result')!r}, 'w').write('whole')")
    command = " ".join(script(tmp_path, body)) + " | head -1; test ${PIPESTATUS[0]} = 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "line 0\n"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert (tmp_path / "result").read_text() == "whole"


def test_other_errors_keep_their_traceback(tmp_path):
    done = subprocess.run(script(tmp_path, "1 / 0"), capture_output=True, text=True)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_lock_is_held_while_the_block_runs(tmp_path):
    path = tmp_path / "lock"
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        assert [entry.name for entry in tmp_path.iterdir()] == ["lock"]
        acquire_lock(path)                          # a process does not compete with itself
    assert not path.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "null"])
def test_a_damaged_lock_is_taken_over(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with locked(tmp_path / "lock"):
        pass


def test_a_living_process_keeps_its_lock_and_that_of_a_dead_one_is_taken_over(tmp_path):
    path = tmp_path / "lock"
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = {"pid": process.pid, "process_start": process_start(process.pid), "since": "now"}
    path.write_text(json.dumps(owner))
    with pytest.raises(LockedError, match=f"process {process.pid} .* since now"):
        acquire_lock(path)
    process.kill()
    process.wait()
    with locked(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    path.write_text(json.dumps(owner | {"pid": os.getppid()}))      # the number was used again
    with locked(path):
        pass
