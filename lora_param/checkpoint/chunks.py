"""A baked distributed checkpoint: its files copied, the targeted tensors' chunks patched in them.

What torch.save wrote of a chunk keeps its length, so that the index and every byte that belongs to
anything else (other tensors, the optimizer's state) stay as they were.
"""

from __future__ import annotations

import io
import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lora_param.checkpoint.archive import data_starts, read_members
from lora_param.checkpoint.distributed import DistributedCheckpoint, reading
from lora_param.checkpoint.jobs import Job, Progress, followed, run_jobs
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.output import copy_beside, link_file
from lora_param.checkpoint.streaming import Copied, jobs_of
from lora_param.errors import BrokenFileError
from lora_param.files.distributed import Chunk
from lora_param.files.placed import PlacedFile, open_placed
from lora_param.files.safetensors import tensor_bytes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["write_distributed"]


def write_distributed(
    merging: Merging, base: DistributedCheckpoint, out: Path, progress: Progress
) -> list[str]:
    """The whole directory, with the same index. Returns the files' names."""
    names = [name for name in base if name in merging.pieces]
    touched = {chunk.file for name in names for chunk in base.entry(name).chunks}
    copy_beside(base.path, out, set(base.index.files))
    with ExitStack() as files:
        run_jobs(_copies(merging, base, out, touched, files), progress)
    locks = {name: threading.Lock() for name in touched}
    run_jobs((Job(partial(_patch, merging, base, n, out, locks), 0, n) for n in names), progress)
    return sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())


def _copies(
    merging: Merging, base: DistributedCheckpoint, out: Path, touched: set[str], files: ExitStack
) -> Iterator[Job]:
    """The jobs that copy every file of data, or link those that nothing changes."""
    for name in base.index.files:
        source, place = base.path / name, out / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if merging.link and name not in touched and link_file(source, place):
            continue
        file: IO[bytes] = files.enter_context(open_placed(place))
        size = source.stat().st_size
        jobs = jobs_of(merging, PlacedFile(file, size), [Copied(source, 0, size, 0)])
        yield from followed(jobs, file.close)


def _patch(
    merging: Merging,
    base: DistributedCheckpoint,
    name: str,
    out: Path,
    locks: Mapping[str, threading.Lock],
) -> None:
    """Merge one weight, and write it into each of its chunks."""
    import torch

    with torch.no_grad():  # its state is a thread's own
        merged = merging.stored(name, base[name], noted=True)
        for chunk in base.entry(name).chunks:
            if 0 in chunk.sizes:
                continue
            with (base.path / chunk.file).open("rb") as file:
                file.seek(chunk.start)
                item = file.read(chunk.stop - chunk.start)
            with reading(base.path, base.stored[name]):
                patched = _with_values(item, merged[chunk.index], base.path, chunk)
            with locks[chunk.file], (out / chunk.file).open("r+b") as target:
                target.seek(chunk.start)
                target.write(patched)


def _with_values(item: bytes, values: Tensor, path: Path, chunk: Chunk) -> bytes:
    """What torch.save wrote of a tensor, with other values in it.

    Raises:
        BrokenFileError: it is no archive of one tensor whose data stand in it as they are.
    """
    import torch

    tensor = torch.load(io.BytesIO(item), map_location="cpu", weights_only=True)
    tensor.copy_(values)  # whatever its strides are
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    data = tensor_bytes(storage)
    members, _ = read_members(io.BytesIO(item), path)
    load = partial(torch.load, map_location="meta", weights_only=True)
    (start,) = data_starts(lambda: [load(io.BytesIO(item))])
    member = members.get(start)
    if member is None or member.stop - member.start != len(data):
        raise BrokenFileError(path / chunk.file, "a tensor in it is not as torch.save writes it")
    patched = bytearray(item)
    patched[member.start : member.stop] = data
    checksum = zlib.crc32(data)
    for place in member.checksums:
        struct.pack_into("<I", patched, place, checksum)
    return bytes(patched)
