"""Which formats are looked for in a checkpoint: by its config's method, and by its headers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lora_param.checkpoint.base import packed_reason
from lora_param.checkpoint.quantized.awq import find_awq
from lora_param.checkpoint.quantized.bitsandbytes import find_bitsandbytes
from lora_param.checkpoint.quantized.compressed import find_compressed
from lora_param.checkpoint.quantized.fp8 import find_fp8
from lora_param.checkpoint.quantized.gptq import find_gptq
from lora_param.checkpoint.quantized.mxfp4 import find_mxfp4
from lora_param.checkpoint.quantized.nvfp4 import find_nvfp4
from lora_param.checkpoint.quantized.packed import Found, View
from lora_param.checkpoint.quantized.torchao import find_torchao

__all__ = ["find_packed"]

Find = Callable[[View], Found]

# What a header alone tells.
_BY_HEADER: tuple[Find, ...] = (find_bitsandbytes, find_mxfp4, find_nvfp4, find_torchao, find_fp8)
# What needs the config to be told apart, by its quant_method.
_BY_METHOD: Mapping[str, Find] = {
    "gptq": find_gptq,
    "awq": find_awq,
    "compressed-tensors": find_compressed,
}
# Methods whose weights are of one of the formats above.
_KNOWN = {"fp8", "bitsandbytes", "mxfp4", "torchao", "fbgemm_fp8", "modelopt", "nvfp4", *_BY_METHOD}


def find_packed(view: View) -> Found:
    """Every quantized weight of a checkpoint that can be read, and why others cannot.

    Two formats that claim one entry are both refused: nothing is guessed.
    """
    method = str(view.config.get("quant_method") or "")
    finders = [*_BY_HEADER, *filter(None, [_BY_METHOD.get(method)])]
    found, owners = Found(), dict[str, str]()
    for find in finders:
        part = find(view)
        found.refused |= part.refused
        found.told += part.told
        for weight in part.packed:
            clash = [n for n in weight.members if n in owners]
            taken = weight.name not in weight.members and weight.name in view.entries
            if clash or taken:
                reason = f"both {weight.kind} and {owners.get(clash[0]) if clash else 'plain'}"
                found.refused |= dict.fromkeys(weight.members, reason)
            owners |= dict.fromkeys(weight.members, weight.kind)
            found.packed.append(weight)
    found.packed = [w for w in found.packed if not found.refused.keys() & set(w.members)]
    read = {n for w in found.packed for n in w.members}
    if method and method not in _KNOWN:
        reason = f"quantized by {method}, which is not read"
        left = (e for e in view.entries.values() if e.name not in read)
        found.refused |= {
            e.name: reason for e in left if not e.is_float or packed_reason(e.name, view.entries)
        }
    return found
