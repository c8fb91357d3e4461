"""Work in parts, side by side on threads of this process.

torch's own threads wait actively between its operations and so take cores from any others. While a block is tuned
torch therefore works on one thread, and what is worth it runs in parts here: compiled loops and matrix products, both
of which let go of the interpreter.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

# Handing a part to another thread costs tens of microseconds; what touches fewer bytes is faster without.
SMALLEST_WORK = 512 * 1024

_pools: list[tuple[ThreadPoolExecutor, int]] = []


@contextmanager
def side_by_side(threads: int) -> Iterator[None]:
    """Within it `in_parts` uses `threads` threads, this one included, and torch one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ThreadPoolExecutor(max(threads - 1, 1), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        _pools.append((pool, threads))
        try:
            yield
        finally:
            _pools.pop()
            torch.set_num_threads(before)


def in_parts(work: Callable[[int, int], object], count: int, size: int) -> None:
    """Calls work(first, last) over 0..count, a part a thread unless it touches few bytes; `size` is how many."""
    pool, threads = _pools[-1] if _pools else (None, 1)
    if threads == 1 or size < SMALLEST_WORK or count < threads:
        work(0, count)
        return
    bounds = [count * part // threads for part in range(threads + 1)]
    others = [pool.submit(work, *bounds[part : part + 2]) for part in range(1, threads)]
    work(*bounds[:2])
    for other in others:
        other.result()
