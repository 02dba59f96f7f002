"""What the quantized formats share: `Packed`, one weight as it is stored, and scales over blocks.

A weight is read as float32, which holds the numbers of every format exactly or as its library
computes them; rounding that to the weight's own dtype gives the library's result bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

from lora_param.targets.weights import Weight

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FP4", "Found", "Packed", "Parts", "View"]
__all__ += ["block_of", "peaks", "scaled", "spread", "unpack_fp4", "unpack_words"]

Parts = Mapping[str, "Tensor"]

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a float of 1 sign, 2 exponent and 1 mantissa bit."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight, and how a quantized format stores it.

    Attributes:
        name: the weight's name in the model, under which the file may hold nothing.
        shape, dtype: of its numbers.
        kind: the format in words, e.g. "fp8 in blocks of 128×128".
        entries: role → the file's entry; the first one's file is the weight's home.
        decode: tensors by role → the numbers, float32.
        encode: the numbers, and the tensors that stood there → tensors by role, each of the shape
            and dtype that stood there; None where the format can only be read.
        beside: entries that mean nothing without the format, such as scales of activations.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    entries: Mapping[str, str]
    decode: Callable[[Parts], Tensor]
    encode: Callable[[Tensor, Parts], dict[str, Tensor]] | None = None
    beside: tuple[str, ...] = ()

    @property
    def home(self) -> str:
        """The entry whose place in the files is the weight's."""
        return next(iter(self.entries.values()))

    @property
    def members(self) -> tuple[str, ...]:
        """Every entry of the file that is gone where the weight is stored plainly."""
        return (*self.entries.values(), *self.beside)


@dataclass(frozen=True)
class View:
    """What a format is told by: headers, configs, and the bytes of small entries.

    Attributes:
        entries: every entry of the checkpoint.
        config: the `quantization_config`, {} where there is none.
        dtype: what the model computes in, as its config states it; "" where nothing does.
        metadata: texts of the files' headers.
        read: the bytes of an entry.
    """

    entries: Mapping[str, Weight]
    config: Mapping[str, Any]
    dtype: str
    metadata: Mapping[str, str]
    read: Callable[[str], bytes]

    def dtype_of(self, name: str) -> str:
        """The model's dtype, or the entry's, where that is one to compute in, or bfloat16."""
        own = self.entries[name].dtype
        usable = own in ("bfloat16", "float16")
        return self.dtype or (own if usable else "bfloat16")


@dataclass
class Found:
    """What a format recognised.

    Attributes:
        packed: the weights that can be read.
        refused: entries that are of the format and yet cannot be read → why.
        told: texts of the headers that say so.
    """

    packed: list[Packed] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


def block_of(
    shape: tuple[int, ...], scales: tuple[int, ...], stated: tuple[int, ...] | None
) -> tuple[int, int] | None:
    """Rows and columns of a matrix (or of each of a stack) that share one scale, or None.

    One scale for all, and one for each row, are told by the shapes; blocks have to be stated.

    >>> block_of((6, 8), (), None), block_of((6, 8), (6, 1), None), block_of((6, 8), (2, 2), (4, 4))
    ((6, 8), (1, 8), (4, 4))
    """
    if len(shape) < 2:
        return None
    (*lead, m, n), count = shape, prod(scales)
    if count == 1:
        return m, n
    if scales in ((*lead, m, 1), (*lead, m)) and (len(scales) > 1 or not lead):
        return 1, n
    if count == prod(lead) and scales[: len(lead)] == tuple(lead):
        return m, n
    if stated is None or len(stated) != 2 or min(stated) < 1:
        return None
    rows, columns = stated
    return (rows, columns) if scales == (*lead, -(-m // rows), -(-n // columns)) else None


def scaled(q: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """q, each block of rows and columns times its scale. q (*, m, n) → (*, m, n), float32."""
    import torch

    return q.to(torch.float32, copy=True).mul_(spread(scales, tuple(q.shape), block))


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """Scales of blocks as a tensor that multiplies the matrices, of (*, m or 1, n or 1)."""
    import torch

    *lead, m, n = shape
    rows, columns = min(block[0], m), min(block[1], n)
    grid = scales.to(torch.float32)
    grid = grid.reshape(*(lead if grid.numel() > 1 else ()), -(-m // rows), -(-n // columns))
    if 1 < rows < m:
        grid = grid.repeat_interleave(rows, -2)[..., :m, :]
    if 1 < columns < n:
        grid = grid.repeat_interleave(columns, -1)[..., :n]
    return grid


def peaks(W: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude in each block. (*, m, n) → (*, m / rows, n / columns)"""
    import torch
    import torch.nn.functional as F

    *lead, m, n = W.shape
    rows, columns = min(block[0], m), min(block[1], n)
    padded = F.pad(W.abs(), (0, -n % columns, 0, -m % rows))
    grid = padded.view(*lead, -(-m // rows), rows, -(-n // columns), columns)
    found: Tensor = torch.amax(grid, (-3, -1))
    return found


def unpack_fp4(packed: Tensor) -> Tensor:
    """Two 4-bit floats from each byte, the low half first. (*, n / 2) uint8 → (*, n) float32"""
    import torch

    table = torch.tensor((*FP4, *(-v for v in FP4)))
    packed = packed.view(torch.uint8)
    halves = torch.stack((packed & 15, packed >> 4), -1)  # (*, n / 2, 2)
    return table[halves.flatten(-2).int()]


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unsigned fields from words of 32 bits, the lowest first. (m, k) → (m, 32 k // bits) int32

    Fields of 1, 2, 4 or 8 bits lie within a word.
    """
    import torch

    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)  # (m, k, 32 / bits)
    return fields.flatten(-2)
