"""A CPU's cores shared out: several pictures at once, a core each, instead of all cores on one small operation."""
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

MOST_THREADS = 8         # each holds a decoded batch and the networks' working memory


class Cores:
    """A thread for each of PyTorch's on a CPU, MOST_THREADS at most, while the block runs; one, the caller's, on CUDA.

    Detection is hundreds of small operations: two threads on each are hardly faster than one, two pictures at once
    are. Steps that follow one another share one object: with threads of its own, each would take cores from the next.
    """

    def __init__(self, device: torch.device):
        self.before = torch.get_num_threads()
        self.threads = min(self.before, MOST_THREADS) if device.type == "cpu" else 1

    def __enter__(self) -> "Cores":
        if self.threads > 1:
            self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_) -> None:
        if self.threads > 1:
            self.pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self.before)      # threads born later, autograd's among them, begin with the last set

    def in_turn(self, function: Callable, items: Iterable) -> Iterator:
        """function(item) of each item, in their order; a result does not depend on the number of threads.

        Memory holds one item more than there are threads.
        """
        if self.threads == 1:
            yield from map(function, items)
            return
        waiting = deque()
        for item in items:
            waiting.append(self.pool.submit(function, item))
            if len(waiting) > self.threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
