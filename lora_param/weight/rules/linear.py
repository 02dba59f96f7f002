"""F.linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.factored import composed_linear, factored_linear
from lora_param.weight.rules.common import autocast, built, is_lazy, tracing
from lora_param.weight.update import Update

__all__ = ["product"]


@implements(F.linear)
def linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    """x (W + ΔW)ᵀ + b as x Wᵀ + b + scale·(x Aᵀ) Bᵀ."""
    if not is_lazy(weight) or isinstance(bias, AdaptedWeight) or weight.base.dim() != 2:
        return NotImplemented
    return product(built(input), weight.base, bias, weight.updates)


def product(x: Tensor, W: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """x (W + ΔW)ᵀ + b in the way that fits where it runs.

    Args:
        x: input of shape (*, n).
        W: base of shape (m, n).
        bias: shape (m,), or None.
        updates: what is added to W.

    Returns:
        Shape (*, m).
    """
    if tracing():
        return composed_linear(x, W, bias, updates)
    if torch.is_autocast_enabled(x.device.type):
        x, W, bias = autocast(x, W, bias)
    return factored_linear(x, W, bias, updates)
