"""Where files are: a path of this machine, a URL that fsspec has a driver for, or the Hub.

`place` is what everything that reads asks. It gives a `Path`: an ordinary one, or a `FarPath`,
which answers the same questions (`is_file`, `iterdir`, `open`, ...) over the network and reads the
ranges that are asked for. What needs a file on this machine asks `fetched`, what writes `writable`.

What is elsewhere, and how it comes here, are one file: nobody else asks where something is.
fsspec and huggingface_hub are imported when a URL is met, and never before.
"""

from __future__ import annotations

import atexit
import errno
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.errors import BrokenFileError, FileError, MissingPackageError, OutputError
from lora_param.files.hub import find_cached

__all__ = ["FarPath", "copy_file", "fetched", "files_below", "is_far", "place", "writable"]

PathLike = str | os.PathLike[str]

_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*::)*([a-z][a-z0-9+.-]+):(//?)")
_SLASH = re.compile(r"^([a-z][a-z0-9+.-]+):/(?!/)")
_LOCAL = ("file", "local")
_BUFFER = 1 << 16  # bytes that the first read asks for: most headers are in them
_PIECE = 1 << 23  # of a copy

if TYPE_CHECKING:
    _System = Path
else:
    _System = type(Path())


def place(path: PathLike) -> Path:
    """The path, or what stands for it elsewhere.

    Args:
        path: a path of this machine, `file://`, `hf://owner/name[@revision][/inside]`, or another
            URL of fsspec's. A URL that went through `Path`, and so lost a slash, is one as well.

    Raises:
        MissingPackageError: fsspec or huggingface_hub is needed and not installed.
        BrokenFileError: the Hub cannot be asked, and has not been before.

    >>> place("model.safetensors").name
    'model.safetensors'
    """
    if isinstance(path, FarPath):
        return path
    scheme = _scheme(path)
    if scheme is None:
        return Path(path)
    if scheme in _LOCAL:
        return Path("/" + os.fspath(path).partition(":")[2].lstrip("/"))
    if scheme == "hf":
        found = find_cached(FarPath(path).url)
        return FarPath(found) if isinstance(found, str) else found
    return FarPath(path)


def is_far(path: PathLike) -> bool:
    """The path is a URL of something that is not on this machine (or in the Hub's cache)."""
    return _scheme(path) not in (None, *_LOCAL)


def writable(path: PathLike) -> Path:
    """The path of an output.

    Raises:
        OutputError: it is not on this machine.
    """
    if is_far(path):
        raise OutputError(
            FarPath(path), "it is not on this machine; write to a path here, then copy it there"
        )
    return place(path)


def _scheme(path: PathLike) -> str | None:
    """The scheme of a URL; None for a path."""
    if isinstance(path, FarPath):
        return path.scheme
    text = os.fspath(path)
    match = _URL.match(text.replace(os.sep, "/"))
    if match is None:
        return None
    if match[2] == "/" and (
        isinstance(path, str)
        or Path(Path(text).parts[0]).exists()  # a directory with a colon in its name
        or match[1] not in _known_schemes()
    ):
        return None
    return match[1]


def _known_schemes() -> frozenset[str]:
    try:
        from fsspec import registry
        from fsspec.registry import known_implementations
    except ImportError:
        return frozenset(("hf", *_LOCAL))
    return frozenset((*registry, *known_implementations))


class FarPath(_System):
    """A URL that answers as a `Path` does; nothing of it is on this machine.

    Its text is the URL, so that what knows nothing of it finds no file of that name. Every method
    that asks the other side raises BrokenFileError where that fails in another way than that there
    is nothing.
    """

    @property
    def url(self) -> str:
        """The URL, with the slash that a path loses."""
        parts = _System.__str__(self).replace(os.sep, "/").split("::")
        return "::".join(_SLASH.sub(r"\1://", part) for part in parts)

    @property
    def scheme(self) -> str:
        """Of the driver: `s3` of `s3://`."""
        match = _URL.match(self.url)
        return match[1] if match else ""

    def __str__(self) -> str:
        return self.url

    def __fspath__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"FarPath({self.url!r})"

    @contextmanager
    def _asked(self) -> Iterator[tuple[Any, str]]:
        """The driver, and what it calls this."""
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise MissingPackageError(self.url, "fsspec", "lora_param[remote]") from None
        try:
            yield url_to_fs(self.url)
        except FileNotFoundError:
            reason = os.strerror(errno.ENOENT)
            raise FileNotFoundError(errno.ENOENT, reason, self.url) from None
        except FileError:
            raise
        except Exception as error:
            # Each driver has exceptions of its own, from as many libraries.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise BrokenFileError(self.url, reason) from error

    def _info(self) -> dict[str, Any]:
        with self._asked() as (fs, key):
            info: dict[str, Any] = dict(fs.info(key))
            # To HTTP everything is a file; a page of links is what it has for a directory.
            if info.get("mimetype") == "text/html" and fs.isdir(key):
                info["type"] = "directory"
            return info

    def stat(self, **_: Any) -> os.stat_result:
        """Its kind and size, and as inode and time of change a number that changes with it."""
        info = self._info()
        kind = stat.S_IFDIR | 0o755 if info["type"] == "directory" else stat.S_IFREG | 0o644
        marks = sorted((k, str(v)) for k, v in info.items() if k != "last_commit")
        mark = int.from_bytes(sha256(repr(marks).encode()).digest()[:7], "big")
        numbers = (kind, mark, 0, 1, 0, 0, info.get("size") or 0, 0, 0, 0)
        return os.stat_result(numbers, {"st_mtime_ns": mark})

    def exists(self, **_: Any) -> bool:
        """There is something."""
        return self._type() is not None

    def is_file(self, **_: Any) -> bool:
        """It is a file."""
        return self._type() == "file"

    def is_dir(self, **_: Any) -> bool:
        """It has files in it."""
        return self._type() == "directory"

    def _type(self) -> str | None:
        try:
            return str(self._info()["type"])
        except FileNotFoundError:
            return None

    def iterdir(self) -> Generator[FarPath, None, None]:
        """What is in it."""
        with self._asked() as (fs, key):
            names = [name.rstrip("/").rpartition("/")[2] for name in fs.ls(key, detail=False)]
        yield from (self / name for name in dict.fromkeys(names) if name)

    def files(self) -> Iterator[FarPath]:
        """Every file in it, at any depth."""
        for path in self.iterdir():
            yield from path.files() if path.is_dir() else (path,)

    def open(self, mode: str = "r", buffering: int = -1, *text: Any, **texts: Any) -> Any:
        """An open file that reads by ranges."""
        if mode not in ("r", "rt", "rb"):
            raise OutputError(self.url, "it is not on this machine")
        raw = _FarFile(self)
        if buffering == 0:
            return raw
        buffered = io.BufferedReader(raw, _BUFFER)
        return buffered if mode == "rb" else io.TextIOWrapper(buffered, *text, **texts)

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        if start >= stop:
            return b""
        with self._asked() as (fs, key):
            data = _read_range(fs, key, start, stop)
        if len(data) > stop - start:
            raise BrokenFileError(self.url, "its server gives no ranges; download it first")
        if len(data) < stop - start:
            raise BrokenFileError(self.url, "it became shorter")
        return data


def _read_range(fs: Any, key: str, start: int, stop: int) -> bytes:
    from fsspec import AbstractFileSystem

    if getattr(fs.cat_file, "__func__", None) is AbstractFileSystem.cat_file:
        # What a driver without one of its own inherits reads megabytes ahead.
        with fs.open(key, "rb", cache_type="none") as file:
            file.seek(start)
            data: bytes = file.read(stop - start)
    else:
        data = fs.cat_file(key, start=start, end=stop)
    return data


class _FarFile(io.RawIOBase):
    """A file that is read by ranges."""

    def __init__(self, path: FarPath) -> None:
        info = path._info()
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path.url)
        if info.get("size") is None:
            raise BrokenFileError(path.url, "its server does not tell its size; download it first")
        self.name, self._path = path.url, path
        self._size, self._at = int(info["size"]), 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        """The place."""
        return self._at

    def readall(self) -> bytes:
        """What is left, at once."""
        data = self._path.read_range(self._at, self._size)
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as there is something."""
        stop = min(self._at + len(buffer), self._size)
        data = self._path.read_range(self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


# --- to this machine --------------------------------------------------------------------------


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a directory, at any depth."""
    if isinstance(folder, FarPath):
        return folder.files()
    return (path for path in folder.rglob("*") if path.is_file())


def copy_file(source: Path, target: Path) -> None:
    """Copy one file to a new place on this machine."""
    with source.open("rb", buffering=0) as opened, target.open("xb") as file:
        shutil.copyfileobj(opened, file, _PIECE)


@cache
def _downloads() -> Path:
    """A directory that is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="lora_param-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def fetched(path: Path) -> Path:
    """A file of this machine with the same content and name: itself, or a copy for the time being.

    For the kinds of files that are read as a whole, or through a library that takes paths alone.

    Raises:
        FileNotFoundError, BrokenFileError: it cannot be read.
    """
    if not isinstance(path, FarPath):
        return path
    mark = sha256(f"{path.url} {path.stat().st_ino}".encode()).hexdigest()[:16]
    copy = _downloads() / mark / path.name
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        part = copy.with_name(f"{copy.name}.part")
        part.unlink(missing_ok=True)
        copy_file(path, part)
        part.replace(copy)
    return copy
