"""The jobs that write a file of a baked checkpoint: ranges of bytes and blocks of weights."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.jobs import Job
from lora_param.checkpoint.measures import Measures
from lora_param.checkpoint.merging import Merging, Noted
from lora_param.checkpoint.pieces import Block
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.files.header import DTYPES, Entry
from lora_param.files.placed import PlacedFile
from lora_param.files.safetensors import NAMES, tensor_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lora_param.weight.update import Deferred, Update

__all__ = ["Copied", "Merged", "entry_parts", "jobs_of", "name_of", "stored_name"]

_COPIED = 1 << 25  # bytes of a job that copies
_MERGED = 1 << 23  # elements of a job that merges


@dataclass(frozen=True, slots=True)
class Copied:
    """Bytes of a file that come from another file as they are.

    Attributes:
        source: the other file.
        start, stop: the bytes in it.
        offset: where they go.
    """

    source: Path
    start: int
    stop: int
    offset: int

    def is_before(self, other: Copied) -> bool:
        """The other follows in both files."""
        moved = self.offset - self.start == other.offset - other.start
        return moved and self.source == other.source and self.stop == other.start


@dataclass(frozen=True, slots=True)
class Merged:
    """A weight's elements that are computed.

    Attributes:
        part: the file of the base that holds it.
        name: the entry.
        blocks: which elements.
        offset: where the whole entry's first byte would go.
        itemsize: of the stored dtype, in bytes.
    """

    part: Checkpoint
    name: str
    blocks: tuple[Block, ...]
    offset: int
    itemsize: int


def jobs_of(merging: Merging, file: PlacedFile, parts: Iterable[Copied | Merged]) -> Iterator[Job]:
    """What is to be done for a file, cut into jobs of like size."""
    for part in _joined(parts):
        if isinstance(part, Copied):
            for start in range(part.start, part.stop, _COPIED):
                stop = min(start + _COPIED, part.stop)
                offset = part.offset + start - part.start
                copied = partial(file.copy, part.source, start, stop, offset)
                job = Job(copied, stop - start, part.source.name)
                yield _once(merging, file, offset, job)
        else:
            entry = _Entry(merging, part)
            for blocks in _batches(part.blocks):
                size = sum(b.stop - b.start for b in blocks) * part.itemsize
                offset = part.offset + blocks[0].start * part.itemsize
                job = Job(partial(entry.write, file, blocks), size, part.name)
                yield _once(merging, file, offset, job)


def _once(merging: Merging, file: PlacedFile, offset: int, job: Job) -> Job:
    """The job, and a line in the journal when it is done; nothing to do where there is one."""
    journal = merging.journal
    if journal is None:
        return job
    key = f"{file.file.name} {offset}"
    if key in journal.done:
        merging.note_again(job.name, journal.done[key] or ())
        merging.resumed += job.size
        return Job(lambda: None, job.size, job.name)

    def run() -> None:
        journal.add(key, job.run())

    return replace(job, run=run)


def _joined(parts: Iterable[Copied | Merged]) -> Iterator[Copied | Merged]:
    """Ranges that follow each other in both files, as one."""
    last: Copied | None = None
    for part in parts:
        if isinstance(part, Copied):
            if part.start == part.stop:
                continue
            if last and last.is_before(part):
                last = Copied(last.source, last.start, part.stop, last.offset)
                continue
            if last:
                yield last
            last = part
        else:
            if last:
                yield last
            last = None
            yield part
    if last:
        yield last


def _batches(blocks: Iterable[Block]) -> Iterator[list[Block]]:
    batch: list[Block] = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += block.stop - block.start
        if size >= _MERGED:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Entry:
    """A weight while its blocks are merged: its base value and updates, read once."""

    def __init__(self, merging: Merging, part: Merged) -> None:
        self._merging, self._part, self._lock = merging, part, threading.Lock()
        self._read: tuple[Tensor, dict[int, Update | Deferred]] | None = None

    def _values(self) -> tuple[Tensor, dict[int, Update | Deferred]]:
        with self._lock:
            if self._read is None:
                W = self._part.part[self._part.name].contiguous()
                pieces = self._merging.pieces.get(self._part.name, [])
                updates = self._merging.updates(pieces, W.dtype)
                self._read = W, dict(zip(map(id, pieces), updates, strict=True))
            return self._read

    def write(self, file: PlacedFile, blocks: list[Block]) -> list[Noted]:
        """Merge blocks and write them; what came of them, which the merging has noted."""
        import torch

        merging, name = self._merging, self._part.name
        sums: dict[tuple[int, ...], list[list[Measures]]] = {}
        by_pieces = {}
        with torch.no_grad():  # its state is a thread's own
            W, ready = self._values()
            for block in blocks:
                updates = [ready[id(p)] for p in block.pieces]
                stored, measures = merging.merge(name, W, block, updates)
                file.write(
                    tensor_bytes(stored), self._part.offset + block.start * self._part.itemsize
                )
                if block.pieces:
                    ids = tuple(map(id, block.pieces))
                    by_pieces[ids] = block.pieces
                    sums.setdefault(ids, []).append(measures)
        noted: list[Noted] = []
        for ids, found in sums.items():
            each = [Measures.sum(m) for m in zip(*found, strict=True)]
            noted += merging.note(name, by_pieces[ids], each)
        return noted


def entry_parts(
    merging: Merging, part: SafetensorsCheckpoint, placed: Mapping[str, Entry], first: int
) -> Iterator[Copied | Merged]:
    """What an output's entries, whose data begin at `first`, are made of.

    Args:
        part: the file of the base that holds them.
        placed: where they go in the output.
    """
    for name, entry in placed.items():
        own = part.header.entries[name]
        source, offset = part.header.start + own.start, first + entry.start
        if entry.dtype == own.dtype and name not in merging.pieces:
            yield Copied(part.path, source, source + own.stop - own.start, offset)
            continue
        size = DTYPES[entry.dtype][0] // 8
        cast = entry.dtype != own.dtype
        blocks = merging.cover(name, own.torch_shape)
        for changed, group in groupby(blocks, attrgetter("is_changed")):
            found = tuple(group)
            if cast or changed:
                yield Merged(part, name, found, offset, size)
                continue
            for block in found:
                start, stop = block.start * size, block.stop * size
                yield Copied(part.path, source + start, source + stop, offset + start)


def stored_name(merging: Merging, entry: Entry) -> str:
    """What safetensors calls the dtype that an entry is stored in."""
    import torch

    dtype = getattr(torch, entry.torch_dtype, None)
    return entry.dtype if dtype is None else name_of(merging.stored_dtype(dtype))


def name_of(dtype: torch.dtype) -> str:
    """What safetensors calls a dtype."""
    return NAMES[str(dtype).removeprefix("torch.")]
