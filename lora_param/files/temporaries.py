"""The hidden file or directory beside an output, into which it is written before its renaming.

Its name is `.NAME.MACHINE.XXXXXXXX.tmp`, and it is locked while its process lives. What a killed
process left has no lock, and so the next write to the same place removes it, or goes on with it.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from lora_param.files.locks import HAS_LOCKS, is_at, release, take

__all__ = ["beside", "delete", "made", "opened", "remove_stale"]

_LONGEST = 200  # bytes of a name in that of its temporary: file systems take 255 in all


_BOOT = Path("/proc/sys/kernel/random/boot_id")


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


def beside(real: Path, end: str = "tmp") -> Path:
    """A new hidden name in the same directory."""
    return real.with_name(f"{_prefix(real)}{''.join(_machine())}.{secrets.token_hex(4)}.{end}")


def remove_stale(
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
                delete(temporary)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
    return None


def delete(temporary: Path) -> None:
    """Delete a temporary file or directory, if it is there."""
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        temporary.unlink(missing_ok=True)


@contextmanager
def opened(temporary: Path) -> Iterator[IO[bytes]]:
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
def made(temporary: Path, descriptor: int | None = None) -> Iterator[None]:
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
