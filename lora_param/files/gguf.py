"""The header of a GGUF file, read and checked without torch, and written with other tensors.

Reading and writing are one file: together they are what is known of the format.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import cast

from lora_param.errors import BrokenFileError, MissingFileError
from lora_param.files.places import fetched, place

__all__ = ["KINDS", "MAGIC", "Gguf", "GgufEntry", "Kind", "decode_keys", "encode_gguf"]
__all__ += ["encode_keys", "read_gguf", "read_type"]

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 8
_STRING, _ARRAY, _UINT32, _FLOAT32 = 8, 9, 4, 6
# Sizes of a key's values by their type: u8 i8 u16 i16 u32 i32 f32 bool, and 64 bits thrice.
_FORMS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of tensor: its name, and how many elements lie in a block of how many bytes."""

    name: str
    elements: int
    size: int


KINDS: Mapping[int, Kind] = {
    code: Kind(*kind)
    for code, kind in {
        0: ("F32", 1, 4),
        1: ("F16", 1, 2),
        2: ("Q4_0", 32, 18),
        3: ("Q4_1", 32, 20),
        6: ("Q5_0", 32, 22),
        7: ("Q5_1", 32, 24),
        8: ("Q8_0", 32, 34),
        9: ("Q8_1", 32, 40),
        10: ("Q2_K", 256, 84),
        11: ("Q3_K", 256, 110),
        12: ("Q4_K", 256, 144),
        13: ("Q5_K", 256, 176),
        14: ("Q6_K", 256, 210),
        15: ("Q8_K", 256, 292),
        16: ("IQ2_XXS", 256, 66),
        17: ("IQ2_XS", 256, 74),
        18: ("IQ3_XXS", 256, 98),
        19: ("IQ1_S", 256, 50),
        20: ("IQ4_NL", 32, 18),
        21: ("IQ3_S", 256, 110),
        22: ("IQ2_S", 256, 82),
        23: ("IQ4_XS", 256, 136),
        24: ("I8", 1, 1),
        25: ("I16", 1, 2),
        26: ("I32", 1, 4),
        27: ("I64", 1, 8),
        28: ("F64", 1, 8),
        29: ("IQ1_M", 256, 56),
        30: ("BF16", 1, 2),
        34: ("TQ1_0", 256, 54),
        35: ("TQ2_0", 256, 66),
        39: ("MXFP4", 32, 17),
    }.items()
}
"""By the number that the file has for it."""


@dataclass(frozen=True, slots=True)
class GgufEntry:
    """One tensor: the number of its type, its shape (rows first), and its bytes in the file."""

    code: int
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def kind(self) -> Kind:
        """Its type."""
        return KINDS[self.code]


@dataclass(frozen=True, slots=True)
class Gguf:
    """A checked header.

    Attributes:
        entries: in the order of the header.
        keys: the bytes of the keys with their values.
        count: how many keys there are.
        version: of the format.
        alignment: of the tensors' data, in bytes.
        size: of the file, in bytes.
        file_type: where in `keys` the number of `general.file_type` is, None where it has none.
    """

    entries: dict[str, GgufEntry]
    keys: bytes
    count: int
    version: int
    alignment: int
    size: int
    file_type: int | None


class _RejectedError(Exception):
    """Why a header is no good; the path is added where it is caught."""


def read_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Read and check the header of a GGUF file; the tensors are not read.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is not a whole and consistent GGUF file of a version that is known.
    """
    path = place(path)
    try:
        with fetched(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise _RejectedError(f"it has {size} bytes, and a GGUF header takes 24")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(cast(Sequence[int], data), size).header()
    except FileNotFoundError:
        raise MissingFileError(path, "a .gguf file") from None
    except _RejectedError as rejected:
        raise BrokenFileError(path, str(rejected)) from None
    except OSError as error:
        raise BrokenFileError(path, error.strerror or str(error)) from error


def read_type(path: str | os.PathLike[str]) -> str:
    """What a GGUF file says that it is: "model", "adapter" ..., "" where it says nothing.

    No more of the header is read than leads to it; what is no GGUF file is "".
    """
    try:
        path = place(path)
        with path.open("rb", buffering=0) as file:
            if file.read(4) != MAGIC:
                return ""
        with fetched(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                return ""
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                reader = _Reader(cast(Sequence[int], data), size)
                reader.at = 16
                for name, value in reader.values(reader.number("Q")):
                    if name == "general.type":
                        return str(value)
    except (_RejectedError, OSError):
        pass
    return ""


def decode_keys(header: Gguf) -> dict[str, str | int | float | bool]:
    """The keys of a header, but for lists."""
    reader = _Reader(header.keys, len(header.keys))
    return {name: value for name, value in reader.values(header.count) if value is not None}


def encode_keys(values: Mapping[str, str | int | float]) -> bytes:
    """Keys as a header has them: texts, whole numbers of 32 bits, floats of 32 bits.

    >>> encode_keys({"a": 1})
    b'\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00a\\x04\\x00\\x00\\x00\\x01\\x00\\x00\\x00'
    """
    found = bytearray()
    for name, value in values.items():
        raw = name.encode()
        found += struct.pack("<Q", len(raw)) + raw
        if isinstance(value, str):
            text = value.encode()
            found += struct.pack("<IQ", _STRING, len(text)) + text
        else:
            kind = _FLOAT32 if isinstance(value, float) else _UINT32
            found += struct.pack(f"<I{_FORMS[kind]}", kind, value)
    return bytes(found)


class _Reader:
    """Reads on from a place in the bytes, never behind their end."""

    def __init__(self, data: Sequence[int], size: int) -> None:
        self.data, self.size, self.at = data, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at:
            raise _RejectedError("its header goes on behind the end of the file: it is truncated")
        self.at += count
        return bytes(self.data[self.at - count : self.at])

    def number(self, form: str) -> int:
        (value,) = struct.unpack(f"<{form}", self.take(struct.calcsize(form)))
        return int(value)

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError:
            raise _RejectedError(f"its header is not UTF-8 before byte {self.at}") from None

    def values(self, count: int) -> Iterator[tuple[str, str | int | float | bool | None]]:
        """Each key with its value, None for a list."""
        for _ in range(count):
            name, kind = self.text(), self.number("I")
            if kind == _STRING:
                yield name, self.text()
            elif kind in _FORMS:
                form = f"<{_FORMS[kind]}"
                (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
                yield name, value
            else:
                self.skip(kind)
                yield name, None

    def skip(self, kind: int, depth: int = 0) -> None:
        """Go behind a value of a key."""
        if kind in _SCALARS:
            self.take(_SCALARS[kind])
        elif kind == _STRING:
            self.take(self.number("Q"))
        elif kind == _ARRAY and depth < 4:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                self.take(_SCALARS[inner] * count)
                return
            if count > self.size - self.at:
                raise _RejectedError("a list in its header is longer than the file")
            for _ in range(count):
                self.skip(inner, depth + 1)
        else:
            raise _RejectedError(f"its header holds a value of the unknown type {kind}")

    def header(self) -> Gguf:
        if self.take(4) != MAGIC:
            raise _RejectedError("it does not begin as a GGUF file")
        version = self.number("I")
        if version not in _VERSIONS:
            raise _RejectedError(f"it is GGUF of version {version}; read are 2 and 3")
        tensors, count = self.number("Q"), self.number("Q")
        first, alignment, file_type = self.at, 32, None
        for _ in range(count):
            name, kind = self.text(), self.number("I")
            if name == "general.alignment" and kind == _UINT32:
                alignment = self.number("I")
                continue
            if name == "general.file_type" and kind == _UINT32:
                file_type = self.at - first
            self.skip(kind)
        if alignment < 1 or alignment & (alignment - 1):
            raise _RejectedError(f"its alignment is {alignment}, which is no power of two")
        keys = bytes(self.data[first : self.at])
        found: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(tensors):
            name, dimensions = self.text(), self.number("I")
            if dimensions > _MAX_DIMENSIONS or name in found:
                raise _RejectedError(f"{name!r} is there twice, or of {dimensions} dimensions")
            shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
            found[name] = self.number("I"), shape, self.number("Q")
        start = -(-self.at // alignment) * alignment
        entries = {
            name: self._entry(name, code, shape, start + offset, alignment)
            for name, (code, shape, offset) in found.items()
        }
        return Gguf(entries, keys, count, version, alignment, self.size, file_type)

    def _entry(
        self, name: str, code: int, shape: tuple[int, ...], start: int, alignment: int
    ) -> GgufEntry:
        kind = KINDS.get(code)
        if kind is None:
            raise _RejectedError(f"{name!r} is of the unknown type {code}")
        columns = shape[-1] if shape else 1
        if columns % kind.elements:
            raise _RejectedError(f"{name!r} has rows of {columns}, in blocks of {kind.elements}")
        stop = start + prod(shape) // kind.elements * kind.size
        if stop > self.size or start % alignment:
            raise _RejectedError(f"the data of {name!r} are at {start}:{stop} of {self.size} bytes")
        return GgufEntry(code, shape, start, stop)


def encode_gguf(
    header: Gguf, tensors: Mapping[str, tuple[int, tuple[int, ...]]], file_type: int | None
) -> tuple[bytes, dict[str, GgufEntry], int]:
    """A header with the same keys over other tensors, where their data go, and the file's size.

    Args:
        header: the one that it is made of.
        tensors: name → the number of its type, and its shape.
        file_type: what `general.file_type` says, where the file has it; None keeps it.
    """
    keys = bytearray(header.keys)
    if file_type is not None and header.file_type is not None:
        struct.pack_into("<I", keys, header.file_type, file_type)
    ends, offset = {}, 0
    infos = bytearray()
    for name, (code, shape) in tensors.items():
        raw = name.encode()
        infos += struct.pack("<Q", len(raw)) + raw
        infos += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], code, offset)
        size = prod(shape) // KINDS[code].elements * KINDS[code].size
        ends[name] = (offset, offset + size)
        offset = -(-(offset + size) // header.alignment) * header.alignment
    text = MAGIC + struct.pack("<IQQ", header.version, len(tensors), header.count) + keys + infos
    text += bytes(-len(text) % header.alignment)
    first = len(text)
    placed = {
        name: GgufEntry(code, shape, first + ends[name][0], first + ends[name][1])
        for name, (code, shape) in tensors.items()
    }
    return text, placed, first + offset
