"""Output that is there whole or not at all: written beside its place, then renamed into it.

A reader, a crash, a full disk or a killed process sees the old file (or directory) or the new one.
What a killed process leaves behind is a hidden `.NAME.MACHINE.XXXXXXXX.tmp` in the same directory;
its lock is gone with the process, and so the next write to the same place removes it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

from lora_param.errors import BrokenFileError, FileError, OutputError, escaped, worded
from lora_param.files.locks import HAS_LOCKS, State, locked, state_of
from lora_param.files.places import writable
from lora_param.files.renaming import exchange, rename_new, sync_directory, sync_tree
from lora_param.files.temporaries import beside, delete, made, opened, remove_stale

__all__ = ["RESULT", "check_output", "copy_range", "replace_directory", "replace_file"]
__all__ += ["replace_in_steps"]

_CHUNK = 1 << 25


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
            raise OutputError(path, _exists())
    parent = real.parent
    if not parent.is_dir():
        wrong = "is not a directory" if parent.exists() else "does not exist"
        what = parent if parent.exists() else f"the directory {parent}"
        raise OutputError(path, f"{what} {wrong}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(path, f"the directory {parent} is not writable")
    return real


def _exists() -> str:
    return f"it exists; replace it with {worded('force=True', '--force')}"


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
    remove_stale(real)
    with _cleaned(path, beside(real)) as temporary, opened(temporary) as file:
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
                rename_new(temporary, real)
        if sync:
            sync_directory(real.parent)


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
    left = remove_stale(real, resumes)
    temporary = beside(real) if left is None else left[0]
    out = temporary / RESULT
    with _cleaned(path, temporary, out), made(temporary, left and left[1]):
        yield temporary
        if real.exists():
            out.chmod(stat.S_IMODE(real.stat().st_mode))
        if sync:
            sync_tree(out)
        with locked(real) if replaces is None else nullcontext():
            _check_state(path, real, replaces)
            if not force or not real.exists():
                rename_new(out, real)
            elif directory:
                exchange(out, real)
            else:
                out.replace(real)
        if sync:
            sync_directory(real.parent)


def _check_state(path: object, real: Path, replaces: State | None) -> None:
    if replaces is not None and state_of(real) != replaces:
        raise OutputError(path, "another process changed it meanwhile; try again")


# --- temporaries ------------------------------------------------------------------------------


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
        reason = _exists() if isinstance(error, FileExistsError) else error.strerror
        raise OutputError(path, reason or str(error)) from error
    except RuntimeError as error:
        # torch.save, closing its archive after a write that failed, says nothing of why it did.
        if isinstance(error.__context__, OSError):
            raise OutputError(path, str(error.__context__.strerror)) from error
        raise
    finally:
        delete(temporary)


# --- renaming ---------------------------------------------------------------------------------


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
