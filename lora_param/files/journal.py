"""What of an output is written, noted beside it for a process that goes on with it.

Lines of JSON. The first says of which plan the output is, each other one what is done and what was
found by it. A line is written after the data that it is about; one that a kill cut short, and what
follows it, does not count.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import IO, Any

__all__ = ["Journal", "is_journal_of"]


class Journal:
    """The journal of an output, begun, or gone on with where it is of the same plan.

    Args:
        path: the file.
        plan: what identifies all that the output depends on.

    Attributes:
        done: what was found, by what was done, when it was opened.
    """

    def __init__(self, path: Path, plan: str) -> None:
        self._lock = threading.Lock()
        first, self.done, size = _read(path)
        if first != plan:
            self.done, size = {}, 0
        self._file: IO[bytes] = path.open("r+b" if path.exists() else "x+b", buffering=0)
        self._file.truncate(size)
        self._file.seek(size)
        if not size:
            self._append(plan)

    def add(self, key: str, found: Any) -> None:
        """Note that something is done; by any thread."""
        self._append([key, found])

    def _append(self, value: Any) -> None:
        line = json.dumps(value).encode() + b"\n"
        with self._lock:
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def is_journal_of(path: str | os.PathLike[str], plan: str) -> bool:
    """There is a journal at the path, and it is of this plan."""
    return _read(Path(path))[0] == plan


def _read(path: Path) -> tuple[str | None, dict[str, Any], int]:
    """The plan, what is done, and the size of the lines that are whole."""
    plan: str | None = None
    done: dict[str, Any] = {}
    size = 0
    if not path.is_file():
        return plan, done, size
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            value = json.loads(line if line.endswith(b"\n") else b"")
        except ValueError:
            break
        if plan is None and isinstance(value, str):
            plan = value
        elif plan is not None and isinstance(value, list):
            done[value[0]] = value[1]
        else:
            break
        size += len(line)
    return plan, done, size
