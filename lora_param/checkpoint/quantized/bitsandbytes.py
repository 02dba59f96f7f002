"""bitsandbytes: 4 bits by a table (NF4, FP4) and int8 by rows.

4 bits: `X.weight` holds two indices in each byte, the high half first, into the 16 numbers of
`X.weight.quant_map`; each block of that many elements is multiplied by its `absmax`. Where that is
itself quantized ("double quantization"), it is a byte into `nested_quant_map`, times the
`nested_absmax` of its block, plus an offset. Shape, dtype and sizes are JSON in the bytes of
`X.weight.quant_state.bitsandbytes__nf4`.

8 bits: `X.weight` int8 times its row's `X.SCB` over 127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.quantized.packed import Found, Packed, Parts, View

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Blocks", "dequantize_4bit", "dequantize_int8", "find_bitsandbytes"]
__all__ += ["quantize_4bit", "quantize_int8"]

_STATE = ".quant_state.bitsandbytes__"
_ROLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = ("float32", "float16", "bfloat16")
_INVERSE = 7.874015718698502e-3  # of 127: the library multiplies by it


@dataclass(frozen=True, slots=True)
class Blocks:
    """How many elements share an absmax, how many absmax share one of their own, and its offset."""

    shape: tuple[int, ...]
    size: int
    nested_size: int = 0
    offset: float = 0.0


def dequantize_4bit(parts: Parts, blocks: Blocks) -> Tensor:
    """Numbers of a table times their block's absmax.

    Args:
        parts: `weight` (⌈mn / 2⌉, 1) uint8, `absmax` (⌈mn / size⌉,), `quant_map` (16,), and where
            absmax is uint8 `nested_absmax` and `nested_quant_map` (256,).
        blocks: their sizes.

    Returns:
        (m, n) float32.
    """
    import torch

    count = prod(blocks.shape)
    packed = parts["weight"].reshape(-1).view(torch.uint8)
    halves = torch.stack((packed >> 4, packed & 15), -1).view(-1)[:count]
    numbers = parts["quant_map"].float()[halves.int()]  # (m n,)
    return _times(numbers, _absmax(parts, blocks), blocks.size).view(blocks.shape)


def _absmax(parts: Parts, blocks: Blocks) -> Tensor:
    absmax = parts["absmax"]
    if not blocks.nested_size:
        return absmax.float()
    numbers = parts["nested_quant_map"].float()[absmax.int()]
    return _times(numbers, parts["nested_absmax"].float(), blocks.nested_size) + blocks.offset


def _times(numbers: Tensor, factors: Tensor, size: int) -> Tensor:
    """Each run of `size` numbers times its factor. (k,), (⌈k / size⌉,) → (k,)"""
    import torch.nn.functional as F

    count = numbers.numel()
    rows = F.pad(numbers, (0, -count % size)).view(-1, size)
    return (rows * factors.unsqueeze(1)).view(-1)[:count]


def quantize_4bit(W: Tensor, parts: Parts, blocks: Blocks) -> dict[str, Tensor]:
    """W in the same table and blocks; of a nested absmax the offset is kept.

    Args:
        W: (m, n) float32.
        parts: what stood there, as for `dequantize_4bit`.
        blocks: their sizes.
    """
    import torch
    import torch.nn.functional as F

    absmax = _runs(W.reshape(-1), blocks.size).abs().amax(1)
    new = dict(parts)
    if blocks.nested_size:
        centred = absmax - blocks.offset
        nested = _runs(centred, blocks.nested_size).abs().amax(1)
        new["absmax"] = _nearest(centred, nested, parts["nested_quant_map"], blocks.nested_size)
        new["nested_absmax"] = nested.to(parts["nested_absmax"].dtype)
        absmax = _absmax(new, blocks)
    else:
        new["absmax"] = absmax.to(parts["absmax"].dtype)
    index = _nearest(W.reshape(-1), absmax, parts["quant_map"], blocks.size)
    index = F.pad(index, (0, index.numel() % 2)).view(-1, 2)
    packed = (index[:, 0] << 4) | index[:, 1]
    stood = parts["weight"]
    new["weight"] = packed.view(torch.uint8).view(stood.dtype).view(stood.shape)
    return new


def _runs(values: Tensor, size: int) -> Tensor:
    import torch.nn.functional as F

    return F.pad(values, (0, -values.numel() % size)).view(-1, size)


def _nearest(values: Tensor, factors: Tensor, table: Tensor, size: int) -> Tensor:
    """The index of the number in a table nearest to each value over its run's factor, uint8."""
    import torch

    numbers, order = table.float().sort()
    middles = (numbers[1:] + numbers[:-1]) / 2
    inverse = torch.where(factors == 0, 0, 1 / factors)
    return order[torch.bucketize(_times(values, inverse, size), middles)].to(torch.uint8)


def dequantize_int8(weight: Tensor, absmax: Tensor) -> Tensor:
    """Rows times their absmax over 127. weight (m, n) int8, absmax (m,) → (m, n) float32"""
    return weight * absmax.float().view(-1, 1) * _INVERSE


def quantize_int8(W: Tensor) -> tuple[Tensor, Tensor]:
    """W (m, n) float32 → (m, n) int8 and absmax (m,) of its rows."""
    import torch

    absmax = W.abs().amax(1)
    steps = torch.where(absmax == 0, 0, 127.0 / absmax).view(-1, 1)
    return (W * steps).round_().to(torch.int8), absmax


def find_bitsandbytes(view: View) -> Found:
    """The weights with a `quant_state` of 4 bits, or an `SCB` of 8, beside them."""
    found = Found()
    for entry in view.entries:
        if _STATE in entry:
            _find_4bit(view, entry, found)
        elif entry.endswith(".SCB"):
            _find_int8(view, entry, found)
    return found


def _find_4bit(view: View, state: str, found: Found) -> None:
    name, _, table = state.partition(_STATE)
    entries = {"weight": name} | {r: f"{name}.{r}" for r in _ROLES}
    entries = {role: entry for role, entry in entries.items() if entry in view.entries}
    kind = f"bitsandbytes {table}"
    blocks, dtype = _blocks(view.read(state))
    shapes = {role: view.entries[entry].shape for role, entry in entries.items()}
    if blocks is None or not _fits(shapes, blocks):
        reason = f"{kind}, whose {state} does not fit what is stored"
        found.refused |= dict.fromkeys((state, *entries.values()), reason)
        return
    kind += f" in blocks of {blocks.size}"
    found.packed.append(
        Packed(
            name,
            blocks.shape,
            dtype,
            kind,
            {**entries, "state": state},
            partial(_decode_4bit, blocks),
            partial(_encode_4bit, blocks),
        )
    )


def _blocks(raw: bytes) -> tuple[Blocks | None, str]:
    """The sizes and the dtype in the bytes of a quant_state."""
    try:
        state: Any = json.loads(raw)
        shape = tuple(map(int, state["shape"]))
        size, nested = int(state["blocksize"]), int(state.get("nested_blocksize") or 0)
        offset, dtype = float(state.get("nested_offset") or 0), str(state["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, ""
    right = dtype in _DTYPES and size > 0 and nested >= 0 and len(shape) >= 2 and min(shape) > 0
    return (Blocks(shape, size, nested, offset) if right else None), dtype


def _fits(shapes: Mapping[str, tuple[int, ...]], blocks: Blocks) -> bool:
    count = prod(blocks.shape)
    runs = -(-count // blocks.size)
    meant = {"absmax": runs, "quant_map": 16}
    if blocks.nested_size:
        meant |= {"nested_absmax": -(-runs // blocks.nested_size), "nested_quant_map": 256}
    sizes = {role: prod(shape) for role, shape in shapes.items()}
    # Two indices lie in a byte, and the bytes may be kept in a wider dtype.
    packed = sizes.pop("weight", 0)
    return sizes == meant and packed == (count + 1) // 2


def _find_int8(view: View, scales: str, found: Found) -> None:
    stem = scales.removesuffix(".SCB")
    name, layout = f"{stem}.weight", f"{stem}.weight_format"
    weight = view.entries.get(name)
    if weight is None or weight.dtype != "int8":
        return
    rows = layout not in view.entries or set(view.read(layout)) <= {0}
    if len(weight.shape) != 2 or prod(view.entries[scales].shape) != weight.shape[0] or not rows:
        reason = f"bitsandbytes int8, whose {scales} does not fit it, or not stored by rows"
        found.refused |= dict.fromkeys((name, scales), reason)
        return
    entries = {"weight": name, "absmax": scales}
    entries |= {"layout": layout} if layout in view.entries else {}
    found.packed.append(
        Packed(
            name,
            weight.shape,
            view.dtype_of(scales),
            "bitsandbytes int8",
            entries,
            _decode_int8,
            _encode_int8,
        )
    )


def _decode_4bit(blocks: Blocks, parts: Parts) -> Tensor:
    return dequantize_4bit(parts, blocks)


def _encode_4bit(blocks: Blocks, W: Tensor, parts: Parts) -> dict[str, Tensor]:
    return quantize_4bit(W, parts, blocks)


def _decode_int8(parts: Parts) -> Tensor:
    return dequantize_int8(parts["weight"], parts["absmax"])


def _encode_int8(W: Tensor, parts: Parts) -> dict[str, Tensor]:
    q, absmax = quantize_int8(W)
    stood = parts["absmax"]
    return {**parts, "weight": q, "absmax": absmax.to(stood.dtype).view(stood.shape)}
