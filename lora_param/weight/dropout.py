"""Dropout on the input of A, for all rules: for backward it keeps bits, no mask of numbers.

Sixteen random bits decide an element, and the decision is kept as one bit. The kernels mask their
input block by block as they use it (`draw_bits`, `masks`); other rules call `dropout`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["draw_bits", "dropout", "keep_probability", "masks"]

_LEVELS = 1 << 16  # resolution of the probability
_BLOCK = 1 << 20  # elements masked at a time on a CPU: what is kept of them is a few megabytes
_local = threading.local()


def dropout(x: Tensor, p: float) -> Tensor:
    """x with elements dropped and the others scaled up to make up for it, as `F.dropout` does."""
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    bits = draw_bits(rows.shape[0], rows.shape[1], p, x.device)
    kept: Tensor = _Dropped.apply(rows, bits, 1 / keep_probability(p))  # type: ignore[no-untyped-call]
    return kept.view(x.shape)


class _Dropped(torch.autograd.Function):
    """Saves the bits alone; its backward is itself, with the same bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.scale = scale
        kept = torch.empty_like(x)
        for start, mask in masks(x, bits):
            rows = slice(start, start + mask.shape[0])
            torch.mul(x[rows], mask.mul_(scale), out=kept[rows])
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Dropped.apply(grad, *ctx.saved_tensors, ctx.scale), None, None  # type: ignore[no-untyped-call]


def keep_probability(p: float) -> float:
    """The probability with which an element is really kept, p being rounded to 1/65536."""
    return 1 - round(p * _LEVELS) / _LEVELS


def _rows_in_block(rows: int, columns: int, device: torch.device) -> int:
    """Rows masked at a time: a multiple of 8, so that every block begins on a whole byte."""
    if device.type != "cpu":
        return max(rows, 1)
    return max(8, _BLOCK // max(columns, 1) // 8 * 8)


def draw_bits(rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    """Draw which elements of a (rows, columns) input are kept. uint8, eight elements each.

    The seed comes from torch's generator, so that `torch.manual_seed` repeats the draw.
    """
    dropped = round(p * _LEVELS)
    if device.type != "cpu":
        count = -(-rows * columns // 8) * 8
        keep = torch.rand(count, device=device) >= dropped / _LEVELS
        shifts = torch.arange(7, -1, -1, device=device, dtype=torch.uint8)
        return (keep.view(-1, 8).to(torch.uint8) << shifts).sum(-1, dtype=torch.uint8)
    generator = _seeded()
    step = max(_rows_in_block(rows, columns, device) * columns, 1)
    packed = []
    for start in range(0, rows * columns, step):
        count = min(step, rows * columns - start)
        draws = generator.random_raw(-(-count // 4)).view(np.uint16)[:count]
        packed.append(np.packbits(draws >= dropped))
    if not packed:  # no rows
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_numpy(packed[0] if len(packed) == 1 else np.concatenate(packed))


def _seeded() -> np.random.SFC64:
    """This thread's bit generator, in a state drawn from torch's: cheaper than a new one."""
    generator: np.random.SFC64 | None = getattr(_local, "generator", None)
    if generator is None:
        generator = _local.generator = np.random.SFC64()
    words = torch.randint(-(1 << 63), (1 << 63) - 1, (4,)).numpy().view(np.uint64)
    generator.state = {
        "bit_generator": "SFC64",
        "state": {"state": words},
        "has_uint32": 0,
        "uinteger": 0,
    }
    return generator


def masks(x: Tensor, bits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Ones and zeros for the elements of x, block by block of rows: first row, (rows, columns).

    Args:
        x: input of shape (rows, columns), whose dtype and device the masks have.
        bits: what `draw_bits` gave for that shape.
    """
    rows, columns = x.shape
    step = _rows_in_block(rows, columns, x.device)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        part = bits if start == 0 else bits[start * columns // 8 :]
        if x.device.type == "cpu":
            keep = torch.from_numpy(np.unpackbits(part.numpy(), count=count * columns))
        else:
            shifts = torch.arange(7, -1, -1, device=x.device, dtype=torch.uint8)
            keep = (part[:, None] >> shifts).bitwise_and_(1).view(-1)[: count * columns]
        yield start, keep.to(x.dtype).view(count, columns)
