"""The index of a torch.distributed.checkpoint directory, read and checked without torch.

Its `.metadata` is a pickle. It is read as plain data: each class that torch makes it of stands for
a record without behaviour, and whatever else a pickle may name is refused before it is touched.

It is one file, however long: what may stand in the pickle, and what is made of it.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lora_param.errors import (
    BrokenFileError,
    MissingFileError,
    UnknownFileError,
    UnsafePickleError,
    listed,
)
from lora_param.files.header import DTYPES

__all__ = ["METADATA", "Chunk", "DistributedIndex", "StoredTensor", "leads_outside", "read_index"]

METADATA = ".metadata"
"""The file that makes a directory a distributed checkpoint."""

_SIZES = {name: max(bits // 8, 1) for bits, name in DTYPES.values()}
_SIZES |= {"complex32": 4, "complex128": 16}
_CHECKPOINT = "torch.distributed.checkpoint"
# Read, and of no use here: how memory is laid out, and where the checkpoint was written.
_IDLE = re.compile(
    rf"{re.escape(_CHECKPOINT)}\.metadata\._MEM_FORMAT_ENCODING|torch\.serialization\._get_layout"
    r"|builtins\.getattr|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor, and where its bytes are.

    Attributes:
        offsets, sizes: the block, dimension by dimension.
        file: name of the file in the directory, with the bytes from `start` to `stop`: what
            torch.save writes of the block.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    stop: int

    @property
    def index(self) -> tuple[slice, ...]:
        """The block as an index of the tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor: torch's name of its dtype, its shape, and the blocks that cover it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Size of its elements in bytes."""
        return prod(self.shape) * _SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class DistributedIndex:
    """What a directory holds.

    Attributes:
        tensors: by their names in the checkpoint.
        others: names of what is no tensor.
        nesting: name → the path of keys that it was flattened from.
        files: names of the files that hold the data.
    """

    tensors: dict[str, StoredTensor]
    others: tuple[str, ...]
    nesting: dict[str, tuple[object, ...]]
    files: tuple[str, ...]


class _RejectedError(Exception):
    """Why an index is no good; the path is added where it is caught."""


def read_index(directory: Path) -> DistributedIndex:
    """Read and check the index of a distributed checkpoint; the data are not read.

    Raises:
        MissingFileError: there is no `.metadata`.
        UnsafePickleError: opening it would run code.
        BrokenFileError: it is damaged, a file that it names is missing or too short, or the blocks
            of a tensor do not cover it.
        UnknownFileError: its data pass through an extension.
    """
    path = directory / METADATA
    try:
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            content = _Unpickler(file, path).load()  # warns of escapes in damaged texts
    except FileNotFoundError:
        raise MissingFileError(path, "the index of a distributed checkpoint") from None
    except (UnsafePickleError, BrokenFileError):
        raise
    except OSError as error:
        raise BrokenFileError(path, error.strerror or str(error)) from error
    except Exception as error:
        # The unpickler does what the bytes say: damaged ones can make any exception that there is.
        raise BrokenFileError(path, f"it is damaged ({type(error).__name__})") from None
    try:
        index = _index_of(content)
        _check_files(directory, index)
    except _RejectedError as rejected:
        raise BrokenFileError(path, str(rejected)) from None
    return index


def leads_outside(name: str) -> bool:
    """A file's name, from an index, is not below the directory of that index."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    outside = posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    return bool(outside) or "\0" in name


# --- the pickle -------------------------------------------------------------------------------


class _Record:
    """An object of a class of torch's: its name and its state, and nothing that it could do."""

    kind = ""
    state: Any = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """A field; None where it is absent."""
        return self.state.get(name) if isinstance(self.state, dict) else None


_RECORDS = {
    (f"{_CHECKPOINT}.{module}", name): type(name, (_Record,), {"kind": name})
    for module, names in {
        "metadata": (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
        ),
        "filesystem": ("_StorageInfo",),
    }.items()
    for name in names
}


def _idle(*_: object) -> None:
    """What stands for a call whose result is of no use."""


def _size(values: Iterable[int] = ()) -> tuple[int, ...]:
    """torch.Size, as the tuple that it is."""
    return tuple(values)


# The interpreter's own unpickler in Python, not in C: that one makes room for as many objects as
# a damaged number says.
class _Unpickler(pickle._Unpickler):
    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a class, a function or a constant that the pickle names."""
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if module == "torch" and name in _SIZES:
            return name
        if (module, name) == ("torch", "Size"):
            return _size
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if _IDLE.fullmatch(f"{module}.{name}"):
            return _idle
        raise UnsafePickleError(self._path, f"it needs {module}.{name}")


# --- what it says -----------------------------------------------------------------------------


def _is(value: object, kind: str) -> bool:
    return isinstance(value, _Record) and value.kind == kind


def _sizes(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
        raise _RejectedError(f"it gives {what} that is not whole numbers")
    return value


def _mapping(value: object, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise _RejectedError(f"it has no {what}")
    return value


def _index_of(content: object) -> DistributedIndex:
    if not _is(content, "Metadata"):
        raise _RejectedError("it is no index of torch.distributed.checkpoint")
    assert isinstance(content, _Record)
    entries = _mapping(content.get("state_dict_metadata"), "entries")
    places: dict[tuple[str, tuple[int, ...]], _Record] = {}
    for key, info in _mapping(content.get("storage_data"), "places of data").items():
        if not _is(key, "MetadataIndex") or not _is(info, "_StorageInfo"):
            raise _RejectedError("its places of data are not those of torch's own storage")
        if (offset := key.get("offset")) is not None:
            places[str(key.get("fqn")), _sizes(offset, "an offset")] = info
    tensors, others = {}, []
    for name, entry in entries.items():
        if not isinstance(name, str):
            raise _RejectedError(f"it lists {name!r}, which is no name")
        if _is(entry, "TensorStorageMetadata"):
            tensors[name] = _tensor(name, entry, places)
        elif _is(entry, "BytesStorageMetadata"):
            others.append(name)
        else:
            raise _RejectedError(f"what it says of {name!r} is not what torch says of a tensor")
    nesting = {name: _nesting(name, content.get("planner_data")) for name in entries}
    files = dict.fromkeys(c.file for t in tensors.values() for c in t.chunks)
    return DistributedIndex(tensors, tuple(others), nesting, tuple(files))


def _nesting(name: str, planned: object) -> tuple[object, ...]:
    path = planned.get(name) if isinstance(planned, dict) else None
    if isinstance(path, tuple) and path and all(isinstance(p, str | int) for p in path):
        return path
    return (name,)


def _tensor(
    name: str, entry: _Record, places: Mapping[tuple[str, tuple[int, ...]], _Record]
) -> StoredTensor:
    properties = entry.get("properties")
    state = properties.state if _is(properties, "TensorProperties") else None
    # A tuple whose first is the dtype; a mapping where it was not torch's class that wrote it.
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise _RejectedError(f"it does not give the dtype of {name!r}")
    shape = _sizes(entry.get("size"), f"{name!r} a shape")
    listed_chunks = entry.get("chunks")
    if not isinstance(listed_chunks, list):
        raise _RejectedError(f"it gives {name!r} no chunks")
    found = StoredTensor(
        dtype, shape, tuple(_chunk(name, len(shape), c, places) for c in listed_chunks)
    )
    if prod(shape) * _SIZES[dtype] >= 2**63:
        raise _RejectedError(f"the shape of {name!r} is beyond 64 bits: {shape}")
    for chunk in found.chunks:
        size = prod(chunk.sizes) * _SIZES[dtype]
        if size > chunk.stop - chunk.start:
            raise _RejectedError(
                f"a chunk of {name!r} takes {size:,} bytes, and it gives it "
                f"{chunk.stop - chunk.start:,}"
            )
    _check_cover(name, found)
    return found


def _chunk(
    name: str,
    dimensions: int,
    chunk: object,
    places: Mapping[tuple[str, tuple[int, ...]], _Record],
) -> Chunk:
    if not _is(chunk, "ChunkStorageMetadata"):
        raise _RejectedError(f"it gives {name!r} chunks that are none")
    assert isinstance(chunk, _Record)
    offsets = _sizes(chunk.get("offsets"), f"{name!r} an offset")
    sizes = _sizes(chunk.get("sizes"), f"{name!r} a size")
    info = places.get((name, offsets))
    if info is None or len(offsets) != dimensions or len(sizes) != dimensions:
        raise _RejectedError(f"it does not say where the chunk of {name!r} at {offsets} is")
    file, start, length = (info.get(k) for k in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not file or leads_outside(file):
        raise _RejectedError(f"it names the file {file!r}, which lies outside of its directory")
    start, length = _sizes((start, length), f"a place in {file}")
    if info.get("transform_descriptors"):
        raise UnknownFileError(
            file,
            f"written through an extension ({info.get('transform_descriptors')!r:.80})",
            "distributed checkpoints whose data are as torch.save writes them",
        )
    return Chunk(offsets, sizes, file, start, start + length)


def _check_cover(name: str, tensor: StoredTensor) -> None:
    """The blocks lie within the tensor, meet nowhere, and together are as large as it."""
    blocks = [c for c in tensor.chunks if prod(c.sizes)]
    for chunk in blocks:
        if any(s.stop > n for s, n in zip(chunk.index, tensor.shape, strict=True)):
            raise _RejectedError(f"a chunk of {name!r} lies outside of its shape {tensor.shape}")
    if sum(prod(c.sizes) for c in blocks) != prod(tensor.shape):
        raise _RejectedError(f"the chunks of {name!r} do not cover its shape {tensor.shape}")
    open_: list[Chunk] = []  # by rows, those that reach into the next one's
    for chunk in sorted(blocks, key=lambda c: c.offsets):
        rows = slice(0, 1) if not chunk.index else chunk.index[0]
        open_ = [c for c in open_ if c.index and c.index[0].stop > rows.start]
        if any(_meet(c, chunk) for c in open_):
            raise _RejectedError(f"two chunks of {name!r} overlap")
        open_.append(chunk)


def _meet(a: Chunk, b: Chunk) -> bool:
    return all(x.start < y.stop and y.start < x.stop for x, y in zip(a.index, b.index, strict=True))


def _check_files(directory: Path, index: DistributedIndex) -> None:
    """Every file that is named is there and as long as is said."""
    ends: dict[str, int] = {}
    for tensor in index.tensors.values():
        for chunk in tensor.chunks:
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.stop)
    sizes = dict(_file_sizes(directory, ends))
    if absent := sorted(name for name in ends if name not in sizes):
        raise _RejectedError(f"it names {listed(absent)}, missing beside it")
    for name, end in ends.items():
        if sizes[name] < end:
            raise _RejectedError(
                f"it names bytes to {end:,} of {name}, which has {sizes[name]:,}: that is truncated"
            )


def _file_sizes(directory: Path, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    for name in names:
        try:
            if (directory / name).is_file():
                yield name, (directory / name).stat().st_size
        except OSError as error:  # a name too long
            raise _RejectedError(f"it names the file {name!r:.80} ({error.strerror})") from None
