"""`.safetensors` files: read lazily, written in a stream. Nothing here needs torch but tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lora_param.errors import BrokenFileError, OutputError
from lora_param.files.header import DTYPES, Entry, Header, encode_header, read_header
from lora_param.files.places import FarPath, place
from lora_param.files.writer import replace_file
from lora_param.fingerprint import BaseWeight, hash_sample, sample_positions

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

__all__ = [
    "NAMES",
    "Content",
    "SafetensorsFile",
    "StreamEntry",
    "entry_size",
    "place_entries",
    "tensor_bytes",
    "write_safetensors",
]

NAMES = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
"""Torch's name of a dtype → its name in the file."""

Content = Callable[[], "torch.Tensor | bytes | memoryview"]
StreamEntry = tuple[str, tuple[int, ...], Content]
"""Dtype (a key of `DTYPES`), shape as the header has it, and what gives the data."""

BLOCK = 1 << 18  # elements that are made float32 at a time
_RANK = {name: i for i, name in enumerate(DTYPES)}
_NUMPY = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}


class SafetensorsFile(Mapping[str, "torch.Tensor"]):
    """One `.safetensors` file, its header checked when it is opened.

    A mapping from names to CPU tensors, each read when it is asked for.

    Raises:
        MissingFileError: there is no such file.
        BrokenFileError: it is not a whole and consistent safetensors file.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = place(path)
        self.header: Header = read_header(self.path)
        self._state = self._stat()
        self._handle: Any = None

    @property
    def metadata(self) -> dict[str, str]:
        """The texts of `__metadata__`."""
        return self.header.metadata

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return self.header.size - self.header.start

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.entries)

    def __len__(self) -> int:
        return len(self.header.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.header.entries

    def _stat(self) -> tuple[int, int, int]:
        try:
            s = self.path.stat()
        except OSError as error:
            raise BrokenFileError(self.path, error.strerror or str(error)) from error
        return s.st_ino, s.st_size, s.st_mtime_ns

    def check_unchanged(self) -> None:
        """BrokenFileError where it is no longer the file whose header was read."""
        # The data are read through the path, long after the header: offsets of another file
        # would give plausible numbers.
        if self._stat() != self._state:
            raise BrokenFileError(self.path, "it has changed since it was opened")

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        entry = self.header.entries[name]
        if isinstance(self.path, FarPath):
            return _tensor(self._fetch(entry), entry, self.path, name)
        try:
            if self._handle is None:
                self.check_unchanged()
                self._handle = safe_open(str(self.path), framework="pt")
            tensor: torch.Tensor = self._handle.get_tensor(name)
        except (SafetensorError, AttributeError, KeyError) as error:
            raise BrokenFileError(
                self.path, f"{name} of dtype {entry.dtype} cannot be read ({error})"
            ) from error
        return tensor

    def _raw(self, name: str, dtype: str) -> NDArray[Any]:
        """The bytes of a tensor mapped as a flat array."""
        import numpy as np

        e = self.header.entries[name]
        size = np.dtype(dtype).itemsize
        if e.start == e.stop:
            return np.empty(0, dtype)
        if isinstance(self.path, FarPath):
            return np.frombuffer(self._fetch(e), dtype)
        self.check_unchanged()
        mapped = np.memmap(
            self.path,
            dtype,
            mode="r",
            offset=self.header.start + e.start,
            shape=((e.stop - e.start) // size,),
        )
        return mapped.view(np.ndarray)  # whose slices cost less

    def _fetch(self, entry: Entry) -> bytearray:
        """The bytes of a tensor that is not on this machine."""
        assert isinstance(self.path, FarPath)
        if self._handle is None:
            self.check_unchanged()
            self._handle = self.path
        start = self.header.start
        return bytearray(self.path.read_range(start + entry.start, start + entry.stop))

    def raw(self, name: str) -> bytes:
        """The bytes of a tensor; for small ones that are no numbers."""
        return self._raw(name, "u1").tobytes()

    def array(self, name: str) -> NDArray[np.float32]:
        """The tensor of this name as a float32 array, without torch where numpy has the dtype."""
        import numpy as np

        entry = self.header.entries[name]
        if entry.dtype not in _NUMPY:
            return np.asarray(self[name].float().numpy())
        return _wide(self._raw(name, _NUMPY[entry.dtype]), entry.dtype).reshape(entry.shape)

    def flat_blocks(self, name: str, start: int, stop: int) -> Iterator[NDArray[np.float32]]:
        """The elements `start` to `stop` of a tensor, as `array` has them, a block at a time."""
        entry = self.header.entries[name]
        if entry.dtype not in _NUMPY:
            flat = self.array(name).reshape(-1)[start:stop]
            return (flat[i : i + BLOCK] for i in range(0, len(flat), BLOCK))
        raw = self._raw(name, _NUMPY[entry.dtype])[start:stop]
        return (_wide(raw[i : i + BLOCK], entry.dtype) for i in range(0, len(raw), BLOCK))

    def base_weight(self, name: str) -> BaseWeight:
        """Fingerprint of one entry; reads no more than the sampled elements."""
        e = self.header.entries[name]
        raw = self._raw(name, f"V{max(DTYPES[e.dtype][0] // 8, 1)}")
        sample = raw[sample_positions(len(raw))].tobytes()
        return BaseWeight(e.torch_shape, e.torch_dtype, hash_sample(sample))

    def close(self) -> None:
        """Let go of the mapping; tensors already given out stay valid."""
        self._handle = None


def _tensor(data: bytearray, entry: Entry, path: Path, name: str) -> torch.Tensor:
    """A tensor over bytes as a file has them."""
    import torch

    dtype = getattr(torch, entry.torch_dtype, None)
    if dtype is None:
        raise BrokenFileError(path, f"{name} of dtype {entry.dtype} cannot be read")
    if not data:
        return torch.empty(entry.torch_shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return flat.view(dtype).reshape(entry.torch_shape)


def _wide(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Stored elements as float32."""
    import numpy as np

    if dtype != "BF16":
        return np.asarray(raw.astype(np.float32))
    values = raw.astype(np.uint32)
    values <<= 16  # the upper half of a float32
    return np.asarray(values).view(np.float32)


def tensor_bytes(content: torch.Tensor | bytes | memoryview) -> bytes | memoryview:
    """The content's bytes in C order, little-endian; a view where no copy is needed."""
    if isinstance(content, bytes | memoryview):
        return content
    import torch

    flat = content.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if flat.numel() == 0:
        return b""
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def entry_size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in the file."""
    bits = DTYPES[dtype][0]
    for size in shape:
        bits *= size
    return bits // 8


def place_entries(
    entries: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str] | None,
    where: object,
) -> tuple[bytes, dict[str, Entry], int]:
    """A file's header, where each tensor's data go behind it, and the size of all data.

    Args:
        entries: name → (dtype, shape).
        metadata: texts by name.
        where: what to call the file in messages.

    Raises:
        OutputError: the header would be too long, or a tensor is named `__metadata__`.
    """
    placed: dict[str, Entry] = {}
    end = 0
    for name in sorted(entries, key=lambda n: (-_RANK[entries[n][0]], n)):
        dtype, shape = entries[name]
        start, end = end, end + entry_size(dtype, shape)
        placed[name] = Entry(dtype, tuple(shape), start, end)
    return encode_header(placed.items(), metadata or {}, where), placed, end


def write_safetensors(
    target: str | os.PathLike[str] | IO[bytes],
    entries: Mapping[str, StreamEntry],
    metadata: Mapping[str, str] | None = None,
    *,
    sync: bool = True,
    progress: Callable[[int, str], None] | None = None,
) -> int:
    """Write a safetensors file in one pass, one tensor in memory at a time.

    The bytes depend on the content alone: tensors stand by dtype (widest first) and name, as the
    reference writer puts them, and the metadata by name.

    Args:
        target: a path, written atomically and replaced where it exists, or an open binary file.
        entries: name → (dtype, shape, what gives the tensor or its bytes).
        metadata: texts by name.
        sync: have a path's data on the disk before the name shows them.
        progress: called with the bytes written and the name, after each tensor.

    Returns:
        The number of bytes written.

    Raises:
        OutputError: the header would be too long, a tensor is named `__metadata__`, a content
            is not of the size announced, or the path cannot be written.

    >>> from io import BytesIO
    >>> buffer = BytesIO()
    >>> write_safetensors(buffer, {"x": ("F32", (1,), lambda: bytes(4))}, {"format": "pt"})
    100
    """
    if isinstance(target, str | os.PathLike):
        with replace_file(target, force=True, sync=sync) as file:
            return write_safetensors(file, entries, metadata, progress=progress)
    where = getattr(target, "name", "the file")
    header, placed, end = place_entries(
        {name: (dtype, shape) for name, (dtype, shape, _) in entries.items()}, metadata, where
    )
    target.write(header)
    for name, entry in placed.items():
        data = tensor_bytes(entries[name][2]())
        if len(data) != entry.stop - entry.start:
            raise OutputError(
                where, f"{name} gave {len(data)} bytes where {entry.stop - entry.start} are due"
            )
        target.write(data)
        if progress is not None:
            progress(len(data), name)
    return len(header) + end
