"""F.linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.factored import composed_linear, factored_linear
from lora_param.weight.rescaled import rescaled
from lora_param.weight.rules.common import autocast, built, plain_updates, tracing
from lora_param.weight.update import Update

__all__ = ["product"]


@implements(F.linear)
def linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    """x (W + ΔW)ᵀ + b as x Wᵀ + b + scale·(x Aᵀ) Bᵀ."""
    if not isinstance(weight, AdaptedWeight) or isinstance(bias, AdaptedWeight):
        return NotImplemented
    if weight.base.dim() != 2:
        return NotImplemented
    alpha: Tensor | None = None
    updates: Sequence[Update] = weight.updates
    if not plain_updates(weight):
        form = rescaled(weight.base, updates)
        if form is None:
            return NotImplemented
        alpha, updates = form
    return product(built(input), weight.base, bias, updates, alpha)


def product(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    alpha: Tensor | None = None,
) -> Tensor:
    """x (α ∘ W + ΔW)ᵀ + b in the way that fits where it runs.

    Args:
        x: input of shape (*, n).
        W: base of shape (m, n).
        bias: shape (m,), or None.
        updates: what is added to W, none with a magnitude.
        alpha: what multiplies each row of W first, (m,); None for 1.

    Returns:
        Shape (*, m).
    """
    if tracing():
        return composed_linear(x, W, bias, updates, alpha)
    if torch.is_autocast_enabled(x.device.type):
        x, W, bias = autocast(x, W, bias)
    return factored_linear(x, W, bias, updates, alpha)
