"""The blocks of llama.cpp's types, as they lie in a GGUF file.

Each takes rows of bytes, one for a block, and gives rows of float32, as the format's reference
computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from lora_param.checkpoint.quantized.packed import Packed, Parts
from lora_param.files.gguf import Gguf, Kind

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["READ", "dequantize_gguf", "find_gguf", "quantize_q8_0"]


def _half(octets: Tensor) -> Tensor:
    """A float16 in two bytes. (k, 2) uint8 → (k, 1) float32"""
    import torch

    return octets.contiguous().view(torch.float16).float()


def _halves(octets: Tensor, width: int, shifts: tuple[int, ...], mask: int) -> Tensor:
    """Fields of bytes: of each run of `width` bytes first all lowest ones. (k, n) → (k, fields)"""
    import torch

    runs = octets.reshape(octets.shape[0], -1, 1, width)
    by = torch.tensor(shifts, dtype=torch.uint8).view(1, 1, -1, 1)
    return ((runs >> by) & mask).flatten(1)


def _q8_0(blocks: Tensor) -> Tensor:
    """A scale and 32 int8."""
    import torch

    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks[:, :2])


def _q4_0(blocks: Tensor) -> Tensor:
    """A scale and 32 fields of 4 bits, less 8."""
    fields = _halves(blocks[:, 2:], 16, (0, 4), 15).float()
    return _half(blocks[:, :2]) * (fields - 8)


def _scales_and_minima(octets: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of 6 bits each. (k, 12) → (k, 8), (k, 8)"""
    import torch

    d, m, both = octets.view(-1, 3, 4).unbind(1)
    scales = torch.cat((d & 63, (both & 15) | ((d >> 2) & 48)), 1)
    minima = torch.cat((m & 63, (both >> 4) | ((m >> 2) & 48)), 1)
    return scales.float(), minima.float()


def _with_minima(blocks: Tensor, fields: Tensor) -> Tensor:
    """Eight runs of 32 fields, times a scale, less a minimum."""
    scales, minima = _scales_and_minima(blocks[:, 4:16].contiguous())
    d = (_half(blocks[:, :2]) * scales).unsqueeze(-1)  # (k, 8, 1)
    low = (_half(blocks[:, 2:4]) * minima).unsqueeze(-1)
    return (d * fields.view(-1, 8, 32).float() - low).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    """256 fields of 4 bits."""
    return _with_minima(blocks, _halves(blocks[:, 16:], 32, (0, 4), 15))


def _q5_k(blocks: Tensor) -> Tensor:
    """256 fields of 5 bits, the highest apart."""
    high = _halves(blocks[:, 16:48], 32, tuple(range(8)), 1)
    return _with_minima(blocks, _halves(blocks[:, 48:], 32, (0, 4), 15) | (high << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    """16 runs of 16 fields of 6 bits, less 32, the highest two apart."""
    import torch

    low = _halves(blocks[:, :128], 64, (0, 4), 15)
    high = _halves(blocks[:, 128:192], 32, (0, 2, 4, 6), 3)
    fields = (low | (high << 4)).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    d = (_half(blocks[:, 208:]) * scales).unsqueeze(-1)  # (k, 16, 1)
    return (d * fields.view(-1, 16, 16)).flatten(1)


READ: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By the type's name: what reads its blocks."""


def dequantize_gguf(octets: Tensor, kind: Kind, shape: tuple[int, ...]) -> Tensor:
    """The numbers of a tensor's bytes, float32, of this shape."""
    return READ[kind.name](octets.reshape(-1, kind.size)).reshape(shape)


def quantize_q8_0(W: Tensor) -> Tensor:
    """W in Q8_0, as the reference does it: halves are rounded away from zero. → uint8, flat"""
    import torch

    blocks = W.reshape(-1, 32).float()
    d = blocks.abs().amax(1, keepdim=True) / 127
    steps = blocks * torch.where(d == 0, 0, 1 / d)
    whole = steps.abs().floor()
    whole += (2 * (steps.abs() - whole)).floor()
    q = (steps.sign() * whole).to(torch.int8).view(torch.uint8)
    return torch.cat((d.half().view(torch.uint8), q), 1).view(-1)


def find_gguf(header: Gguf) -> tuple[list[Packed], dict[str, str]]:
    """The quantized tensors of a file, and those of a type that is not read → why."""
    packed, refused = [], {}
    for name, entry in header.entries.items():
        kind = entry.kind
        if kind.elements == 1:
            continue
        if kind.name not in READ:
            refused[name] = f"GGUF {kind.name}, which is not read"
            continue
        decode = partial(_decode, kind, entry.shape)
        encode = _encode if kind.name == "Q8_0" else None
        entries = {"blocks": name}
        packed.append(
            Packed(name, entry.shape, "bfloat16", f"GGUF {kind.name}", entries, decode, encode)
        )
    return packed, refused


def _decode(kind: Kind, shape: tuple[int, ...], parts: Parts) -> Tensor:
    return dequantize_gguf(parts["blocks"], kind, shape)


def _encode(W: Tensor, parts: Parts) -> dict[str, Tensor]:
    return {"blocks": quantize_q8_0(W).view(parts["blocks"].shape)}
