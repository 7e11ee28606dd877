"""Parallelism on a CPU: several batches at once, with one core each."""
import ctypes
import platform
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

MAX_THREADS = 8         # each thread holds decoded batches and the networks' working memory
MAX_PENDING = 2         # finished results that may wait for a slower one before them
# Options of glibc's mallopt (malloc.h) and their values. By default each thread keeps freed memory
# that no other thread can use, and memory goes back to the system after almost every layer, to be
# requested again page by page.
MALLOPT_OPTIONS = {"M_ARENA_MAX": (-8, 1), "M_TRIM_THRESHOLD": (-1, 256 << 20),
                   "M_MMAP_THRESHOLD": (-3, 32 << 20)}
SWITCH_INTERVAL = 0.0005    # seconds until a thread hands the interpreter to one that waits for it


class OrderedThreadPool:
    """Inside the with-block, on a CPU, one thread per thread of PyTorch, at most MAX_THREADS.

    Detection consists of hundreds of small operations. Two threads within each operation are hardly
    faster than one, but two batches at once are. On CUDA, threads that launch kernels
    wait for one another, so the caller's thread does all the work. Steps of a pipeline share one
    pool: each pool would take cores from the others.
    single_threaded_caller: the caller's own few operations run on one thread inside the block.
    Otherwise PyTorch's worker threads would wait for them in a busy loop, on the cores of the pool.
    """

    def __init__(self, device: torch.device, single_threaded_caller: bool = False):
        self.single_threaded_caller = single_threaded_caller
        self.torch_threads = torch.get_num_threads()
        self.n_threads = min(self.torch_threads, MAX_THREADS) if device.type == "cpu" else 1

    def __enter__(self) -> "OrderedThreadPool":
        if self.n_threads > 1:
            keep_freed_memory()
            self.switch_interval = sys.getswitchinterval()
            sys.setswitchinterval(SWITCH_INTERVAL)
            if self.single_threaded_caller:
                torch.set_num_threads(1)
            self.pool = ThreadPoolExecutor(self.n_threads, initializer=torch.set_num_threads,
                                           initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        if self.n_threads > 1:
            self.pool.shutdown(cancel_futures=True)
            sys.setswitchinterval(self.switch_interval)
            # Threads that start later, such as those of autograd, begin with the number that was
            # set last.
            torch.set_num_threads(self.torch_threads)

    def ordered_map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """function(item) for each item, in order; results do not depend on the number of threads.

        A result is yielded once all threads have work, so that they continue while the caller uses
        it. At most n_threads + MAX_PENDING + 1 items and results of this step are in memory.
        """
        if self.n_threads == 1:
            yield from map(function, items)
            return
        futures: deque[Future[R]] = deque()
        limit = self.n_threads + MAX_PENDING
        for item in items:
            futures.append(self.pool.submit(function, item))
            while count_unfinished(futures) > self.n_threads or len(futures) > limit:
                if futures[0].done() or len(futures) > limit:
                    yield futures.popleft().result()
                else:
                    wait([future for future in futures if not future.done()],
                         return_when=FIRST_COMPLETED)
        while futures:
            yield futures.popleft().result()


def keep_freed_memory() -> None:
    """Sets glibc to reuse freed blocks of up to 32 MiB and to keep up to 256 MiB of free memory.

    Does nothing with other C libraries.
    """
    if platform.libc_ver()[0] == "glibc":
        for option, value in MALLOPT_OPTIONS.values():
            ctypes.CDLL(None).mallopt(option, value)


def count_unfinished(futures: Iterable[Future]) -> int:
    """Number of futures that are not done."""
    return sum(not future.done() for future in futures)
