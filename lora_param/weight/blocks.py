"""The blocks that a weight is merged in: a few rows at a time, so that they stay in cache.

How a library sums a product of matrices depends on its shape and on the threads it is divided over,
in the last bit. So everything that builds an update on a CPU does it by these blocks, each in one
thread, whether the weight is in a model or in a file, and the bits are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

__all__ = ["BLOCK", "Index", "blocks_of", "flat_range", "one_thread"]

BLOCK = 1 << 18
"""Elements of a block at the most, where a row has no more: 1 MiB of fp32."""

_ROWS = 512  # at the most: of a range of columns, whole rows are in memory

Index = tuple[slice, ...]


def blocks_of(shape: tuple[int, ...]) -> Iterator[Index]:
    """What to index a matrix (m, n) or a stack of them (E, m, n) with to get each block, in order.

    A block is some rows of one matrix, or some whole matrices of a stack.

    >>> list(blocks_of((3, 1 << 17)))
    [(slice(0, 2, None),), (slice(2, 3, None),)]
    """
    *lead, m, n = shape
    if not lead:
        step = min(max(BLOCK // max(n, 1), 1), _ROWS)
        for i in range(0, m, step):
            yield (slice(i, min(i + step, m)),)
        return
    (count,) = lead
    if m * n > BLOCK:
        for e in range(count):
            for (rows,) in blocks_of((m, n)):
                yield slice(e, e + 1), rows
        return
    step = BLOCK // max(m * n, 1)
    for e in range(0, count, step):
        yield slice(e, min(e + step, count)), slice(0, m)


def flat_range(index: Index, shape: tuple[int, ...]) -> tuple[int, int]:
    """The elements of a block as a range of the matrix or the stack, flattened.

    >>> flat_range((slice(2, 3), slice(0, 4)), (5, 10, 7))
    (140, 168)
    """
    steps = [prod(shape[k + 1 :]) for k in range(len(index))]
    start = sum(part.start * step for part, step in zip(index, steps, strict=True))
    return start, start + prod(part.stop - part.start for part in index) * shape[-1]


@contextmanager
def one_thread() -> Iterator[int]:
    """Torch computes in this thread alone; gives the number of threads that it is set to use.

    For bits that do not depend on that number; and for many small tensors, where threads that wait
    for each other cost more than they do.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1:  # to set it again, block by block, is not free
        yield threads
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)  # new threads begin with what was set last
