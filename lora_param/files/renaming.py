"""Renaming an output into its place in one step, and having the disk know of it."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

from lora_param.files.temporaries import beside

__all__ = ["exchange", "rename_new", "sync_directory", "sync_file", "sync_tree"]

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def rename_new(new: Path, place: Path) -> None:
    """Rename, and never onto what is there already, though it came a moment ago.

    Raises:
        FileExistsError: something is there.
    """
    if _renameat2(new, place, _RENAME_NOREPLACE):
        return
    if not new.is_dir():
        try:
            os.link(new, place)  # the temporary name goes when it is cleaned
            return
        except FileExistsError:
            raise
        except OSError:
            pass  # a file system without links
    if place.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
    new.rename(place)


def exchange(new: Path, old: Path) -> None:
    """Swap two directories, in one step where the system has one."""
    if _renameat2(new, old, _RENAME_EXCHANGE):
        return
    aside = beside(old, "old")
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _renameat2(a: Path, b: Path, flags: int) -> bool:
    """renameat2(2) with flags; False where the kernel or file system has none."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def sync_directory(path: Path) -> None:
    """Have a directory's names on the disk."""
    # Some systems cannot open or sync a directory; the rename is then as durable as they make it.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sync_tree(root: Path) -> None:
    """A file, or a directory and all that is in it."""
    if not root.is_dir():
        sync_file(root)
    for directory, _, names in os.walk(root):
        for name in names:
            sync_file(Path(directory, name))
        sync_directory(Path(directory))


def sync_file(path: Path) -> None:
    """Have a file's data on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
