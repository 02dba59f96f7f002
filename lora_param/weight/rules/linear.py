"""F.linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.decomposed import decomposed_linear, is_decomposed, rescaled
from lora_param.weight.factored import composed_linear, factored_linear
from lora_param.weight.rules.common import autocast, built, exact, plain_updates, tracing
from lora_param.weight.update import Update

__all__ = ["product"]


@implements(F.linear)
def linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    """x (W + ΔW)ᵀ + b as x Wᵀ + b + scale·(x Aᵀ) Bᵀ."""
    if not isinstance(weight, AdaptedWeight) or isinstance(bias, AdaptedWeight):
        return NotImplemented
    if weight.base.dim() != 2:
        return NotImplemented
    x, W, updates = built(input), weight.base, weight.updates
    if plain_updates(weight):
        return product(x, W, bias, updates)
    x, W, bias = autocast(x, W, bias)
    with exact(x.device):  # the norms, whatever the product runs in
        if not tracing() and is_decomposed(W, updates):
            return decomposed_linear(x, W, bias, updates[0])
        form = rescaled(W, updates)
        return NotImplemented if form is None else composed_linear(x, W, bias, form[1], form[0])


def product(x: Tensor, W: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """x (W + ΔW)ᵀ + b in the way that fits where it runs.

    Args:
        x: input of shape (*, n).
        W: base of shape (m, n).
        bias: shape (m,), or None.
        updates: what is added to W, none with a magnitude.

    Returns:
        Shape (*, m).
    """
    if tracing():
        return composed_linear(x, W, bias, updates)
    if torch.is_autocast_enabled(x.device.type):
        x, W, bias = autocast(x, W, bias)
    return factored_linear(x, W, bias, updates)
