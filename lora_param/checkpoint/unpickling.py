"""What a file of `torch.save` holds, read without running its code."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path
from typing import IO, Any

from lora_param.errors import (
    BrokenFileError,
    FileError,
    MissingFileError,
    UnknownFileError,
    UnsafePickleError,
)
from lora_param.files.places import place

__all__ = ["check_archive", "is_zip", "load_pickle"]


def is_zip(path: str | os.PathLike[str]) -> bool:
    """The file begins as a zip archive, which is what torch.save writes since 1.6."""
    with place(path).open("rb", buffering=0) as file:
        return file.read(4) == b"PK\x03\x04"


def load_pickle(path: Path) -> Any:
    """What a file of torch.save holds, on the CPU; runs none of its code.

    Raises:
        MissingFileError, BrokenFileError, UnsafePickleError, UnknownFileError: see
            `PickleCheckpoint`.
    """
    import torch

    try:
        zipped = is_zip(path)
        if path.stat().st_size == 0:
            raise BrokenFileError(path, "it is empty")
    except FileNotFoundError:
        raise MissingFileError(path, "a file written by torch.save") from None
    except FileError:
        raise
    except OSError as error:
        raise BrokenFileError(path, error.strerror or str(error)) from error
    if zipped:
        with path.open("rb") as file:
            check_archive(file, path)
    try:
        with warnings.catch_warnings():
            # Of pickle protocols, sparse and quantized tensors, storages read by older means: what
            # torch then makes of them is checked like the rest.
            warnings.simplefilter("ignore")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the strings of damaged bytes
            needs = _unsafe_globals(path, zipped)
        if needs:
            raise UnsafePickleError(path, f"it needs {needs[0]}") from None
        raise BrokenFileError(path, "it is no file of torch.save, or is damaged") from None
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).split("\n")[0].strip() or type(error).__name__
        raise BrokenFileError(path, f"it is truncated or damaged ({reason[:160]})") from None
    except Exception as error:
        # The unpickler does what the bytes say, on values of any type: what it trips over in bytes
        # that are damaged can be any exception that Python has.
        raise BrokenFileError(path, f"it is damaged ({type(error).__name__})") from None


def check_archive(file: IO[bytes], path: Path) -> None:
    """A whole zip archive of torch.save, of no more bytes than the open file has.

    torch.save compresses nothing: a record that is inflated may take all memory, and the data of a
    tensor would be read as they lie in the file.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise BrokenFileError(path, f"it is a truncated or damaged zip archive ({error})") from None
    names = [record.filename for record in records]
    if any(name.endswith("/constants.pkl") for name in names):
        raise UnknownFileError(
            path,
            "a TorchScript archive, which is a program",
            "a state dict: save torch.jit.load(path).state_dict() with safetensors or torch.save",
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise UnknownFileError(path, "a zip archive of another kind", "a file of torch.save")
    size = file.seek(0, os.SEEK_END)
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size > size:
            raise BrokenFileError(
                path,
                f"its record {record.filename} is compressed, to {record.compress_size:,} bytes of "
                f"{record.file_size:,}, as torch.save never does",
            )


def _unsafe_globals(path: Path, zipped: bool) -> list[str]:
    """What a file needs that is not allowed, as far as its opcodes can be read; [] if they can't.

    torch looks into archives of its own alone, so that the pickle of an older file is shown to it
    in such a one. Of pickles that torch does not write, every global is listed.
    """
    from torch.serialization import get_unsafe_globals_in_checkpoint

    source: Any = path
    try:
        if not zipped:
            source = io.BytesIO()
            with zipfile.ZipFile(source, "w") as archive:
                archive.writestr("archive/data.pkl", _last_pickle(path))
                archive.writestr("archive/version", "3")
            source.seek(0)
        return sorted(get_unsafe_globals_in_checkpoint(source))
    except Exception:  # of damaged bytes, see load_pickle
        return _plain_pickle_globals(path)


def _last_pickle(path: Path) -> bytes:
    """Of the pickles in which torch.save wrote a file before 1.6, the fourth: the content."""
    with path.open("rb") as file:
        for _ in range(3):
            for _ in pickletools.genops(file):
                pass
        start = file.tell()
        for _ in pickletools.genops(file):
            pass
        stop = file.tell()
        file.seek(start)
        return file.read(stop - start)


def _plain_pickle_globals(path: Path) -> list[str]:
    """The globals that a plain pickle names, found by reading its opcodes; [] if it is none."""
    found: list[str] = []
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    found.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    found.append(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    except (ValueError, UnicodeError, IndexError, OSError, OverflowError, struct.error):
        return []
    return found
