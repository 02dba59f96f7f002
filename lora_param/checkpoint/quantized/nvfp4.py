"""NVFP4: floats of 4 bits, 16 of them with one float8 scale, and one float32 scale for all.

modelopt: `X.weight` (m, n / 2) uint8, `X.weight_scale` (m, n / 16) float8, and `X.weight_scale_2`,
by which the scales are multiplied. compressed-tensors: `X.weight_packed`, `X.weight_scale`, and
`X.weight_global_scale`, by which they are divided.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from lora_param.checkpoint.quantized.packed import Found, Packed, Parts, View, scaled, unpack_fp4

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dequantize_nvfp4", "find_nvfp4"]

_GROUP = 16


def dequantize_nvfp4(packed: Tensor, scales: Tensor) -> Tensor:
    """Floats times their group's scale. packed (*, n / 2) uint8, scales (*, n / 16) → (*, n)"""
    return scaled(unpack_fp4(packed), scales, (1, _GROUP))


def find_nvfp4(view: View) -> Found:
    """The weights with a scale of 8 bits for each group and one for all."""
    found = Found()
    for entry in view.entries:
        if entry.endswith(".weight_scale_2"):
            stem, packed, decode = entry.removesuffix(".weight_scale_2"), "weight", _multiplied
        elif entry.endswith(".weight_global_scale"):
            stem, packed = entry.removesuffix(".weight_global_scale"), "weight_packed"
            decode = _divided
        else:
            continue
        entries = {"packed": f"{stem}.{packed}", "scale": f"{stem}.weight_scale", "all": entry}
        if not all(n in view.entries for n in entries.values()):
            continue
        weight, scale, whole = (view.entries[n] for n in entries.values())
        (*lead, half) = weight.shape
        right = weight.dtype == "uint8" and scale.dtype == "float8_e4m3fn"
        if not right or scale.shape != (*lead, 2 * half // _GROUP) or prod(whole.shape) != 1:
            reason = "NVFP4, whose scales do not fit"
            found.refused |= dict.fromkeys(entries.values(), reason)
            continue
        beside = (f"{stem}.input_scale", f"{stem}.input_global_scale")
        found.packed.append(
            Packed(
                f"{stem}.weight",
                (*lead, 2 * half),
                view.dtype_of(entry),
                "nvfp4",
                entries,
                decode,
                beside=tuple(n for n in beside if n in view.entries),
            )
        )
    return found


def _multiplied(parts: Parts) -> Tensor:
    return dequantize_nvfp4(parts["packed"], parts["scale"].float() * parts["all"].float())


def _divided(parts: Parts) -> Tensor:
    return dequantize_nvfp4(parts["packed"], parts["scale"].float() / parts["all"].float())
