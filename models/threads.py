"""A CPU's cores shared out: several pictures at once, a core each, instead of all cores on one small operation."""
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

MOST_THREADS = 8         # each holds a decoded batch and the networks' working memory


def in_turn(function: Callable, items: Iterable, device: torch.device) -> Iterator:
    """function(item) of each item, in their order. On a CPU as many are worked on at once as PyTorch has threads,
    MOST_THREADS at most.

    Detection is hundreds of small operations: two threads on each are hardly faster than one, two pictures at once
    are. A result does not depend on the number of threads, for each item has one. Items are taken one ahead, so
    memory holds one more of them than there are threads. A CUDA device takes one after another.
    """
    threads = min(torch.get_num_threads(), MOST_THREADS)
    if device.type != "cpu" or threads == 1:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
