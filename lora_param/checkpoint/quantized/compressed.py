"""compressed-tensors: whole numbers of up to 8 bits, in words or as int8, and floats of 4 bits.

`X.weight_packed` int32 (m, ⌈n · bits / 32⌉): fields that follow each other, across words too, each
the number plus half the range; `X.weight_shape`; `X.weight_scale` of the tensor, of rows, or of
groups of columns; `X.weight_zero_point` packed over rows. Or `X.weight` int8 with `X.weight_scale`
and `X.weight_zero_point` as they are. W = scale · (q - zero).

Its float8 weights are in `fp8`, its NVFP4 in `nvfp4`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.quantized.fp8 import scale_values, stated_block
from lora_param.checkpoint.quantized.packed import (
    Found,
    Packed,
    Parts,
    View,
    block_of,
    scaled,
    spread,
    unpack_fp4,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dequantize_integers", "find_compressed", "unpack_dense"]

_BESIDE = ("input_scale", "input_zero_point", "input_global_scale", "output_scale")
_READ = {"pack-quantized", "int-quantized", "naive-quantized", "float-quantized"}
_READ |= {"nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision"}


def unpack_dense(words: Tensor, bits: int, count: int) -> Tensor:
    """Signed numbers whose bits follow each other, across words too. (m, k) → (m, count) int32"""
    import torch

    words = words.clone(memory_format=torch.contiguous_format)
    octets = words.view(torch.uint8)  # little-endian: the fields' own order
    if bits in (1, 2, 4, 8):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        fields = ((octets.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)
    else:
        each = (octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        runs = each.flatten(1)[:, : count * bits].reshape(-1, count, bits)
        fields = (runs.int() << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    numbers: Tensor = fields[:, :count].int() - (1 << bits - 1)
    return numbers


def dequantize_integers(
    q: Tensor, scale: Tensor, zero: Tensor | None, block: tuple[int, int]
) -> Tensor:
    """scale · (q - zero) over blocks. q (*, m, n) → (*, m, n), float32"""
    if zero is not None:
        q = q.float() - spread(zero, tuple(q.shape), block)
    return scaled(q, scale, block)


def find_compressed(view: View) -> Found:
    """The weights that a config of compressed-tensors tells of."""
    found, form = Found(), view.config.get("format")
    arguments = _arguments(view.config)
    for entry, weight in view.entries.items():
        stem, _, last = entry.rpartition(".")
        scale = view.entries.get(f"{stem}.weight_scale")
        if last == "weight_packed" and f"{stem}.weight_global_scale" in view.entries:
            continue  # NVFP4
        integers = last == "weight" and weight.dtype == "int8" and scale is not None
        if last != "weight_packed" and not integers:
            continue
        ends = (last, "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
        entries = {e: f"{stem}.{e}" for e in ends if f"{stem}.{e}" in view.entries}
        if form not in _READ or scale is None or "weight_g_idx" in entries:
            what = f"compressed-tensors in the format {form!r}"
            reason = f"{what}, which is not read" if form not in _READ else f"{what}, out of order"
            found.refused |= dict.fromkeys(entries.values(), reason)
            continue
        beside = tuple(n for e in _BESIDE if (n := f"{stem}.{e}") in view.entries)
        try:
            shape, kind, decode = (_plain if integers else _words)(view, entries, arguments)
        except _MisfitError as error:
            reason = f"compressed-tensors {form}, {error}"
            found.refused |= dict.fromkeys(entries.values(), reason)
            continue
        dtype = view.dtype_of(entries["weight_scale"])
        kind = f"compressed-tensors {kind}"
        found.packed.append(
            Packed(f"{stem}.weight", shape, dtype, kind, entries, decode, beside=beside)
        )
    return found


class _MisfitError(Exception):
    """Why shapes or settings do not go together."""


def _arguments(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What the config says of the weights of each group of layers."""
    groups = config.get("config_groups")
    values = groups.values() if isinstance(groups, Mapping) else ()
    weights = (g.get("weights") for g in values if isinstance(g, Mapping))
    return [w for w in weights if isinstance(w, Mapping)]


def _block(
    shape: tuple[int, ...], scale: tuple[int, ...], arguments: list[Mapping[str, Any]]
) -> tuple[int, int]:
    """The one block that fits, among those that the groups of layers state."""
    stated = [stated_block({"config_groups": {"": {"weights": a}}}) for a in arguments]
    fitting = {block_of(shape, scale, s) for s in [None, *stated]} - {None}
    if len(fitting) != 1:
        raise _MisfitError(f"whose scales of shape {scale} do not fit {shape}")
    (block,) = fitting
    assert block is not None
    return block


def _plain(
    view: View, entries: Mapping[str, str], arguments: list[Mapping[str, Any]]
) -> tuple[tuple[int, ...], str, Any]:
    shape = view.entries[entries["weight"]].shape
    block = _block(shape, view.entries[entries["weight_scale"]].shape, arguments)
    return shape, f"int8 {_scales(block, shape)}", partial(_decode_plain, block)


def _words(
    view: View, entries: Mapping[str, str], arguments: list[Mapping[str, Any]]
) -> tuple[tuple[int, ...], str, Any]:
    packed, scale = view.entries[entries["weight_packed"]], view.entries[entries["weight_scale"]]
    if packed.dtype == "uint8":
        (*lead, half) = packed.shape
        if scale.dtype not in ("uint8", "float8_e8m0fnu") or scale.shape != (*lead, half // 16):
            raise _MisfitError("whose scales do not fit")
        return (*lead, 2 * half), "mxfp4", _decode_mxfp4
    if "weight_shape" not in entries or len(packed.shape) != 2 or packed.dtype != "int32":
        raise _MisfitError("without a shape, or not of two dimensions")
    raw = view.read(entries["weight_shape"])
    width = {"int64": "q", "int32": "i"}.get(view.entries[entries["weight_shape"]].dtype)
    count = prod(view.entries[entries["weight_shape"]].shape)
    if width is None or count != 2:
        raise _MisfitError("whose weight_shape is not two numbers")
    shape = struct.unpack(f"<{count}{width}", raw)
    m, n = shape
    stated = {b for a in arguments if type(b := a.get("num_bits")) is int and 1 <= b <= 8}
    fitting = [b for b in stated if packed.shape == (m, -(-n * b // 32))]
    if len(fitting) != 1:
        raise _MisfitError(f"whose words of shape {packed.shape} do not fit {shape}")
    (each,) = fitting
    block = _block(shape, scale.shape, arguments)
    zero = entries.get("weight_zero_point")
    rows = -(-m // block[0])
    if zero is not None:
        meant = (-(-rows * each // 32), *scale.shape[1:])
        if block[0] not in (1, m) or len(scale.shape) != 2 or view.entries[zero].shape != meant:
            raise _MisfitError("whose zero points do not fit")
    return shape, f"int{each} {_scales(block, shape)}", partial(_decode_words, shape, each, block)


def _scales(block: tuple[int, int], shape: tuple[int, ...]) -> str:
    if block == shape[-2:]:
        return "with one scale"
    if block == (1, shape[-1]):
        return "with a scale for each row"
    return f"in groups of {block[1]}" if block[0] == 1 else f"in blocks of {block[0]}×{block[1]}"


def _decode_plain(block: tuple[int, int], parts: Parts) -> Tensor:
    zero = parts.get("weight_zero_point")
    return dequantize_integers(parts["weight"], parts["weight_scale"], zero, block)


def _decode_words(
    shape: tuple[int, int], bits: int, block: tuple[int, int], parts: Parts
) -> Tensor:
    q = unpack_dense(parts["weight_packed"], bits, shape[1])
    scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
    if zero is not None:
        zero = unpack_dense(zero.t(), bits, scale.shape[0]).t()  # (m, groups)
    return dequantize_integers(q, scale, zero, block)


def _decode_mxfp4(parts: Parts) -> Tensor:
    return scaled(unpack_fp4(parts["weight_packed"]), scale_values(parts["weight_scale"]), (1, 32))
