"""Locks of files and directories, held by a process and let go by the system when it ends.

They are advisory: they keep this package's processes, and threads, out of each other's way.
Where the system or the file system has none, what is replaced is compared before it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

if sys.platform != "win32":
    import fcntl

__all__ = ["HAS_LOCKS", "State", "is_at", "locked", "release", "state_of", "take"]

HAS_LOCKS = sys.platform != "win32"


class State(NamedTuple):
    """What tells a file from the one that replaced it, or from what it was before a change."""

    inode: int
    size: int
    changed: int


def state_of(place: str | os.PathLike[str] | int) -> State | None:
    """The state of a path or an open descriptor; None where there is nothing."""
    try:
        s = os.fstat(place) if isinstance(place, int) else Path(place).stat()
    except (OSError, ValueError):
        return None
    return State(s.st_ino, s.st_size, s.st_mtime_ns)


def is_at(descriptor: int, path: Path) -> bool:
    """The open file is still the one that the path leads to."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def take(descriptor: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or directory: True. False where another holds it, None without locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # the file system has none
        return None
    return True


def release(descriptor: int) -> None:
    """Let go of a lock, also where a forked process has inherited the descriptor."""
    if sys.platform != "win32":
        try:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        except OSError:
            return  # there was none


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[State | None]:
    """Hold the lock of a file or directory that is read, changed and replaced; others wait.

    Gives its state, to be compared when it is replaced; None where there is nothing at the path,
    of which whoever reads it will say so.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK) if HAS_LOCKS else None
        except (OSError, ValueError):
            descriptor = None
        if descriptor is None:
            yield state_of(path)
            return
        # What was renamed into the place while this one waited is another file: take its lock.
        if take(descriptor, wait=True) is None or is_at(descriptor, Path(path)):
            break
        os.close(descriptor)
    try:
        yield state_of(descriptor)
    finally:
        release(descriptor)
        os.close(descriptor)
