"""Output that is there whole or not at all: written beside its place, then renamed into it.

A reader, a crash, a full disk or a killed process sees the old file (or directory) or the new one.
What a killed process leaves behind is a hidden `.NAME.MACHINE.XXXXXXXX.tmp` in the same directory;
its lock is gone with the process, and so the next write to the same place removes it.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO

from lora_param.errors import BrokenFileError, FileError, OutputError, escaped
from lora_param.files.locks import HAS_LOCKS, State, is_at, locked, release, state_of, take
from lora_param.files.places import writable

__all__ = ["RESULT", "check_output", "copy_range", "replace_directory", "replace_file"]
__all__ += ["replace_in_steps"]

_CHUNK = 1 << 25
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_LONGEST = 200  # bytes of a name in that of its temporary: file systems take 255 in all
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_EXISTS = "it exists; replace it with force=True (--force)"


RESULT = "result"
"""The name of what takes its place, in the temporary directory of `replace_in_steps`."""


def check_output(path: str | os.PathLike[str], *, force: bool, directory: bool = False) -> Path:
    """The real path that would be written; symbolic links are followed.

    Args:
        path: the output asked for.
        force: an output that exists may be replaced.
        directory: the output is a directory.

    Raises:
        OutputError: it exists (without force), is a directory where a file is to be written or
            the reverse, or the directory that would hold it is missing, not writable or not on
            this machine.
    """
    path = writable(path)
    try:
        real = Path(os.path.realpath(path))
        exists = real.exists()
    except (OSError, ValueError) as error:  # a name too long, or with a zero byte in it
        raise OutputError(path, getattr(error, "strerror", None) or str(error)) from None
    if exists:
        if real.is_dir() != directory:
            wanted = "a directory" if directory else "a file"
            raise OutputError(path, f"it is not {wanted}, and {wanted} is what would be written")
        if not directory and not real.is_file():
            raise OutputError(path, "it is not a regular file")
        if not force:
            raise OutputError(path, _EXISTS)
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
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    sync: bool = True,
    replaces: State | None = None,
) -> Iterator[IO[bytes]]:
    """An open binary file that takes the place of `path` when the block ends without exception.

    A file that is replaced keeps its mode; a new one obeys the umask. The file can be read, too.

    Args:
        path: where it goes; a symbolic link is followed.
        force: replace a file that exists. Without it, one that appears meanwhile is kept as well.
        sync: have the data on the disk before the name shows them.
        replaces: the state of the file that was read to write this one, from `locked`, whose
            block this is in: another is not replaced.

    Raises:
        OutputError: see `check_output`; or the writing failed, for want of space for one.
    """
    real = check_output(path, force=force)
    _remove_stale(real)
    with _cleaned(path, _beside(real)) as temporary, _opened(temporary) as file:
        if real.exists():
            temporary.chmod(stat.S_IMODE(real.stat().st_mode))
        yield file
        file.flush()
        if sync:
            os.fsync(file.fileno())
        if not HAS_LOCKS:
            file.close()  # such a system renames no open file
        with locked(real) if replaces is None else nullcontext():
            _check_state(path, real, replaces)
            if force:
                temporary.replace(real)
            else:
                _rename_new(temporary, real)
        if sync:
            _sync_directory(real.parent)


@contextmanager
def replace_directory(
    path: str | os.PathLike[str],
    *,
    force: bool = False,
    sync: bool = True,
    replaces: State | None = None,
) -> Iterator[Path]:
    """An empty directory that takes the place of `path` when the block ends without exception.

    A directory that is replaced is exchanged in one step where the system can (Linux), else moved
    aside first and moved back should the second step fail; then it is deleted. A process killed
    between these two steps leaves the old one as a hidden `.NAME.….old`, which nobody deletes.

    Args:
        path, force, sync, replaces: as for `replace_file`.

    Raises:
        OutputError: see `check_output`; or the writing failed.
    """
    with replace_in_steps(
        path, directory=True, force=force, sync=sync, replaces=replaces
    ) as temporary:
        out = temporary / RESULT
        out.mkdir()
        yield out


@contextmanager
def replace_in_steps(
    path: str | os.PathLike[str],
    *,
    directory: bool,
    force: bool = False,
    sync: bool = True,
    replaces: State | None = None,
    resumes: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """A hidden directory beside `path`, whose `RESULT` takes the place when the block ends.

    What else is in it is deleted then. After a kill all of it is left, for another process to go on
    with, in the same run of the system: after a crash, files may lack what was written to them.

    Args:
        path, force, sync, replaces: as for `replace_file`, or `replace_directory`.
        directory: the result is a directory.
        resumes: asked of what a killed process left of this output: true where it is gone on with
            instead of an empty one. What it does not want is deleted.

    Raises:
        OutputError: see `check_output`; or the writing failed.
    """
    real = check_output(path, force=force, directory=directory)
    left = _remove_stale(real, resumes)
    temporary = _beside(real) if left is None else left[0]
    out = temporary / RESULT
    with _cleaned(path, temporary, out), _made(temporary, left and left[1]):
        yield temporary
        if real.exists():
            out.chmod(stat.S_IMODE(real.stat().st_mode))
        if sync:
            _sync_tree(out)
        with locked(real) if replaces is None else nullcontext():
            _check_state(path, real, replaces)
            if not force or not real.exists():
                _rename_new(out, real)
            elif directory:
                _exchange(out, real)
            else:
                out.replace(real)
        if sync:
            _sync_directory(real.parent)


def _check_state(path: object, real: Path, replaces: State | None) -> None:
    if replaces is not None and state_of(real) != replaces:
        raise OutputError(path, "another process changed it meanwhile; try again")


# --- temporaries ------------------------------------------------------------------------------


@cache
def _machine() -> tuple[str, str]:
    """Marks of this run of the system and of this machine's name.

    A lock tells a living process from a dead one where both are of one system: containers of one
    run share its mark, one machine before and after a crash shares its name.
    """
    try:
        boot = _BOOT.read_bytes()
    except OSError:
        boot = b""
    return tuple(  # type: ignore[return-value]
        hashlib.sha256(b"lora_param" + mark).hexdigest()[:6]
        for mark in (boot, os.fsencode(platform.node()))
    )


def _prefix(real: Path) -> str:
    name = real.name
    while len(os.fsencode(name)) > _LONGEST:
        name = name[:-1]
    return f".{name}."


def _beside(real: Path, end: str = "tmp") -> Path:
    return real.with_name(f"{_prefix(real)}{''.join(_machine())}.{secrets.token_hex(4)}.{end}")


def _remove_stale(
    real: Path, resumes: Callable[[Path], bool] | None = None
) -> tuple[Path, int] | None:
    """Remove what processes that were killed on this machine left of the same output.

    For certain: a process that lives holds the lock of its temporary. Whatever cannot be looked
    at, locked or removed is left alone, for it must not keep the new output from being written.

    Returns:
        One that `resumes` wants, and a descriptor that holds its lock.
    """
    form = re.compile(re.escape(_prefix(real)) + r"([0-9a-f]{6})([0-9a-f]{6})\.[0-9a-f]{8}\.tmp")
    boot, node = _machine()
    kept: tuple[Path, int] | None = None
    with suppress(OSError):
        for name in os.listdir(real.parent):  # noqa: PTH208  names alone are needed
            found = form.fullmatch(name)
            if found and (found[1] == boot or found[2] == node):
                alive = found[1] == boot and _BOOT.is_file()  # what it wrote is sure to be there
                wanted = resumes if alive and kept is None else None
                kept = _take_or_remove(real.with_name(name), wanted) or kept
    return kept


def _take_or_remove(
    temporary: Path, resumes: Callable[[Path], bool] | None
) -> tuple[Path, int] | None:
    with suppress(OSError):
        descriptor = os.open(temporary, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        try:
            if take(descriptor) and is_at(descriptor, temporary):
                if resumes is not None and temporary.is_dir() and resumes(temporary):
                    descriptor, taken = -1, descriptor
                    return temporary, taken
                _delete(temporary)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    return None


def _delete(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


@contextmanager
def _cleaned(path: object, temporary: Path, out: Path | None = None) -> Iterator[Path]:
    """Delete what is left of the temporary output; say which output it was that failed."""
    shown = temporary if out is None else out
    try:
        yield temporary
    except FileError as error:
        # A sentence of its own, which may know the output under its temporary name alone.
        told = str(error).replace(escaped(str(shown)), escaped(str(path)))
        error.args = (told,)
        raise
    except OSError as error:
        reason = _EXISTS if isinstance(error, FileExistsError) else error.strerror
        raise OutputError(path, reason or str(error)) from error
    except RuntimeError as error:
        # torch.save, closing its archive after a write that failed, says nothing of why it did.
        if isinstance(error.__context__, OSError):
            raise OutputError(path, str(error.__context__.strerror)) from error
        raise
    finally:
        _delete(temporary)


@contextmanager
def _opened(temporary: Path) -> Iterator[IO[bytes]]:
    """The temporary file, new, and locked while it is open."""
    while True:
        with temporary.open("x+b") as file:
            # Between the two steps, another process may have taken it for a dead one's.
            if take(file.fileno()) is not False and is_at(file.fileno(), temporary):
                yield file
                if not file.closed:
                    release(file.fileno())
                return


@contextmanager
def _made(temporary: Path, descriptor: int | None = None) -> Iterator[None]:
    """The temporary directory, locked: a new one, or one whose lock a descriptor holds."""
    while descriptor is None:
        temporary.mkdir()
        if not HAS_LOCKS:
            yield
            return
        with suppress(FileNotFoundError):  # taken for a dead one's, as above
            descriptor = os.open(temporary, os.O_RDONLY)
            if take(descriptor) is False or not is_at(descriptor, temporary):
                os.close(descriptor)
                descriptor = None
    try:
        yield
        release(descriptor)
    finally:
        os.close(descriptor)


# --- renaming ---------------------------------------------------------------------------------


def _rename_new(new: Path, place: Path) -> None:
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


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories, in one step where the system has one."""
    if _renameat2(new, old, _RENAME_EXCHANGE):
        return
    aside = _beside(old, "old")
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


def _sync_directory(path: Path) -> None:
    # Some systems cannot open or sync a directory; the rename is then as durable as they make it.
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_tree(root: Path) -> None:
    """A file, or a directory and all that is in it."""
    if not root.is_dir():
        _sync_file(root)
    for directory, _, names in os.walk(root):
        for name in names:
            _sync_file(Path(directory, name))
        _sync_directory(Path(directory))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
