"""Work on a checkpoint's files cut into jobs, done side by side by as many threads as cores.

The jobs' heavy parts (torch's arithmetic, the kernel's copying) let go of Python's lock, so that
one thread reads and writes while another computes. What is done does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from lora_param.weight.blocks import one_thread

__all__ = ["Job", "Progress", "followed", "run_jobs"]

_KEPT = 1 << 22  # elements, 16 MiB: more than a block's buffers take
_MOST = 16  # threads: more wait for the disk, and for Python's lock

Progress = Callable[[int, str], None]
"""Called with a number of bytes just done and what they belong to."""


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work.

    Attributes:
        run: does it; what it gives is not looked at.
        size: bytes that it writes, for the progress.
        name: what they belong to.
        done: called after it, in the thread that waits for all; what it gives is done next.
    """

    run: Callable[[], object]
    size: int = 0
    name: str = ""
    done: Callable[[], Job | None] | None = None


def followed(jobs: Iterable[Job], last: Callable[[], None]) -> Iterator[Job]:
    """The jobs, and what is done when all of them are done."""
    open_, taken = 0, False

    def done() -> Job | None:
        nonlocal open_
        open_ -= 1
        return Job(last) if taken and not open_ else None

    for job in jobs:
        open_ += 1
        yield replace(job, done=done)
    taken = True
    if not open_:
        yield Job(last)


def run_jobs(jobs: Iterable[Job], progress: Progress) -> None:
    """Do all jobs, begun in their order; the first error ends it and is raised.

    Only a few jobs are taken from the iterable ahead of being done. There are as many threads as
    torch is set to use; each computes alone.
    """
    import torch

    torch.empty(_KEPT)  # glibc then keeps what is freed, up to this, instead of giving it back
    jobs = iter(jobs)
    with (
        one_thread() as threads,
        ThreadPoolExecutor(
            workers := min(threads, _MOST), "lora_param", partial(torch.set_num_threads, 1)
        ) as pool,
    ):
        running: dict[Future[object], Job] = {}
        try:
            while True:
                for job in islice(jobs, 2 * workers - len(running)):
                    running[pool.submit(job.run)] = job
                if not running:
                    return
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    job = running.pop(future)
                    future.result()
                    if job.done is not None and (following := job.done()):
                        running[pool.submit(following.run)] = following
                    progress(job.size, job.name)
        finally:
            pool.shutdown(cancel_futures=True)
