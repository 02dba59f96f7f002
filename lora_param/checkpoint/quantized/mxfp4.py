"""MXFP4: floats of 4 bits, 32 of them with one exponent of 8 bits.

gpt-oss stores a stack of experts as `X_blocks` (E, out, in / 32, 16) uint8, the low half of a byte
first, and `X_scales` (E, out, in / 32) uint8, 2 to the byte minus 127. The model's X is
(E, in, out).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_param.checkpoint.quantized.packed import Found, Packed, Parts, View, unpack_fp4

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dequantize_mxfp4", "find_mxfp4"]


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Floats times two to their exponent. blocks (*, k, 16), scales (*, k) → (*, 32 k), float32"""
    import torch

    exponents = scales.to(torch.int32).sub_(127).unsqueeze(-1)  # (*, k, 1)
    return torch.ldexp(unpack_fp4(blocks), exponents).flatten(-2)


def find_mxfp4(view: View) -> Found:
    """The stacks of experts with `_blocks` and `_scales`."""
    found = Found()
    for entry, blocks in view.entries.items():
        name = entry.removesuffix("_blocks")
        if name == entry or (scales := view.entries.get(f"{name}_scales")) is None:
            continue
        entries = {"blocks": entry, "scales": f"{name}_scales"}
        right = blocks.dtype == scales.dtype == "uint8" and blocks.shape == (*scales.shape, 16)
        if not right or len(scales.shape) != 3:
            reason = "MXFP4, whose blocks and scales do not fit each other"
            found.refused |= dict.fromkeys(entries.values(), reason)
            continue
        experts, out, groups = scales.shape
        shape = (experts, 32 * groups, out)
        found.packed.append(Packed(name, shape, view.dtype_of(entry), "mxfp4", entries, _decode))
    return found


def _decode(parts: Parts) -> Tensor:
    return dequantize_mxfp4(parts["blocks"], parts["scales"]).mT.contiguous()
