"""Directories of torch.distributed.checkpoint: tensors put together from all ranks' chunks."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.base import Checkpoint, packed_reason
from lora_param.checkpoint.pickle import choose_state_dict, find_state_dicts
from lora_param.checkpoint.shards import config_in
from lora_param.errors import BrokenFileError, FileError, UnsafePickleError
from lora_param.files.distributed import DistributedIndex, StoredTensor, read_index
from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    import torch

__all__ = ["DistributedCheckpoint", "reading"]


class DistributedCheckpoint(Checkpoint):
    """A state dict in a distributed checkpoint, at its top level or nested.

    Only what is asked for is read, by torch's own reader and without a process group, in one
    process, however many wrote it.

    Attributes:
        path: the directory.
        index: what it holds.
        key: dotted name of the state dict, "" for the top level.
        stored: name in the state dict → the tensor's name in the directory.

    Raises:
        BrokenFileError, UnsafePickleError, UnknownFileError: see `read_index`.
        UnknownFileError: it holds no state dict, or several and none that is usually meant.
        OptionError: there is no state dict of this key.
    """

    path: Path

    def __init__(self, path: Path, key: str | None = None) -> None:
        self.path = path
        self.index: DistributedIndex = read_index(path)
        content = _nested(self.index)
        found = find_state_dicts(content, _Named)
        what = "a distributed checkpoint"
        nesting = choose_state_dict(path, what, content, found, key)
        self.key = ".".join(nesting)
        self.stored: dict[str, str] = {
            name: entry.name for name, entry in found[nesting].items() if isinstance(entry, _Named)
        }

    def entry(self, name: str) -> StoredTensor:
        """What the index says of a tensor of the state dict."""
        return self.index.tensors[self.stored[name]]

    def _describe(self) -> dict[str, Weight]:
        entries = {name: self.entry(name) for name in self.stored}
        return {
            name: Weight(name, e.shape, e.dtype, packed=packed_reason(name, entries))
            for name, e in entries.items()
        }

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(self.entry(name).nbytes for name in self.stored)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json beside the index."""
        return config_in(self.path)

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        from lora_param.checkpoint.torch_reader import load_tensor

        entry = self.entry(name)
        with reading(self.path, self.stored[name]):
            W = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            load_tensor(self.path, self.stored[name], entry, W)
        return W


@contextmanager
def reading(path: Path, name: str) -> Iterator[None]:
    """Say which tensor of which directory could not be read.

    Raises:
        UnsafePickleError: opening it would run code.
        BrokenFileError: it is damaged.
    """
    try:
        yield
    except FileError:
        raise
    except pickle.UnpicklingError as error:
        if needed := re.search(r"GLOBAL (\S+)", str(error)):
            raise UnsafePickleError(path, f"the data of {name} need {needed[1]}") from None
        raise BrokenFileError(path, f"the data of {name} are damaged") from None
    except Exception as error:
        # Damaged bytes can make the unpickler trip over any exception that Python has.
        reason = str(error).split("\n")[0].strip() or type(error).__name__
        raise BrokenFileError(path, f"the data of {name} are damaged ({reason[:160]})") from None


class _Named:
    """Stands for a tensor where state dicts are looked for."""

    def __init__(self, name: str) -> None:
        self.name = name


def _nested(index: DistributedIndex) -> dict[Any, Any]:
    """What was saved, with its nesting, as far as the index tells it."""
    content: dict[Any, Any] = {}
    for name, path in index.nesting.items():
        inner = content
        for part in path[:-1]:
            found = inner.setdefault(part, {})
            if not isinstance(found, dict):  # one name is a tensor's and holds others, too
                break
            inner = found
        else:
            inner.setdefault(path[-1], _Named(name) if name in index.tensors else None)
    return content
