"""F.multi_head_attention_forward: torch's own body, its projections left to the rules.

The body splits a packed weight and gives the parts to F.linear, for which there are rules. It runs
as it stands, but for its first question, whether an argument overrides torch functions: asked
again, it would lead straight back here.

The fused kernels of encoders (`torch._native_multi_head_attention`,
`torch._transformer_encoder_layer_fwd`) take plain tensors alone. torch's modules see that the
weight is none and take the way above; called directly they get built weights.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch.nn.functional as F

from lora_param.weight.adapted import implements
from lora_param.weight.rules.common import tracing

__all__: list[str] = []


def _nothing_overrides(_: Any) -> bool:
    return False


@implements(F.multi_head_attention_forward)
def multi_head_attention_forward(*args: Any, **named: Any) -> Any:
    """The attention, whose weights may be adapted ones. Traced, it builds them."""
    original = F.multi_head_attention_forward
    if tracing() or not isinstance(original, FunctionType):
        return NotImplemented
    names = {**original.__globals__, "has_torch_function": _nothing_overrides}
    body = FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    body.__kwdefaults__ = original.__kwdefaults__
    return body(*args, **named)
