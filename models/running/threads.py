"""A CPU's cores shared out: several pictures at once, a core each, instead of all cores on one small operation."""
import ctypes
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

MAX_THREADS = 8         # each holds decoded batches and the networks' working memory
MAX_PENDING = 2         # results that may wait for a slow one before them
# Options of glibc's mallopt (malloc.h) and what they are set to. Else each thread keeps freed memory that no other may
# use, and what all have freed goes back to the system with almost every layer, to be asked for again a page at a time.
MALLOC = {"M_ARENA_MAX": (-8, 1), "M_TRIM_THRESHOLD": (-1, 256 << 20), "M_MMAP_THRESHOLD": (-3, 32 << 20)}
SWITCH = 0.0005          # seconds after which a thread that runs Python makes room for one that waits to start a layer


class OrderedThreadPool:
    """A thread for each of PyTorch's on a CPU, MAX_THREADS at most, while the block runs; one, the caller's, on CUDA.

    Detection is hundreds of small operations: two threads on each are hardly faster than one, two pictures at once
    are. On CUDA, threads that start them wait for one another. Steps that follow one another share one object: with
    threads of its own, each would take cores from the next.
    single_threaded_caller: the caller's own operations, which are few, run on one thread meanwhile; helpers of theirs would wait
    for more work in a loop, on these threads' cores.
    """

    def __init__(self, device: torch.device, single_threaded_caller: bool = False):
        self.single_threaded_caller = single_threaded_caller
        self.before = torch.get_num_threads()
        self.threads = min(self.before, MAX_THREADS) if device.type == "cpu" else 1

    def __enter__(self) -> "OrderedThreadPool":
        if self.threads > 1:
            keep_freed_memory()
            self.interval = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH)
            if self.single_threaded_caller:
                torch.set_num_threads(1)
            self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_) -> None:
        if self.threads > 1:
            self.pool.shutdown(cancel_futures=True)
            sys.setswitchinterval(self.interval)
            torch.set_num_threads(self.before)      # threads born later, autograd's among them, begin with the last set

    def ordered_map(self, function: Callable, items: Iterable) -> Iterator:
        """function(item) of each item, in their order; a result does not depend on the number of threads.

        A result is handed over when the threads have enough to do, so that they work on while the caller uses it.
        Items and results of this step in memory are MAX_PENDING more than there are threads, and one.
        """
        if self.threads == 1:
            yield from map(function, items)
            return
        waiting = deque()
        for item in items:
            waiting.append(self.pool.submit(function, item))
            while unfinished(waiting) > self.threads or len(waiting) > self.threads + MAX_PENDING:
                if waiting[0].done() or len(waiting) > self.threads + MAX_PENDING:
                    yield waiting.popleft().result()
                else:
                    wait([future for future in waiting if not future.done()], return_when=FIRST_COMPLETED)
        while waiting:
            yield waiting.popleft().result()


def keep_freed_memory() -> None:
    """From now on blocks up to 32 MiB that this process frees are there for its next ones, 256 MiB of them at most.

    Where the C library is another than glibc, nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, value in MALLOC.values():
            ctypes.CDLL(None).mallopt(option, value)


def unfinished(futures: Iterable[Future]) -> int:
    """How many have not come to their end."""
    return sum(not future.done() for future in futures)
