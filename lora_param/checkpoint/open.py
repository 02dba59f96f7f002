"""From a path to a `Checkpoint`, by name and, where the name says nothing, by content."""

from __future__ import annotations

import os
from pathlib import Path

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.distributed import DistributedCheckpoint
from lora_param.checkpoint.gguf import GgufCheckpoint
from lora_param.checkpoint.module import ModuleCheckpoint
from lora_param.checkpoint.pickle import SUFFIXES, PickleCheckpoint
from lora_param.checkpoint.quantized.logical import logical
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint, find_weights
from lora_param.errors import (
    BrokenFileError,
    MissingFileError,
    OptionError,
    UnknownFileError,
    worded,
)
from lora_param.files.distributed import METADATA
from lora_param.files.gguf import MAGIC
from lora_param.files.header import TORCH_SAVE
from lora_param.files.places import fetched, place

__all__ = ["ACCEPTED", "open_checkpoint"]

ACCEPTED = (
    "a .safetensors, .gguf, .pt, .pth, .bin or .ckpt file, a directory with one or with shards and "
    "their index.json or a distributed checkpoint, hf://owner/name or another URL of one, or "
    "python:package.module:callable"
)


def open_checkpoint(path: str | os.PathLike[str], key: str | None = None) -> Checkpoint:
    """Open the weights at a path, without reading them.

    Quantized weights of a format that is known have the names, shapes and dtypes of the model.

    Args:
        path: a file, a directory or an `index.json` of shards, or a URL of one of these (see
            `place`); or `python:package.module:callable`.
        key: dotted name of the state dict in a pickle that nests it; by default the one found.

    Raises:
        MissingFileError: there is nothing at this path.
        UnknownFileError: it is of no kind that is known.
        BrokenFileError, UnsafePickleError: it cannot, or must not, be read.
        OptionError: there is no state dict of this key.
    """
    return logical(_open_stored(path, key))


def _open_stored(path: str | os.PathLike[str], key: str | None) -> Checkpoint:
    """The weights as they are stored, quantized ones too."""
    text = os.fspath(path)
    if text.startswith("python:"):
        return _without_key(ModuleCheckpoint(text), key)
    path = place(path)
    if not text:  # Path("") is the current directory
        raise MissingFileError("the empty path ''", ACCEPTED)
    if not path.exists():
        raise MissingFileError(path, ACCEPTED)
    if path.is_file() and (path.suffix.lower() == ".gguf" or _start(path)[:4] == MAGIC):
        return _without_key(GgufCheckpoint(fetched(path)), key)
    if path.is_dir() and find_weights(path).name == METADATA:
        return DistributedCheckpoint(path, key)
    if path.is_dir() or path.name.endswith(".index.json"):
        return DirectoryCheckpoint(path, key)
    if not path.is_file():
        raise UnknownFileError(path, "neither a file nor a directory", ACCEPTED)
    kind = path.suffix.lower()
    if kind == ".safetensors" or (kind not in SUFFIXES and _looks_safetensors(path)):
        return _without_key(SafetensorsCheckpoint(path), key)
    if kind in SUFFIXES or _looks_pickled(path):
        if _looks_safetensors(path):
            raise BrokenFileError(path, "it is a safetensors file; rename it to .safetensors")
        return PickleCheckpoint(fetched(path), key)
    found = "empty" if path.stat().st_size == 0 else "a file of another kind"
    raise UnknownFileError(path, found, ACCEPTED)


def _without_key(checkpoint: Checkpoint, key: str | None) -> Checkpoint:
    if key:
        option = f"{worded('key', '--key')} for {checkpoint.path}"
        raise OptionError(option, key, "none: nothing is nested here")
    return checkpoint


def _start(path: Path) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            start: bytes = file.read(16)
            return start
    except OSError as error:
        raise BrokenFileError(path, error.strerror or str(error)) from error


def _looks_safetensors(path: Path) -> bool:
    return _start(path)[8:9] == b"{"


def _looks_pickled(path: Path) -> bool:
    return _start(path).startswith(TORCH_SAVE)
