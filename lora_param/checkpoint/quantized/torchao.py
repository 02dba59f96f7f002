"""torchao's safetensors: the parts of its tensor classes, told by JSON in the files' metadata.

The tensor `X.weight` lies as `X._weight_qdata`, `X._weight_scale` and more; the metadata's
"X.weight" says its class and its settings. Read are Float8Tensor, Int8Tensor,
IntxUnpackedToInt8Tensor, MXTensor and NVFP4Tensor with scales in plain order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.quantized.compressed import dequantize_integers
from lora_param.checkpoint.quantized.fp8 import dequantize_fp8
from lora_param.checkpoint.quantized.nvfp4 import dequantize_nvfp4
from lora_param.checkpoint.quantized.packed import (
    Found,
    Packed,
    Parts,
    View,
    block_of,
    scaled,
    unpack_fp4,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["find_torchao"]

_FLOATS = ("float8_e4m3fn", "float8_e5m2")


def find_torchao(view: View) -> Found:
    """The tensors that the metadata says are of a class of torchao's."""
    found = Found()
    for name, text in view.metadata.items():
        stem, _, last = name.rpartition(".")
        told = _told(text)
        if told is None:
            continue
        kind, data, roles = told
        found.told.append(name)
        entries = {r: f"{stem}._{last}_{r}" for r in roles}
        if kind == "Tensor" or any(n not in view.entries for n in entries.values()):
            continue
        reader = _READERS.get(kind)
        shapes = {r: view.entries[n].shape for r, n in entries.items()}
        dtypes = {r: view.entries[n].dtype for r, n in entries.items()}
        read = reader and reader(shapes, dtypes, data)
        if not read:
            reason = f"torchao's {kind} with these settings, which is not read"
            found.refused |= dict.fromkeys(entries.values(), reason)
            continue
        shape, decode = read
        used = {r: n for r, n in entries.items() if not r.startswith("act_")}
        beside = tuple(n for r, n in entries.items() if r not in used)
        dtype = str(_plain(data.get("dtype") or data.get("orig_dtype")) or view.dtype)
        found.packed.append(
            Packed(name, shape, dtype, f"torchao {kind}", used, decode, beside=beside)
        )
    found.told += ["tensor_names"] if found.told else []
    return found


def _told(text: str) -> tuple[str, Mapping[str, Any], list[str]] | None:
    """Class, settings and parts, where a text of the metadata says them."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("_type"), str):
        return None
    data, roles = value.get("_data", {}), value.get("_tensor_data_names", [])
    right = isinstance(data, dict) and isinstance(roles, list)
    if not right or not all(isinstance(r, str) for r in roles):
        return None
    return value["_type"], data, roles


def _plain(value: Any) -> Any:
    """A setting without the class that JSON wraps it in."""
    return value.get("_data") if isinstance(value, dict) else value


Shapes = Mapping[str, tuple[int, ...]]
Dtypes = Mapping[str, str]
Read = tuple[tuple[int, ...], Callable[[Parts], "Tensor"]] | None


def _float8(shapes: Shapes, dtypes: Dtypes, data: Mapping[str, Any]) -> Read:
    shape, block = shapes["qdata"], _block(data)
    if dtypes["qdata"] not in _FLOATS or not _fits(shape, shapes["scale"], block):
        return None
    return shape, partial(_decode_float8, block)


def _integer(shapes: Shapes, dtypes: Dtypes, data: Mapping[str, Any]) -> Read:
    shape, block = shapes["qdata"], _block(data)
    zero = shapes.get("zero_point", shapes["scale"])
    if "act_pre_scale" in shapes or dtypes["qdata"] != "int8" or zero != shapes["scale"]:
        return None
    return (
        (shape, partial(_decode_integer, block)) if _fits(shape, shapes["scale"], block) else None
    )


def _mx(shapes: Shapes, dtypes: Dtypes, data: Mapping[str, Any]) -> Read:
    (*lead, n), size = shapes["qdata"], data.get("block_size")
    element = _plain(data.get("elem_dtype"))
    if element == "float4_e2m1fn_x2" and dtypes["qdata"] in ("uint8", "float4_e2m1fn_x2"):
        n, decode = 2 * n, _decode_mxfp4
    elif element in _FLOATS and dtypes["qdata"] == element:
        decode = _decode_mxfp8
    else:
        return None
    if type(size) is not int or data.get("is_swizzled_scales"):
        return None
    if not _fits((*lead, n), shapes["scale"], (1, size)):
        return None
    return (*lead, n), partial(decode, (1, size))


def _nvfp4(shapes: Shapes, dtypes: Dtypes, data: Mapping[str, Any]) -> Read:
    (*lead, half) = shapes["qdata"]
    shape, whole = (*lead, 2 * half), shapes.get("per_tensor_scale", ())
    if data.get("is_swizzled_scales") or data.get("block_size") != 16 or prod(whole) != 1:
        return None
    right = dtypes["qdata"] in ("uint8", "float4_e2m1fn_x2")
    return (shape, _decode_nvfp4) if right and _fits(shape, shapes["scale"], (1, 16)) else None


_READERS = {
    "Float8Tensor": _float8,
    "Int8Tensor": _integer,
    "IntxUnpackedToInt8Tensor": _integer,
    "MXTensor": _mx,
    "NVFP4Tensor": _nvfp4,
}


def _block(data: Mapping[str, Any]) -> tuple[Any, ...]:
    block = _plain(data.get("block_size"))
    return tuple(block) if isinstance(block, list) else ()


def _fits(shape: tuple[int, ...], scales: tuple[int, ...], block: tuple[Any, ...]) -> bool:
    """Blocks that divide a matrix, with a scale for each."""
    if len(shape) != 2 or len(block) != 2 or not all(type(b) is int and b > 0 for b in block):
        return False
    rows, columns = block
    whole = not shape[0] % rows and not shape[1] % columns
    count = (shape[0] // rows) * (shape[1] // columns)
    return whole and prod(scales) == count and block_of(shape, scales, block) in (block, None)


def _grid(scale: Tensor, q: Tensor, block: tuple[int, int]) -> Tensor:
    return scale.reshape(q.shape[0] // block[0], q.shape[1] // block[1])


def _decode_float8(block: tuple[int, int], parts: Parts) -> Tensor:
    q = parts["qdata"]
    return dequantize_fp8(q, _grid(parts["scale"], q, block), block)


def _decode_integer(block: tuple[int, int], parts: Parts) -> Tensor:
    q, zero = parts["qdata"], parts.get("zero_point")
    zero = None if zero is None else _grid(zero, q, block)
    return dequantize_integers(q, _grid(parts["scale"], q, block), zero, block)


def _decode_mxfp8(block: tuple[int, int], parts: Parts) -> Tensor:
    return dequantize_fp8(parts["qdata"], parts["scale"], block)


def _decode_mxfp4(block: tuple[int, int], parts: Parts) -> Tensor:
    import torch

    exponents = parts["scale"].view(torch.float8_e8m0fnu).float()
    return scaled(unpack_fp4(parts["qdata"]), exponents, block)


def _decode_nvfp4(parts: Parts) -> Tensor:
    scale = parts["scale"].float()
    if (whole := parts.get("per_tensor_scale")) is not None:
        scale = whole.float() * scale
    return dequantize_nvfp4(parts["qdata"], scale)
