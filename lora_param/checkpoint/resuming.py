"""Going on with a bake that was killed: what tells that it is the same one, and what is said."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from lora_param import __version__
from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.distributed import DistributedCheckpoint
from lora_param.checkpoint.merging import Merging
from lora_param.checkpoint.options import BakeOptions
from lora_param.checkpoint.places import stored_in
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.checkpoint.shards import DirectoryCheckpoint
from lora_param.files.journal import is_journal_of
from lora_param.files.places import place
from lora_param.weight.blocks import BLOCK

__all__ = ["JOURNAL", "Leftovers", "mark_of"]

JOURNAL = "journal"
"""Its name, beside the result, while this is made."""

_HEAD = 1 << 16  # bytes of a file without a header that are looked at


class Leftovers:
    """What killed processes left of an output, as it is looked at.

    Args:
        mark: what identifies this bake, see `mark_of`.
    """

    def __init__(self, mark: str) -> None:
        self.mark, self._others, self._taken = mark, 0, False

    def fits(self, temporary: Path) -> bool:
        """It is of this very bake."""
        self._taken = is_journal_of(temporary / JOURNAL, self.mark)
        self._others += not self._taken
        return self._taken

    def note(self, written: int, size: int) -> str:
        """What became of it, in a sentence.

        Args:
            written: bytes that were there already.
            size: of the result.
        """
        if self._taken:
            share = min(written / max(size, 1), 1.0)
            return f"Resumed: {share:.0%} of the result had been written by a bake that was killed."
        if self._others:
            return (
                "What a killed bake left of this output was of another base, adapter or setting: "
                "it was not used, and all is written anew."
            )
        return "There was nothing to resume (of this output, since the system's start)."


def mark_of(merging: Merging, options: BakeOptions, form: str | None) -> str:
    """A hash of all that a bake's result and report depend on: equal marks, equal bits.

    Of the base's files the size, the time of the last change, and the header.
    """
    import torch

    settings = [
        options.key,
        merging.dtype,
        merging.max_shard_size,
        merging.link,
        merging.exact,
        form,
        options.original,
        merging.adapters_mark,
        BLOCK,
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        __version__,
    ]
    said = [list(map(str, settings)), *_files(stored_in(merging.base))]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _files(base: Checkpoint) -> Iterator[list[str | int]]:
    """What tells the files of a base from what they were before, or will be after a change."""
    counts: dict[Path, int] = {}
    if isinstance(base, DistributedCheckpoint):
        counts = {base.path / name: _HEAD for name in (".metadata", *base.index.files)}
    else:
        parts = base.parts.values() if isinstance(base, DirectoryCheckpoint) else [base]
        for part in parts:
            whole = part.header.start if isinstance(part, SafetensorsCheckpoint) else _HEAD
            counts[place(part.path)] = whole
    for path, count in counts.items():
        state = path.stat()
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(count)).hexdigest()
        yield [os.path.realpath(path), state.st_size, state.st_mtime_ns, head]
