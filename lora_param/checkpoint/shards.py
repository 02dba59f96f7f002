"""Directories and shard indices: one mapping over the files that hold a model's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from lora_param.checkpoint.base import Checkpoint, packed_reasons
from lora_param.checkpoint.pickle import PickleCheckpoint
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.errors import BrokenFileError, UnknownFileError, listed
from lora_param.files.distributed import METADATA, leads_outside
from lora_param.files.places import fetched, is_far, place
from lora_param.fingerprint import BaseWeight
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = ["DirectoryCheckpoint", "config_in", "find_weights", "read_index"]

# What a Hugging Face directory holds, in the order in which it is looked for.
_KNOWN = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_SINGLE = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_MAX_INDEX = 100_000_000
_AT_ONCE = 16  # shards that are asked for over a network

T = TypeVar("T")


class DirectoryCheckpoint(Checkpoint):
    """The weights of a directory: one file, or shards with their index.

    Attributes:
        path: the directory.
        index: the index file, or None where a single file holds the weights.
        parts: file name → the file opened.

    Raises:
        UnknownFileError: nothing in the directory is known, or it is not clear which file is meant.
        BrokenFileError: the index and the shards do not agree, or a file cannot be read.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str], key: str | None = None) -> None:
        given = place(path)
        found = find_weights(given) if given.is_dir() else given
        self.path = given if given.is_dir() else given.parent
        self.index: Path | None = found if found.name.endswith(".json") else None
        self.parts: dict[str, SafetensorsCheckpoint | PickleCheckpoint] = {}
        if self.index is None:
            self.parts[found.name] = _open_part(found, key)
            self._home = dict.fromkeys(self.parts[found.name], found.name)
        else:
            self._home = read_index(self.index)
            names = list(dict.fromkeys(self._home.values()))
            opened = _for_each(names, lambda name: _open_part(self.path / name, key), self.path)
            self.parts |= zip(names, opened, strict=True)
            _check_index(self.index, self._home, self.parts)
        self.key = next((p.key for p in self.parts.values()), "")

    @property
    def config(self) -> Mapping[str, Any]:
        """The directory's config.json."""
        return config_in(self.path)

    def _describe(self) -> dict[str, Weight]:
        weights: dict[str, Weight] = {}
        for part in self.parts.values():
            weights |= part.weights
        if len(self.parts) > 1:  # a scale may lie in another shard than its weight
            for name, reason in packed_reasons(weights).items():
                weight = weights[name]
                if not weight.packed:
                    weights[name] = Weight(
                        name, weight.shape, weight.dtype, tied=weight.tied, packed=reason
                    )
        return weights

    def part_of(self, name: str) -> SafetensorsCheckpoint | PickleCheckpoint:
        """The file that holds this entry."""
        return self.parts[self._home[name]]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(part.nbytes for part in self.parts.values())

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.part_of(name)[name]

    def raw(self, name: str) -> bytes:
        """The bytes of the tensor of this name."""
        return self.part_of(name).raw(name)

    def array(self, name: str) -> NDArray[np.float32]:
        """The tensor of this name as a float32 array, for statistics."""
        return self.part_of(name).array(name)

    def flat_blocks(self, name: str, start: int, stop: int) -> Iterator[NDArray[np.float32]]:
        """Elements of a tensor as float32 arrays, a block at a time."""
        return self.part_of(name).flat_blocks(name, start, stop)

    def base_weight(self, name: str) -> BaseWeight:
        """Fingerprint of one entry."""
        return self.part_of(name).base_weight(name)

    def close(self) -> None:
        """Close every part."""
        for part in self.parts.values():
            part.close()


def _open_part(path: Path, key: str | None) -> SafetensorsCheckpoint | PickleCheckpoint:
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint(path)
    return PickleCheckpoint(fetched(path), key)


def config_in(directory: Path) -> Mapping[str, Any]:
    """A directory's config.json, {} where it has none."""
    path = directory / "config.json"
    return load_json(path) if path.is_file() else {}


def find_weights(directory: Path) -> Path:
    """The file in a directory that holds its weights, or the index of its shards or chunks.

    Raises:
        UnknownFileError: there is none, or several and none that is usually meant.
        BrokenFileError: the directory cannot be listed.
    """
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise BrokenFileError(directory, error.strerror or str(error)) from error
    for name in _KNOWN:
        if name in names:
            return directory / name
    accepted = f"a directory with {', '.join(_KNOWN)} or one single weights file"
    if METADATA in names:
        return directory / METADATA
    indices = [n for n in names if n.endswith((".safetensors.index.json", ".bin.index.json"))]
    single = indices or [n for n in names if n.endswith(_SINGLE) and (directory / n).is_file()]
    if len(single) == 1:
        return directory / single[0]
    if "adapter_config.json" in names:
        raise UnknownFileError(directory, "a PEFT adapter, not a model", accepted)
    found = f"a directory with {listed(single)}" if single else f"a directory of {listed(names)}"
    raise UnknownFileError(directory, found if names else "an empty directory", accepted)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name → shard file name, from a `*.index.json`.

    Raises:
        BrokenFileError: it is no index, or names a shard that is missing or lies elsewhere.
    """
    index = load_json(path)
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise BrokenFileError(path, "it has no 'weight_map' from tensors to shards")
    for tensor, shard in mapping.items():
        if not _is_text(tensor):
            raise BrokenFileError(path, f"it lists {tensor!r}, which is no Unicode text")
        if not isinstance(shard, str) or not shard:
            raise BrokenFileError(path, f"it gives {tensor} a shard that is no file name")
    for shard in dict.fromkeys(mapping.values()):
        if leads_outside(shard):
            raise BrokenFileError(
                path, f"it names the shard {shard!r}, which lies outside of its directory"
            )
        if PurePosixPath(shard).suffix not in _SINGLE:
            raise BrokenFileError(path, f"it names the shard {shard!r}, which is no weights file")
    shards = list(dict.fromkeys(mapping.values()))

    def is_there(shard: str) -> bool:
        try:
            return (path.parent / shard).is_file()
        except OSError as error:  # a name too long
            why = error.strerror
            raise BrokenFileError(path, f"it names the shard {shard!r:.80} ({why})") from None

    for shard, found in zip(shards, _for_each(shards, is_there, path), strict=True):
        if not found:
            raise BrokenFileError(path, f"it names the shard {shard!r}, which is missing")
    return mapping


def _for_each(names: Iterable[str], call: Callable[[str], T], where: Path) -> list[T]:
    """What the call gives for each name; several at once where each answer takes its time."""
    if not is_far(where):
        return [call(name) for name in names]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(call, names))


def _is_text(name: str) -> bool:
    """JSON can spell lone surrogates, which no file and no terminal can."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        BrokenFileError: it is none.
    """
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise BrokenFileError(path, f"it is over {_MAX_INDEX:,} bytes long")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokenFileError(path, getattr(error, "strerror", None) or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(path, f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise BrokenFileError(path, "it is not a JSON object")
    return value


def _check_index(
    index: Path,
    home: Mapping[str, str],
    parts: Mapping[str, SafetensorsCheckpoint | PickleCheckpoint],
) -> None:
    listed_in: dict[str, set[str]] = {name: set() for name in parts}
    for tensor, shard in home.items():
        listed_in[shard].add(tensor)
    for name, part in parts.items():
        listed_here = listed_in[name]
        if listed_here == set(part):
            continue
        if absent := sorted(listed_here.difference(part)):
            raise BrokenFileError(index, f"it lists {listed(absent)} in {name}, which lacks them")
        if extra := sorted(set(part).difference(listed_here)):
            raise BrokenFileError(index, f"it does not list {listed(extra)}, which {name} holds")
