"""AWQ ("gemm"): 4 bits in words whose fields are interleaved, scaled by groups of input columns.

For a weight of m outputs and n inputs: `X.qweight` (n, m / 8) int32, `X.qzeros` (groups, m / 8),
`X.scales` (groups, m). The eight fields of a word, the lowest first, are its outputs
0, 2, 4, 6, 1, 3, 5, 7.
W[o, i] = scales[i // group, o] · (q[i, o] - zero[i // group, o]).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from lora_param.checkpoint.quantized.packed import Found, Packed, Parts, View, unpack_words

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["dequantize_awq", "find_awq"]

_FIELD = (0, 4, 1, 5, 2, 6, 3, 7)  # of each output in its word


def dequantize_awq(parts: Parts, group: int) -> Tensor:
    """W of its words.

    Args:
        parts: `qweight`, `qzeros`, `scales`.
        group: inputs that share a scale.

    Returns:
        (m, n) float32.
    """
    q, zeros = _outputs(parts["qweight"]), _outputs(parts["qzeros"])  # (n, m), (groups, m)
    n = q.shape[0]
    zeros, scales = (
        t.repeat_interleave(group, 0)[:n] for t in (zeros, parts["scales"].float())
    )  # (n, m)
    return (q - zeros).float().mul_(scales).t().contiguous()


def _outputs(words: Tensor) -> Tensor:
    """The fields of words in the order of outputs. (k, m / 8) → (k, m)"""
    fields = unpack_words(words, 4).view(*words.shape, 8)
    return fields[..., _FIELD].flatten(-2)


def find_awq(view: View) -> Found:
    """The modules with a `qweight`, in a checkpoint whose config says AWQ."""
    found, config = Found(), view.config
    bits = config.get("bits", config.get("w_bit"))
    group = config.get("group_size", config.get("q_group_size"))
    version = str(config.get("version", "")).lower()
    for entry, weight in view.entries.items():
        stem, _, last = entry.rpartition(".")
        if last != "qweight":
            continue
        entries = {e: f"{stem}.{e}" for e in ("qweight", "qzeros", "scales")}
        entries = {e: n for e, n in entries.items() if n in view.entries}
        shapes = {e: view.entries[n].shape for e, n in entries.items()}
        reason = ""
        if version != "gemm" or bits != 4 or not isinstance(group, int):
            reason = f"AWQ {version} of {bits} bits, of which gemm of 4 is read"
        elif len(weight.shape) != 2 or len(entries) != 3:
            reason = "AWQ without its qzeros or scales"
        else:
            n, m = weight.shape[0], weight.shape[1] * 8
            size = n if group < 1 else group
            groups = -(-n // size)
            if (shapes["scales"], shapes["qzeros"]) != ((groups, m), (groups, m // 8)):
                reason = f"AWQ in groups of {group}, whose shapes do not fit"
        if reason:
            found.refused |= dict.fromkeys(entries.values(), reason)
            continue
        found.packed.append(
            Packed(
                f"{stem}.weight",
                (m, n),
                view.dtype_of(entries["scales"]),
                f"AWQ int4 in groups of {size}",
                entries,
                partial(_decode, size),
            )
        )
    return found


def _decode(group: int, parts: Parts) -> Tensor:
    return dequantize_awq(parts, group)
