"""What operations do with an adapted weight without building it. Anything else builds it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.update import Update

__all__: list[str] = []


@implements(F.linear)
def linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    """x (W + ΔW)ᵀ + b as x Wᵀ + b + scale·(x Aᵀ) Bᵀ."""
    if type(weight) is not AdaptedWeight or weight.dim() != 2 or isinstance(bias, AdaptedWeight):
        return NotImplemented
    if isinstance(input, AdaptedWeight):
        input = input.build()
    y = F.linear(input, weight.base, bias)  # (*, out)
    for u in weight.updates:
        y = _add_linear(y, input, u)
    return y


def _add_linear(y: Tensor, x: Tensor, u: Update) -> Tensor:
    """y + scale·(x Aᵀ) Bᵀ on the rows and columns of the update's region. (*, out)"""
    if u.region.columns is not None:
        x = x[..., slice(*u.region.columns)]
    if u.dropout:
        x = F.dropout(x, u.dropout)
    h = F.linear(x, u.A.to(x.dtype))  # (*, rank)
    z = F.linear(h, u.B.to(h.dtype)) * u.scale  # (*, rows)
    if u.region.rows is None:
        return y + z
    start, stop = u.region.rows
    return y + F.pad(z, (start, y.shape[-1] - stop))
