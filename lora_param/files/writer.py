"""Output that is there whole or not at all: written beside its place, then renamed into it.

A reader, a crash, a full disk or a killed process sees the old file (or directory) or the new one.
What a killed process leaves behind is a hidden `.NAME.XXXXXXXX.tmp` in the same directory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from lora_param.errors import BrokenFileError, FileError, OutputError

__all__ = ["check_output", "copy_range", "replace_directory", "replace_file"]

_CHUNK = 1 << 25
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def check_output(path: str | os.PathLike[str], *, force: bool, directory: bool = False) -> Path:
    """The real path that would be written; symbolic links are followed.

    Args:
        path: the output asked for.
        force: an output that exists may be replaced.
        directory: the output is a directory.

    Raises:
        OutputError: it exists (without force), is a directory where a file is to be written or
            the reverse, or the directory that would hold it is missing or not writable.
    """
    real = Path(os.path.realpath(path))
    if real.exists():
        if real.is_dir() != directory:
            wanted = "a directory" if directory else "a file"
            raise OutputError(path, f"it is not {wanted}, and {wanted} is what would be written")
        if not directory and not real.is_file():
            raise OutputError(path, "it is not a regular file")
        if not force:
            raise OutputError(path, "it exists; replace it with force=True (--force)")
    parent = real.parent
    if not parent.is_dir():
        wrong = "is not a directory" if parent.exists() else "does not exist"
        what = parent if parent.exists() else f"the directory {parent}"
        raise OutputError(path, f"{what} {wrong}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(path, f"the directory {parent} is not writable")
    return real


@contextmanager
def replace_file(
    path: str | os.PathLike[str], *, force: bool = False, sync: bool = True
) -> Iterator[IO[bytes]]:
    """An open binary file that takes the place of `path` when the block ends without exception.

    A file that is replaced keeps its mode; a new one obeys the umask. The file can be read, too.

    Args:
        path: where it goes; a symbolic link is followed.
        force: replace a file that exists.
        sync: have the data on the disk before the name shows them.

    Raises:
        OutputError: see `check_output`; or the writing failed, for want of space for one.
    """
    real = check_output(path, force=force)
    temporary = _beside(real)
    with _cleaned(path, temporary):
        with temporary.open("x+b") as file:
            if real.exists():
                temporary.chmod(stat.S_IMODE(real.stat().st_mode))
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(real)
        if sync:
            _sync_directory(real.parent)


@contextmanager
def replace_directory(
    path: str | os.PathLike[str], *, force: bool = False, sync: bool = True
) -> Iterator[Path]:
    """An empty directory that takes the place of `path` when the block ends without exception.

    A directory that is replaced is exchanged in one step where the system can (Linux), else moved
    aside first and moved back should the second step fail; then it is deleted.

    Raises:
        OutputError: see `check_output`; or the writing failed.
    """
    real = check_output(path, force=force, directory=True)
    temporary = _beside(real)
    with _cleaned(path, temporary):
        temporary.mkdir()
        yield temporary
        if real.exists():
            temporary.chmod(stat.S_IMODE(real.stat().st_mode))
        if sync:
            _sync_tree(temporary)
        if real.exists():
            _exchange(temporary, real)
        else:
            temporary.rename(real)
        if sync:
            _sync_directory(real.parent)


def _beside(real: Path) -> Path:
    # The name is cut so that a long one stays within what file systems take.
    return real.with_name(f".{real.name[:200]}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _cleaned(path: object, temporary: Path) -> Iterator[None]:
    """Delete what is left of the temporary output; say which output it was that failed."""
    try:
        yield
    except FileError:
        raise  # already a sentence of its own, about a file that was read perhaps
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories, in one step where the system has one."""
    if sys.platform == "linux" and _rename_exchange(new, old):
        return
    aside = _beside(old)
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)


def _rename_exchange(a: Path, b: Path) -> bool:
    """renameat2(2) with RENAME_EXCHANGE; False where the kernel or file system has none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    rename.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(b))


def _sync_directory(path: Path) -> None:
    # Some systems cannot open or sync a directory; the rename is then as durable as they make it.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for directory, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(Path(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _sync_directory(Path(directory))


def copy_range(
    source: IO[bytes],
    target: IO[bytes],
    start: int,
    stop: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Copy bytes `start` to `stop` of `source` to where `target` stands, in the kernel if it can.

    Raises:
        BrokenFileError: the source ends before.
    """
    target.flush()
    in_kernel = hasattr(os, "copy_file_range")
    while start < stop:
        count = min(_CHUNK, stop - start)
        if in_kernel:
            try:
                done = os.copy_file_range(source.fileno(), target.fileno(), count, start)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT):
                    raise
                in_kernel = False  # across file systems, or not implemented
                continue
        else:
            source.seek(start)
            data = source.read(count)
            target.write(data)
            done = len(data)
        if done == 0:
            raise BrokenFileError(getattr(source, "name", "the file"), "it became shorter")
        start += done
        if progress is not None:
            progress(done)
    # The kernel moved the descriptor's position behind the file object's back.
    target.seek(0, os.SEEK_END)
