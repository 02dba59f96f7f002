"""What a format of adapter files is: how to recognise, read and write it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lora_param.adapter import Adapter

__all__ = ["Format", "Write"]


class Write(Protocol):
    """Writes an adapter to a path, atomically."""

    def __call__(self, adapter: Adapter, path: Path, *, force: bool, sync: bool) -> None:
        """Write it."""


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: what `format=` takes.
        recognise: the path holds an adapter of this format. It raises BrokenFileError for a file
            that is of no format because it is damaged.
        read: path → adapter, its tensors read lazily.
        write: see `Write`.
    """

    name: str
    recognise: Callable[[Path], bool]
    read: Callable[[Path], Adapter]
    write: Write
