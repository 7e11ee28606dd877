"""OrderedThreadPool: order, thread counts, bounded look-ahead, errors; reuse of freed memory."""
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT

from models.running.threads import MAX_PENDING, OrderedThreadPool

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("two_threads")


def ordered_map(function, items, device=CPU):
    with OrderedThreadPool(device) as pool:
        yield from pool.ordered_map(function, items)


def test_results_are_in_the_order_of_the_items():
    def slow_first(i):
        time.sleep(0.02 if i == 0 else 0)
        return i

    assert list(ordered_map(slow_first, range(20))) == list(range(20))
    assert list(ordered_map(slow_first, ())) == []


def test_items_run_single_threaded_and_the_caller_keeps_its_threads():
    before = sys.getswitchinterval()
    assert list(ordered_map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    assert set(ordered_map(lambda _: sys.getswitchinterval() < before, range(4))) == {True}
    assert torch.get_num_threads() == 2 and sys.getswitchinterval() == before


def test_single_threaded_caller_has_one_thread_inside_the_block():
    with OrderedThreadPool(CPU):
        assert torch.get_num_threads() == 2
    with OrderedThreadPool(CPU, single_threaded_caller=True):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_threads_that_start_later_use_all_threads():
    """As the threads of autograd do."""
    list(ordered_map(lambda i: i, range(4)))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2


def test_items_are_read_only_as_results_are_taken():
    taken = []
    results = ordered_map(lambda i: i, (taken.append(i) or i for i in range(100)))
    next(results)
    assert len(taken) <= 2 + MAX_PENDING + 1
    results.close()
    assert len(taken) <= 2 + MAX_PENDING + 1


def test_a_slow_item_does_not_stop_the_other_thread():
    fourth = threading.Event()

    def first_waits(i):
        if i == 3:
            fourth.set()
        return fourth.wait(10) if i == 0 else i

    assert list(ordered_map(first_waits, range(20))) == [True, *range(1, 20)]


def test_both_threads_work_while_the_caller_uses_a_result():
    others = threading.Semaphore(0)

    def last_ones_wait(i):
        return others.acquire(timeout=10) if i >= 8 else i

    results = ordered_map(last_ones_wait, range(10))
    assert [next(results) for _ in range(8)] == list(range(8))       # 8 and 9 are running now
    others.release(2)
    assert list(results) == [True, True]


def test_look_ahead_is_bounded_while_a_slow_item_runs():
    taken, last = [], threading.Event()
    results = ordered_map(
        lambda i: last.wait(0.5) if i == 0 else i, (taken.append(i) or i for i in range(100))
    )
    assert next(results) is False
    assert len(taken) <= 2 + MAX_PENDING + 1
    results.close()


def test_an_error_is_raised_in_order():
    results = ordered_map(lambda i: 1 // (2 - i), range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_on_cuda_the_caller_runs_the_items():
    threads = list(ordered_map(lambda _: torch.get_num_threads(), range(3), torch.device("cuda")))
    assert threads == [2] * 3  # those of the caller, without a pool


def test_steps_of_a_pipeline_share_the_threads():
    with OrderedThreadPool(CPU) as pool:
        names = {threading.current_thread().name}
        first = pool.ordered_map(
            lambda i: (i, names.add(threading.current_thread().name)), range(20)
        )
        second = pool.ordered_map(
            lambda pair: (pair[0], names.add(threading.current_thread().name)), first
        )
        assert [i for i, _ in second] == list(range(20))
    assert len(names) <= 1 + 2  # the caller and the two of the pool


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is an option of glibc")
def test_freed_memory_is_reused_by_the_next_layer():
    """Measured in page faults (4 KB each): without it 290,000 to 440,000 in most runs."""
    code = ("import resource, torch\n"
            "from models.running.threads import keep_freed_memory\n"
            "keep_freed_memory()\n"
            "torch.set_num_threads(1)\n"
            "def layers():\n"
            "    one = torch.ones(3_000_000)\n"
            "    two = one + 1\n"
            "    return (one + two).sum()\n"
            "for _ in range(5): layers()\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "for _ in range(50): layers()\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 30_000
