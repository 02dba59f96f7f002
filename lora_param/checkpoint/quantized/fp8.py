"""Floats of 8 bits with scales: one for a tensor, for each row, or for each block.

`X.weight` is a float8 tensor and the scale lies beside it: `X.weight_scale_inv` (DeepSeek and
transformers; a factor, for all its name), `X.weight_scale` (compressed-tensors, modelopt, fbgemm)
or `X.scale_weight` (ComfyUI). Scales of 8 bits are exponents: 2 to the byte minus 127, which over
blocks of 1 × 32 is MXFP8. The size of blocks is read from the config, and of MXFP8 is the format's.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.quantized.packed import (
    Found,
    Packed,
    Parts,
    View,
    block_of,
    peaks,
    scaled,
    spread,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["dequantize_fp8", "find_fp8", "quantize_fp8"]

_FLOATS = ("float8_e4m3fn", "float8_e5m2")
_EXPONENTS = ("uint8", "float8_e8m0fnu")
_BESIDE = ("input_scale", "activation_scale", "input_scale_inv", "scale_input")
_MX = (1, 32)


def dequantize_fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Each block of a float8 tensor times its scale. weight (*, m, n) → (*, m, n), float32.

    >>> import torch
    >>> q = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(torch.float8_e4m3fn)
    >>> dequantize_fp8(q, torch.tensor([[0.5], [2.0]]), (1, 2)).tolist()
    [[0.5, 1.0], [6.0, 8.0]]
    """
    return scaled(weight, scale_values(scale), block)


def scale_values(scale: Tensor) -> Tensor:
    """Scales as float32; those of 8 bits are powers of two."""
    import torch

    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.to(torch.float32)


def quantize_fp8(
    W: Tensor, old: Tensor, block: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """W in float8, and its scales.

    A block keeps its scale while its largest element fits and uses the upper half of the range,
    so that elements which did not change keep their bits; otherwise the largest element becomes
    the dtype's largest.

    Args:
        W: the numbers, (*, m, n) float32.
        old: the scales that stood there, whose shape and dtype are kept.
        block: rows and columns that share one.
        dtype: the float8 dtype.
    """
    import torch

    limit = torch.finfo(dtype).max
    peak = peaks(W, block)  # (*, m / rows, n / columns)
    if old.numel() == 1:
        peak = peak.max()
    own = scale_values(old).reshape(peak.shape)
    fits = (peak <= own * limit) & (peak >= own * (limit / 2))
    new = torch.where(peak > 0, peak / limit, own)
    if old.itemsize == 1:
        new = torch.exp2(torch.ceil(torch.log2(new)))
    stored = torch.where(fits, own, new).to(_scale_dtype(old)).view(old.dtype).view(old.shape)
    factors = spread(scale_values(stored), tuple(W.shape), block)
    q = torch.where(factors == 0, 0, W / factors).clamp_(-limit, limit).to(dtype)
    return q, stored


def _scale_dtype(scale: Tensor) -> torch.dtype:
    import torch

    return torch.float8_e8m0fnu if scale.dtype == torch.uint8 else scale.dtype


def find_fp8(view: View) -> Found:
    """The float8 weights with a scale beside them."""
    found = Found()
    for name, weight in view.entries.items():
        if weight.dtype not in _FLOATS:
            continue
        stem, _, last = name.rpartition(".")
        names = [f"{name}_scale_inv", f"{name}_scale"]
        names += [f"{stem}.scale_weight"] if last == "weight" else []
        scales = [n for n in names if n in view.entries]
        if not scales:
            continue  # a plain tensor of this dtype
        scale = view.entries[scales[0]]
        exponents = scale.dtype in _EXPONENTS
        stated = stated_block(view.config)
        mx = _MX if exponents and stated is None else stated
        block = block_of(weight.shape, scale.shape, mx)
        if block is None or len(scales) > 1:
            reason = f"fp8, whose scales {scales[0]} of shape {scale.shape} do not fit"
            if stated is None and len(scales) == 1:
                reason += ": no config.json beside it states their block"
            found.refused |= dict.fromkeys((name, *scales), reason)
            continue
        beside = (f"{stem}.{end}" for end in _BESIDE)
        found.packed.append(
            Packed(
                name,
                weight.shape,
                view.dtype_of(scales[0]),
                describe(weight.shape, block, exponents=exponents),
                {"weight": name, "scale": scales[0]},
                partial(_decode, block),
                partial(_encode, block),
                tuple(n for n in beside if n in view.entries),
            )
        )
    return found


def stated_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size of blocks that a `quantization_config` states, in any of the ways it is done."""
    groups = config.get("config_groups")
    places: list[Any] = [config]
    if isinstance(groups, Mapping):
        places += [g.get("weights") for g in groups.values() if isinstance(g, Mapping)]
    for place in places:
        if not isinstance(place, Mapping):
            continue
        block = place.get("weight_block_size") or place.get("block_structure")
        if isinstance(block, list) and len(block) == 2 and all(type(b) is int for b in block):
            return block[0], block[1]
        if place.get("strategy") == "group" and type(size := place.get("group_size")) is int:
            return 1, size
    return None


def describe(shape: tuple[int, ...], block: tuple[int, int], *, exponents: bool = False) -> str:
    """The format in words."""
    if exponents and block == _MX:
        return "mxfp8"
    if block == shape[-2:]:
        return "fp8 with one scale"
    if block == (1, shape[-1]):
        return "fp8 with a scale for each row"
    return f"fp8 in blocks of {block[0]}×{block[1]}"


def _decode(block: tuple[int, int], parts: Parts) -> Tensor:
    return dequantize_fp8(parts["weight"], parts["scale"], block)


def _encode(block: tuple[int, int], W: Tensor, parts: Parts) -> dict[str, Tensor]:
    q, scale = quantize_fp8(W, parts["scale"], block, parts["weight"].dtype)
    return {"weight": q, "scale": scale}
