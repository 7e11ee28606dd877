"""A CPU's cores shared out: several pictures at once, a core each, instead of all cores on one small operation."""
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

MOST_THREADS = 8         # each holds a decoded batch and the networks' working memory


def in_turn(function: Callable, items: Iterable, device: torch.device) -> Iterator:
    """function(item) of each item, in their order; on a CPU several are worked on at once, a thread each.

    As many as PyTorch has threads, MOST_THREADS at most. Detection is hundreds of small operations: two threads on
    each are hardly faster than one, two pictures at once are. A result does not depend on their number. Memory holds
    one item more than there are threads. A CUDA device takes one after another.
    """
    before = torch.get_num_threads()
    threads = min(before, MOST_THREADS)
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
        torch.set_num_threads(before)       # threads born later, autograd's among them, begin with what was set last
