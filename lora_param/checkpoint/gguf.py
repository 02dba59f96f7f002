"""A GGUF file as a checkpoint, and how its merged self is written.

Plain tensors are what they are; quantized ones are rows of bytes, which `quantized.gguf` reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.jobs import Job
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.quantized.gguf import find_gguf
from lora_param.checkpoint.quantized.packed import Found
from lora_param.checkpoint.streaming import Copied, Merged, jobs_of
from lora_param.errors import BrokenFileError
from lora_param.files.gguf import KINDS, GgufEntry, decode_keys, encode_gguf, read_gguf
from lora_param.files.placed import PlacedFile
from lora_param.files.safetensors import tensor_bytes
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["GgufCheckpoint", "gguf_jobs"]

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_DTYPES |= {"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
_CODES = {_DTYPES[kind.name]: code for code, kind in KINDS.items() if kind.name in _DTYPES}
_FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}


class GgufCheckpoint(Checkpoint):
    """One GGUF file, its header checked when it is opened.

    Attributes:
        header: that header.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is not a whole and consistent GGUF file.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.header = read_gguf(self.path)
        self._state = self._stat()

    def _stat(self) -> tuple[int, int, int]:
        s = self.path.stat()
        return s.st_ino, s.st_size, s.st_mtime_ns

    def check_unchanged(self) -> None:
        """BrokenFileError where it is no longer the file whose header was read."""
        if self._stat() != self._state:
            raise BrokenFileError(self.path, "it has changed since it was opened")

    @property
    def config(self) -> Mapping[str, Any]:
        """What the header says of the model: `general.architecture`, for one."""
        return decode_keys(self.header)

    def found(self) -> Found:
        """Its quantized tensors."""
        return Found(*find_gguf(self.header))

    def _describe(self) -> dict[str, Weight]:
        return {name: self._weight(name, entry) for name, entry in self.header.entries.items()}

    def _weight(self, name: str, entry: GgufEntry) -> Weight:
        dtype = _DTYPES.get(entry.kind.name, "uint8")
        return Weight(name, _stored_shape(entry), dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        import numpy as np
        import torch

        entry = self.header.entries[name]
        dtype = getattr(torch, _DTYPES.get(entry.kind.name, "uint8"))
        if entry.start == entry.stop:
            return torch.empty(_stored_shape(entry), dtype=dtype)
        self.check_unchanged()
        octets = np.memmap(
            self.path, np.uint8, "c", offset=entry.start, shape=(entry.stop - entry.start,)
        )
        return torch.from_numpy(octets).view(dtype).view(_stored_shape(entry))


def _stored_shape(entry: GgufEntry) -> tuple[int, ...]:
    """Of a quantized tensor the last dimension counts bytes."""
    if entry.kind.elements == 1 or not entry.shape:
        return entry.shape
    return (*entry.shape[:-1], entry.shape[-1] // entry.kind.elements * entry.kind.size)


def gguf_jobs(
    merging: Merging,
    part: GgufCheckpoint,
    file: IO[bytes],
    dense: Mapping[str, str],
    requantize: Callable[[str], Mapping[str, Tensor]],
) -> Iterator[Job]:
    """The jobs that write the file anew, with the same keys.

    Args:
        dense: quantized tensors that are written plainly → their dtype. Vectors stay as they are,
            which llama.cpp wants.
        requantize: gives the bytes of a quantized tensor that changes and stays quantized.
    """
    import torch

    part.check_unchanged()
    header = part.header
    tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, entry in header.entries.items():
        own = dense.get(name, _DTYPES.get(entry.kind.name))
        code = entry.code
        if own is not None and len(entry.shape) > 1:
            stored = merging.stored_dtype(getattr(torch, own))
            code = _CODES[str(stored).removeprefix("torch.")]
        tensors[name] = code, entry.shape
    kinds = {_DTYPES[KINDS[tensors[n][0]].name] for n in dense}
    text, placed, size = encode_gguf(header, tensors, _FILE_TYPES.get(min(kinds, default="")))
    target = PlacedFile(file, size)
    target.write(text, 0)
    yield from jobs_of(merging, target, _parts(merging, part, placed, dense))
    for name, entry in placed.items():
        if entry.kind.elements > 1 and name in merging.pieces:
            run = partial(_requantize, target, entry, name, requantize)
            yield Job(run, entry.stop - entry.start, name)


def _parts(
    merging: Merging,
    part: GgufCheckpoint,
    placed: Mapping[str, GgufEntry],
    dense: Mapping[str, str],
) -> Iterator[Copied | Merged]:
    for name, entry in placed.items():
        own = part.header.entries[name]
        if entry.code == own.code and name not in merging.pieces:
            yield Copied(part.path, own.start, own.stop, entry.start)
        elif entry.kind.elements == 1:
            blocks = tuple(merging.cover(name, entry.shape))
            source = merging.base if name in dense else part
            yield Merged(source, name, blocks, entry.start, entry.kind.size)


def _requantize(
    target: PlacedFile,
    entry: GgufEntry,
    name: str,
    requantize: Callable[[str], Mapping[str, Tensor]],
) -> None:
    target.write(tensor_bytes(requantize(name)[name]), entry.start)
