"""The weights of a directory divided anew, into files of a size that is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

from lora_param.checkpoint.jobs import Job, followed
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint, load_json
from lora_param.checkpoint.streaming import Copied, Merged, entry_parts, jobs_of, stored_name
from lora_param.files.header import Entry
from lora_param.files.placed import PlacedFile, open_placed
from lora_param.files.safetensors import entry_size, place_entries

__all__ = ["dump_json", "resharded_jobs"]

_INDEX = ".safetensors.index.json"


def resharded_jobs(
    merging: Merging, base: DirectoryCheckpoint, out: Path, files: ExitStack, limit: int
) -> Iterator[Job]:
    """The jobs that write all of a directory's weights, and the index that goes with them.

    Weights stay in their order. One file has no index, and is called as one file is.

    Args:
        files: closes what is open after an error.
        limit: bytes of data in a file at the most, where a weight has no more.
    """
    homes: dict[str, SafetensorsCheckpoint] = {}
    for part in base.parts.values():
        assert isinstance(part, SafetensorsCheckpoint)
        part.check_unchanged()
        homes |= dict.fromkeys(part, part)
    shards = _divide(merging, homes, limit)
    stem = "model" if base.index is None else base.index.name.removesuffix(_INDEX)
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
        old = load_json(base.index).get("metadata") if base.index else None
        size = sum(entry_size(*kind) for shard in shards for kind in shard.values())
        home = {n: file for file, shard in zip(names, shards, strict=True) for n in shard}
        metadata = {**(old if isinstance(old, dict) else {}), "total_size": size}
        dump_json({"metadata": metadata, "weight_map": home}, out / f"{stem}{_INDEX}")
    first: Any = next(iter(base.parts.values()))
    for name, shard in zip(names, shards, strict=True):
        file: IO[bytes] = files.enter_context(open_placed(out / name))
        header, placed, size = place_entries(shard, first.metadata, name)
        target = PlacedFile(file, len(header) + size)
        target.write(header, 0)
        parts = _parts(merging, homes, placed, len(header))
        yield from followed(jobs_of(merging, target, parts), partial(file.close))


def _divide(
    merging: Merging, homes: Mapping[str, SafetensorsCheckpoint], limit: int
) -> list[dict[str, tuple[str, tuple[int, ...]]]]:
    """Dtype and shape of what each file holds, by name."""
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, part in homes.items():
        entry = part.header.entries[name]
        kind = stored_name(merging, entry), entry.shape
        size = entry_size(*kind)
        if shards[-1] and filled + size > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = kind
        filled += size
    return shards


def _parts(
    merging: Merging,
    homes: Mapping[str, SafetensorsCheckpoint],
    placed: Mapping[str, Entry],
    first: int,
) -> Iterator[Copied | Merged]:
    for name, entry in placed.items():
        yield from entry_parts(merging, homes[name], {name: entry}, first)


def dump_json(value: Mapping[str, Any], path: Path) -> None:
    """Write a JSON object as such files are written."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    # A lone surrogate, which JSON can spell and UTF-8 can't, is written as it was: \ud800.
    path.write_bytes((text + "\n").encode("utf-8", "backslashreplace"))
