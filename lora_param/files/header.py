"""The header of a `.safetensors` file, read and checked without torch.

It rejects all that the reference reader rejects, and in addition what that one lets pass unseen:
two tensors of the same name (the first would be lost).

The quick look at a plain header, the checks of all others and the writing are one file: together
they are what is known of the format.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite, prod
from pathlib import Path
from typing import Any, NoReturn

from lora_param.errors import BrokenFileError, MissingFileError, OutputError
from lora_param.files.places import FarPath, place

__all__ = [
    "DTYPES",
    "MAX_HEADER",
    "TORCH_SAVE",
    "Entry",
    "Header",
    "encode_header",
    "read_header",
]

MAX_HEADER = 100_000_000
"""Longest header in bytes that the format's readers take."""

TORCH_SAVE = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")
"""How a file of torch.save begins: a zip archive, before torch 1.6 a pickle of its magic number."""

# Name → (bits, torch's name). The order is the reference's enumeration, by which it sorts.
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (8, "bool"),
    "F4": (4, "float4_e2m1fn_x2"),
    "F6_E2M3": (6, "float6_e2m3"),
    "F6_E3M2": (6, "float6_e3m2"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
_FIELDS = ("dtype", "shape", "data_offsets")
_NEEDED = set(_FIELDS)
_LIMIT = 2**64
_MINUS = re.compile(r"[\[,:]\s*-")  # before a number
_MAX_DEPTH = 126  # the reference takes 127 levels


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its dtype (a key of `DTYPES`), shape, and byte range from the data's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def torch_dtype(self) -> str:
        """Torch's name of the dtype."""
        return DTYPES[self.dtype][1]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape torch gives it: F4 holds two elements in one."""
        if self.dtype == "F4" and self.shape:
            return (*self.shape[:-1], self.shape[-1] // 2)
        return self.shape


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header.

    Attributes:
        entries: in the order of their data, which covers the file without a hole.
        metadata: texts by name; empty where the file has none.
        start: offset in the file at which the data start.
        size: size of the file in bytes.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    start: int
    size: int


class _RejectedError(Exception):
    """Why a header is no good; the path is added where it is caught."""


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a repeated name is seen."""


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a `.safetensors` file; the data are not read.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: the file is not a whole and consistent safetensors file.
    """
    path = place(path)
    try:
        return _read_far(path, path.stat()) if isinstance(path, FarPath) else _read(path)
    except FileNotFoundError:
        raise MissingFileError(path, "a .safetensors file") from None
    except _RejectedError as rejected:
        raise BrokenFileError(path, str(rejected)) from None
    except OSError as error:
        raise BrokenFileError(path, error.strerror or str(error)) from error


@lru_cache(maxsize=128)
def _read_far(path: FarPath, _: os.stat_result) -> Header:
    """Once for each state of a file: several look at a header before it is known what it is."""
    return _read(path)


def _read(path: Path) -> Header:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size < 8:
            raise _RejectedError(
                f"it has {size} bytes, and the length of a safetensors header alone takes 8"
            )
        first = file.read(8)
        (length,) = struct.unpack("<Q", first)
        if length > MAX_HEADER:
            if first.startswith(TORCH_SAVE):
                raise _RejectedError("it is a file of torch.save; rename it to end in .pt")
            raise _RejectedError(
                f"its header would be {length:,} bytes long, and {MAX_HEADER:,} is the limit"
            )
        if 8 + length > size:
            raise _RejectedError(
                f"its header would be {length:,} bytes long, and the file has {size:,}: "
                "it is truncated, or no safetensors file"
            )
        text = file.read(length)
    return _parse(text, size)


def _parse(raw: bytes, size: int) -> Header:
    start = 8 + len(raw)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _RejectedError(f"its header is not UTF-8 at byte {8 + error.start}") from None
    if (plain := _plain(text, size - start)) is not None:
        return Header(*plain, start, size)
    try:
        parsed = json.loads(
            text,
            object_pairs_hook=_Pairs,
            parse_constant=_no_constant,
            parse_int=_whole,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise _RejectedError(f"its header is not JSON: {error}") from None
    if not isinstance(parsed, _Pairs):
        raise _RejectedError("its header is not a JSON object")
    _check_tree(parsed)
    metadata: dict[str, str] | None = None
    entries: dict[str, Entry] = {}
    for name, value in parsed:
        if name == "__metadata__":
            if metadata is not None:
                raise _RejectedError("its header holds __metadata__ twice")
            metadata = _metadata(value)
        elif name in entries:
            raise _RejectedError(f"its header holds the tensor {name!r} twice")
        else:
            entries[name] = _entry(name, value)
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_cover(entries, size - start)
    return Header(entries, metadata or {}, start, size)


def _plain(text: str, size: int) -> tuple[dict[str, Entry], dict[str, str]] | None:
    """Entries and metadata of a header without anything odd, as nearly all are, in less time.

    Whatever is not seen at once to be right is None, and left to the checks that say what is wrong:
    names that are written with escapes, other fields or values than those of an entry, a name that
    is there twice, data that leave holes.
    """
    if "\\u" in text or _MINUS.search(text):
        return None
    try:
        parsed = json.loads(text, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    if type(parsed) is not tuple:
        return None
    for name, pairs in parsed:
        if type(pairs) is not tuple or name in entries:
            return None
        if name == "__metadata__":
            if not pairs or metadata or not all(type(v) is str for _, v in pairs):
                return None
            metadata = dict(pairs)
            continue
        fields = dict(pairs)
        if len(pairs) != 3 or fields.keys() != _NEEDED:
            return None
        dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
        if type(dtype) is not str or dtype not in DTYPES or type(offsets) is not list:
            return None
        if type(shape) is not list or len(offsets) != 2 or {*map(type, shape + offsets)} != {int}:
            return None
        start, stop = offsets
        bits = prod(shape, start=DTYPES[dtype][0])
        if not 0 < bits < _LIMIT or bits != 8 * (stop - start):
            return None
        entries[name] = Entry(dtype, tuple(shape), start, stop)
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for entry in entries.values():
        if entry.start != end:
            return None
        end = entry.stop
    return (entries, metadata) if end == size else None


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")


def _whole(text: str) -> int | float:
    # "-0" is a float to the reference reader, and so is what 64 bits do not hold.
    value = int(text)
    return float(text) if text == "-0" or not -(2**63) <= value < _LIMIT else value


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"the number {text} is out of range")
    return value


def _check_tree(value: object, depth: int = 0) -> None:
    """Refuse what Python's JSON takes and stricter readers do not: lone surrogates, depth."""
    if depth > _MAX_DEPTH:
        raise _RejectedError("its header is nested too deeply")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _RejectedError(f"its header holds {value!r}, which is not Unicode text") from None
    elif isinstance(value, tuple | list):
        for item in value:
            _check_tree(item, depth + (not isinstance(value, tuple)))


def _metadata(value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, _Pairs) or not all(isinstance(v, str) for _, v in value):
        raise _RejectedError("its __metadata__ does not map texts to texts")
    return dict(value)


def _entry(name: str, value: object) -> Entry:
    if not isinstance(value, _Pairs):
        raise _RejectedError(f"what its header says of {name!r} is not an object")
    fields: dict[str, Any] = {}
    for key, item in value:
        if key in fields and key in _FIELDS:
            raise _RejectedError(f"its header gives the {key} of {name!r} twice")
        fields[key] = item
    if absent := [f for f in _FIELDS if f not in fields]:
        raise _RejectedError(f"its header does not give the {absent[0]} of {name!r}")
    dtype, shape, offsets = (fields[f] for f in _FIELDS)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _RejectedError(f"its header gives {name!r} the unknown dtype {dtype!r}")
    if not _is_sizes(shape):
        raise _RejectedError(f"its header gives {name!r} a shape that is not whole numbers")
    if not _is_sizes(offsets) or len(offsets) != 2:
        raise _RejectedError(f"its header gives {name!r} offsets that are not two whole numbers")
    return Entry(dtype, tuple(shape), *offsets)


def _is_sizes(value: object) -> bool:
    return (
        isinstance(value, list)
        and not isinstance(value, _Pairs)
        and all(type(v) is int and v >= 0 for v in value)
    )


def _check_cover(entries: Mapping[str, Entry], size: int) -> None:
    """The byte ranges are those of the shapes, and follow each other from 0 to the end."""
    end = 0
    for name, entry in entries.items():
        if entry.start != end or entry.stop < entry.start:
            raise _RejectedError(
                f"the data of {name!r} are at {entry.start}:{entry.stop}, where {end} is due: "
                "there is a hole, an overlap or a reversed range"
            )
        bits = 1
        for factor in (*entry.shape, DTYPES[entry.dtype][0]):
            bits *= factor
            if bits >= _LIMIT:
                raise _RejectedError(f"the shape of {name!r} is beyond 64 bits: {entry.shape}")
        if bits % 8:
            raise _RejectedError(f"the data of {name!r} do not end on a whole byte")
        if bits // 8 != entry.stop - entry.start:
            raise _RejectedError(
                f"{name!r} is {entry.dtype} of shape {entry.shape}, which takes {bits // 8} "
                f"bytes, and its header gives it {entry.stop - entry.start}"
            )
        end = entry.stop
    if end != size:
        what = "it is truncated" if end > size else "bytes follow that no tensor covers"
        raise _RejectedError(f"its tensors take {end:,} bytes and the file holds {size:,}: {what}")


def encode_header(
    entries: Iterable[tuple[str, Entry]], metadata: Mapping[str, str], path: object
) -> bytes:
    """Header bytes, length included: compact JSON, padded with spaces to a multiple of 8.

    Raises:
        OutputError: it would be longer than readers take, or holds a name they do not.
    """
    tree: dict[str, object] = {}
    if metadata:
        tree["__metadata__"] = dict(sorted(metadata.items()))
    for name, e in entries:
        if name == "__metadata__":
            raise OutputError(path, "safetensors cannot hold a tensor named '__metadata__'")
        tree[name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": (e.start, e.stop)}
    try:
        text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        name = error.object[max(error.start - 20, 0) : error.end + 20]
        raise OutputError(
            path, f"safetensors cannot hold {name!r}: it is no Unicode text"
        ) from None
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise OutputError(
            path, f"its header would be {len(text):,} bytes long, and {MAX_HEADER:,} is the limit"
        )
    return struct.pack("<Q", len(text)) + text
