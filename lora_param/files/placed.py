"""Bytes put at their place in a file, by several threads at once, in the kernel where it can.

`copy_file_range`, `posix_fallocate` and reflinks are Linux's; where they are missing, the bytes are
read and written plainly. Files are opened for reading and writing, and unbuffered.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lora_param.errors import BrokenFileError
from lora_param.files.places import is_far, place

if sys.platform == "linux":
    import fcntl

__all__ = ["PlacedFile", "clone_file", "open_placed"]

_PIECE = 1 << 20  # of a plain copy: stays in cache
_FAR_PIECE = 1 << 23  # of one from elsewhere: asks less often
_FICLONE = 0x40049409
_FAILURES = {errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT}
_NOT_HERE = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENODEV}


class PlacedFile:
    """A file of a known size, filled in any order.

    Args:
        file: open for reading and writing, empty.
        size: what it will have. The room is reserved at once, so that a full disk is seen first.

    Raises:
        OSError: there is no room.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self.file = file
        self._lock = threading.Lock()
        file.flush()
        file.truncate(size)
        if size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of the data at an offset."""
        if not hasattr(os, "pwrite"):
            with self._lock:
                self.file.seek(offset)
                self.file.write(data)
                self.file.flush()
            return
        view = memoryview(data)
        while len(view):
            done = os.pwrite(self.file.fileno(), view, offset)
            view, offset = view[done:], offset + done

    def copy(
        self,
        source: str | os.PathLike[str],
        start: int,
        stop: int,
        offset: int,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Copy bytes `start` to `stop` of another file to an offset.

        Args:
            progress: called with the number of bytes just copied.

        Raises:
            BrokenFileError: the source ends before, or cannot be read.
        """
        with place(source).open("rb", buffering=0) as opened:
            piece = _FAR_PIECE if is_far(source) else _PIECE
            in_kernel = hasattr(os, "copy_file_range")
            while start < stop:
                done = 0
                if in_kernel:
                    done = self._copy_in_kernel(opened, start, stop - start, offset)
                    in_kernel = done > 0
                if not done:
                    opened.seek(start)
                    data = opened.read(min(piece, stop - start))
                    if not data:
                        raise BrokenFileError(source, "it became shorter")
                    self.write(data, offset)
                    done = len(data)
                start, offset = start + done, offset + done
                if progress is not None:
                    progress(done)

    def _copy_in_kernel(self, source: IO[bytes], start: int, count: int, offset: int) -> int:
        """Bytes copied; 0 where it cannot: across file systems, not implemented, or at the end."""
        try:
            return os.copy_file_range(source.fileno(), self.file.fileno(), count, start, offset)
        except OSError as error:
            if error.errno in _FAILURES:
                raise
            return 0


def open_placed(path: Path) -> IO[bytes]:
    """Open a new file for reading and writing; or go on with one that another process began."""
    return path.open("r+b" if path.exists() else "x+b")


def clone_file(source: str | os.PathLike[str], target: IO[bytes]) -> bool:
    """Have an empty file share the blocks of another until one is written to (a reflink).

    False where the file system cannot (it takes XFS, Btrfs, ZFS, bcachefs, ... and one volume).
    """
    if sys.platform != "linux":
        return False
    if is_far(source):
        return False
    with Path(source).open("rb") as opened:
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, opened.fileno())
        except OSError as error:
            if error.errno in _FAILURES:
                raise
            return False
    return True
