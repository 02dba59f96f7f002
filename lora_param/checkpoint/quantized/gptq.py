"""GPTQ: whole numbers of 2, 4 or 8 bits in words, scaled by groups of input columns.

For a weight of m outputs and n inputs: `X.qweight` (n · bits / 32, m) int32, fields of one word
being inputs that follow each other; `X.qzeros` (groups, m · bits / 32) likewise over outputs, and
one less than the zero point but in `checkpoint_format: gptq_v2`; `X.scales` (groups, m);
`X.g_idx` (n,) the group of each input.
W[o, i] = scales[g_idx[i], o] · (q[i, o] - zero[g_idx[i], o]).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from lora_param.checkpoint.quantized.packed import Found, Packed, Parts, View, unpack_words

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dequantize_gptq", "find_gptq"]

_BITS = (2, 4, 8)


def dequantize_gptq(parts: Parts, bits: int, group: int, shift: int) -> Tensor:
    """W of its words.

    Args:
        parts: `qweight`, `qzeros`, `scales`, and `g_idx` where the file has it.
        bits: of one number.
        group: inputs that share a scale where there is no `g_idx`.
        shift: what is added to the zeros: 1, or 0 in the second version of the format.

    Returns:
        (m, n) float32.
    """
    import torch

    q = unpack_words(parts["qweight"].t().contiguous(), bits)  # (m, n)
    zeros = unpack_words(parts["qzeros"], bits) + shift  # (groups, m)
    scales = parts["scales"].float()  # (groups, m)
    index = parts.get("g_idx", torch.arange(q.shape[1]) // group).long()
    columns = zeros[:, : q.shape[0]].t()[:, index]  # (m, n)
    return (q - columns).float().mul_(scales.t()[:, index])


def find_gptq(view: View) -> Found:
    """The modules with a `qweight`, in a checkpoint whose config says GPTQ."""
    found, config = Found(), view.config
    bits: Any = config.get("bits")
    group: Any = config.get("group_size")
    v2 = config.get("checkpoint_format") == "gptq_v2"
    plain = config.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2", "")
    for entry, weight in view.entries.items():
        stem, _, last = entry.rpartition(".")
        if last != "qweight":
            continue
        ends = ("qweight", "qzeros", "scales", "g_idx")
        entries = {e: f"{stem}.{e}" for e in ends if f"{stem}.{e}" in view.entries}
        shapes = {e: view.entries[n].shape for e, n in entries.items()}
        reason = ""
        if bits not in _BITS or not isinstance(group, int):
            reason = f"GPTQ of {bits} bits in groups of {group}, of which 2, 4 and 8 bits are read"
        elif not plain:
            reason = f"GPTQ in the format {config['checkpoint_format']!r}, which is not read"
        elif len(weight.shape) != 2 or not {"qzeros", "scales"} <= set(shapes):
            reason = "GPTQ without its qzeros or scales"
        else:
            m, n = weight.shape[1], weight.shape[0] * 32 // bits
            size = n if group < 1 else group
            groups = -(-n // size)
            meant = {"scales": (groups, m), "qzeros": (groups, -(-m * bits // 32)), "g_idx": (n,)}
            meant["qweight"] = weight.shape
            if any(meant[e] != shape for e, shape in shapes.items()):
                reason = f"GPTQ of {bits} bits in groups of {group}, whose shapes do not fit"
        if reason:
            found.refused |= dict.fromkeys(entries.values(), reason)
            continue
        found.packed.append(
            Packed(
                f"{stem}.weight",
                (m, n),
                view.dtype_of(entries["scales"]),
                f"GPTQ int{bits} in groups of {size}",
                entries,
                partial(_decode, bits, size, 0 if v2 else 1),
            )
        )
    return found


def _decode(bits: int, group: int, shift: int, parts: Parts) -> Tensor:
    return dequantize_gptq(parts, bits, group, shift)
