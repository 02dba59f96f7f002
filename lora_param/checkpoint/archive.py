"""Zip files of torch.save, patched: bytes of the targeted weights replaced, all else as it was."""

from __future__ import annotations

import io
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_param.checkpoint.jobs import Job, followed
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.pickle import PickleCheckpoint
from lora_param.checkpoint.streaming import Copied, Merged, jobs_of
from lora_param.checkpoint.unpickling import is_zip
from lora_param.errors import BrokenFileError
from lora_param.files.placed import PlacedFile

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["archive_jobs", "data_starts", "read_members"]

_PIECE = 1 << 20  # bytes that a checksum is made of at a time
_DIRECTORY, _LOCAL = struct.Struct("<16xI8xHHH12x"), struct.Struct("<6xH6xI8xHH")


@dataclass(frozen=True, slots=True)
class _Member:
    """A member of a zip file, not compressed.

    Attributes:
        header: where it begins.
        start, stop: its data.
        end: where what is stated behind them ends.
        checksums: where the checksum of its data is stated, in the file.
    """

    header: int
    start: int
    stop: int
    end: int
    checksums: tuple[int, ...]


def archive_jobs(merging: Merging, part: PickleCheckpoint, file: IO[bytes]) -> Iterator[Job] | None:
    """The jobs that write a file of torch.save anew, or None where its pickle would have to change.

    It would where a dtype changes, where tensors share data and do not take the same updates, and
    where a weight's data have gaps. Files from before torch 1.6 are no archives, and None as well.
    """
    if merging.dtype is not None or not is_zip(part.path):
        return None
    with part.path.open("rb") as source:
        members, directory = read_members(source, part.path)
    places = _places(merging, part, members)
    return None if places is None else _jobs(merging, part, file, places, directory)


def _jobs(
    merging: Merging,
    part: PickleCheckpoint,
    file: IO[bytes],
    places: Mapping[_Member, Mapping[int, str]],
    directory: int,
) -> Iterator[Job]:
    path, size = part.path, part.path.stat().st_size
    target, done = PlacedFile(file, size), 0
    target.copy(path, directory, size, directory)  # first: checksums will be put into it
    for member in sorted(places, key=lambda m: m.start):
        yield from jobs_of(merging, target, [Copied(path, done, member.header, done)])
        done = member.end
        parts = _member_parts(merging, part, member, places[member])
        check = partial(_write_checksum, file, target, member)
        yield from followed(jobs_of(merging, target, parts), check)
    yield from jobs_of(merging, target, [Copied(path, done, directory, done)])


def _member_parts(
    merging: Merging, part: PickleCheckpoint, member: _Member, names: Mapping[int, str]
) -> Iterator[Copied | Merged]:
    """What a member is made of. Names by the offset of their data in the file."""
    done = member.header
    for offset, name in sorted(names.items()):
        W = part[name]
        for block in merging.blocks(name, tuple(W.shape)):
            start = offset + block.start * W.itemsize
            yield Copied(part.path, done, start, done)
            yield Merged(part, name, (block,), offset, W.itemsize)
            done = offset + block.stop * W.itemsize
    yield Copied(part.path, done, member.end, done)


def _write_checksum(file: IO[bytes], target: PlacedFile, member: _Member) -> None:
    """The checksum of the data as they are now, wherever it is stated."""
    crc = 0
    with Path(file.name).open("rb", buffering=0) as again:
        again.seek(member.start)
        left = member.stop - member.start
        while left:
            data = again.read(min(_PIECE, left))
            crc, left = zlib.crc32(data, crc), left - len(data)
    for place in member.checksums:
        target.write(struct.pack("<I", crc), place)


def read_members(file: IO[bytes], path: Path) -> tuple[dict[int, _Member], int]:
    """The members that are not compressed, by where their data begin; and the directory's place.

    Args:
        file: the archive.
        path: the file that it is in, for messages.

    Raises:
        BrokenFileError: the directory and the members disagree.
    """
    try:
        return _read_members(file)
    except (zipfile.BadZipFile, struct.error) as error:
        raise BrokenFileError(path, f"it is a damaged zip archive ({error})") from None


def _read_members(file: IO[bytes]) -> tuple[dict[int, _Member], int]:
    found: dict[int, _Member] = {}
    with zipfile.ZipFile(file) as archive:
        infos, place = archive.infolist(), archive.start_dir
        order = _in_byte_order(archive)
        for info in infos:
            file.seek(place)
            record = file.read(_DIRECTORY.size)
            _, *lengths = _DIRECTORY.unpack(record)
            stated = [place + 16]
            place += _DIRECTORY.size + sum(lengths)
            file.seek(info.header_offset)
            flags, crc, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
            start = info.header_offset + _LOCAL.size + name + extra
            stop = end = start + info.file_size
            if crc == info.CRC:
                stated.append(info.header_offset + 14)
            if flags & 8:  # stated behind the data, after a mark that may be left out
                file.seek(stop)
                mark = 4 * (file.read(4) == b"PK\x07\x08")
                stated.append(stop + mark)
                end = stop + mark + 4
            if info.compress_type == zipfile.ZIP_STORED and order:
                found[start] = _Member(info.header_offset, start, stop, end, tuple(stated))
        return found, archive.start_dir


def _in_byte_order(archive: zipfile.ZipFile) -> bool:
    """The numbers are stored as this machine stores them."""
    stated = [n for n in archive.namelist() if n.endswith("/byteorder")]
    return all(archive.read(name).decode() == sys.byteorder for name in stated)


def _places(
    merging: Merging, part: PickleCheckpoint, members: Mapping[int, _Member]
) -> dict[_Member, dict[int, str]] | None:
    """Where the data of the weights that change are: a name for each, by member and offset."""
    import torch

    names = [name for name in part if name in merging.pieces]

    def load() -> list[Tensor]:
        content = torch.load(part.path, map_location="meta", weights_only=True)
        for key in part.nesting:
            content = content[key]
        return [content[name] for name in names]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about sparse and quantized tensors
        try:
            starts = data_starts(load)
        except (RuntimeError, NotImplementedError):
            return None  # what it holds is known to no such device: quantized tensors
    uses = _uses(part.content)
    found: dict[_Member, dict[int, str]] = {}
    for name, start in zip(names, starts, strict=True):
        W, member = part.state_dict[name], members.get(start)
        if member is None or not W.is_contiguous() or W.is_conj() or W.is_neg():
            return None
        if member.stop - member.start != W.untyped_storage().nbytes():
            return None
        tied = part.weights[name].tied
        sharing = sum(_meet(t, W) for t in uses[W.untyped_storage().data_ptr()])
        if sharing != 1 + len(tied) or not all(merging.same_updates(n, name) for n in tied):
            return None
        found.setdefault(member, {})[member.start + W.storage_offset() * W.itemsize] = name
    return found


def data_starts(load: Callable[[], Iterable[Tensor]]) -> list[int]:
    """Where the data of tensors begin in an archive; -1 for those of which torch does not tell.

    Args:
        load: loads the tensors with torch.load and `map_location="meta"`, which reads no data.
    """
    with nullcontext() if _told_on_meta() else _fake_mode():
        starts = [getattr(t.untyped_storage(), "_checkpoint_offset", None) for t in load()]
    return [-1 if start is None else start for start in starts]


@cache
def _told_on_meta() -> bool:
    """This torch notes where a storage is in a file when it loads it to the meta device."""
    import torch

    file = io.BytesIO()
    torch.save(torch.zeros(1), file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=True)
    return getattr(loaded.untyped_storage(), "_checkpoint_offset", None) is not None


def _fake_mode() -> AbstractContextManager[Any]:
    """In which older torch notes it; its import takes a second."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _uses(content: Any) -> dict[int, list[Tensor]]:
    """Every tensor in what a file holds, by its storage."""
    import torch

    found: dict[int, list[Tensor]] = {}
    left, seen = [content], set[int]()
    while left:
        value = left.pop()
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            if id(value) in seen:  # in itself, or in several places
                continue
            seen.add(id(value))
        if isinstance(value, Mapping):
            left += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            left += value
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            found.setdefault(value.untyped_storage().data_ptr(), []).append(value)
    return found


def _meet(a: Tensor, b: Tensor) -> bool:
    """Two tensors of one storage have elements in common, or may have."""
    if not a.numel() or not b.numel():
        return False
    (a0, a1), (b0, b1) = _extent(a), _extent(b)
    return a0 < b1 and b0 < a1


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage from a tensor's first element to its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * step for size, step in steps)
    first, size = int(tensor.storage_offset()), tensor.itemsize
    return first * size, (int(last) + 1) * size
