"""Files of tensors by name, as several tools keep adapters: of safetensors, or of torch.save."""

from __future__ import annotations

import pickletools
import struct
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from lora_param.checkpoint.pickle import PickleCheckpoint
from lora_param.checkpoint.unpickling import is_zip
from lora_param.errors import NonFiniteError, OutputError
from lora_param.files.header import read_header
from lora_param.files.places import fetched
from lora_param.files.safetensors import NAMES, SafetensorsFile, StreamEntry, write_safetensors
from lora_param.files.writer import replace_file

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StateFile", "names_in", "open_state", "write_state"]

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "UNICODE", "BINUNICODE8")
_DAMAGED = (
    *(zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError),
    *(ValueError, IndexError, OverflowError, struct.error),  # pickletools reads what it finds
)
_MOST = 1 << 26  # bytes of a pickle beside its tensors; one of an adapter has some thousands


@dataclass(frozen=True)
class StateFile:
    """One such file.

    Attributes:
        path: where it is.
        tensors: by name, read as they are asked for.
        shapes: by name.
        metadata: of safetensors.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=dict)


def names_in(path: Path) -> list[str]:
    """The names of a file's tensors, read without torch; of a pickle, all texts in it.

    Nothing for what is no such file. A damaged pickle has none here; who opens it is told.

    Raises:
        BrokenFileError: a safetensors file is damaged.
    """
    kind = path.suffix.lower()
    if not path.is_file() or kind not in (".safetensors", *_PICKLES):
        return []
    s = path.stat()
    return list(_names_in(path, kind, (s.st_ino, s.st_size, s.st_mtime_ns)))


@lru_cache(maxsize=8)
def _names_in(path: Path, kind: str, state: tuple[int, int, int]) -> list[str]:  # noqa: ARG001
    """Kept, since each format asks in turn; `state` tells a file from what stood there before."""
    if kind == ".safetensors":
        return list(read_header(path).entries)
    if not is_zip(path):
        return []
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            record = next((r for r in records if r.filename.endswith("/data.pkl")), None)
            if record is None or record.compress_type or record.file_size > _MOST:
                return []
            content = archive.read(record)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in texts that are damaged
            found = pickletools.genops(content)
            return [str(text) for code, text, _ in found if code.name in _TEXTS]
    except _DAMAGED:
        return []


def open_state(path: Path) -> StateFile:
    """Open a file that `names_in` has looked into.

    Raises:
        BrokenFileError, UnsafePickleError: it cannot, or must not, be read.
    """
    if path.suffix.lower() == ".safetensors":
        file = SafetensorsFile(path)
        shapes = {n: e.torch_shape for n, e in file.header.entries.items()}
        return StateFile(path, file, shapes, file.metadata)
    content = PickleCheckpoint(fetched(path))
    return StateFile(path, content, {n: w.shape for n, w in content.weights.items()})


def write_state(
    tensors: Mapping[str, Tensor],
    path: Path,
    source: str,
    *,
    metadata: Mapping[str, str] | None = None,
    force: bool,
    sync: bool,
) -> None:
    """Write tensors by name, as the name of the file says; equal tensors give equal bytes.

    Args:
        tensors: what goes into the file.
        path: it ends in `.safetensors`, or in what torch.save's files end in.
        source: what to call the adapter in messages.
        metadata: of safetensors.
        force, sync: as for `replace_file`.

    Raises:
        OutputError: the name ends otherwise, or the file cannot be written.
        NonFiniteError: a tensor holds NaN or infinity.
    """
    kind = path.suffix.lower()
    if kind not in (".safetensors", *_PICKLES):
        raise OutputError(path, f"its name ends in none of .safetensors, {', '.join(_PICKLES)}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise NonFiniteError(f"{name} of {source}")
    if kind != ".safetensors":
        import torch

        content = {n: t.detach().cpu().clone() for n, t in sorted(tensors.items())}
        with replace_file(path, force=force, sync=sync) as file:
            torch.save(content, file)
        return
    entries: dict[str, StreamEntry] = {
        n: (NAMES[str(t.dtype).removeprefix("torch.")], tuple(t.shape), partial(_itself, t))
        for n, t in tensors.items()
    }
    with replace_file(path, force=force, sync=sync) as file:
        write_safetensors(file, entries, metadata or {"format": "pt"})


def _itself(tensor: Tensor) -> Tensor:
    return tensor
