"""F.linear."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.base import linear as base_linear
from lora_param.weight.base import logical_dim, storage_of
from lora_param.weight.factored import factored_linear, rescale
from lora_param.weight.precision import autocasts, exact
from lora_param.weight.rules.common import add_updates, autocast, built, lowered_as_stored, tracing
from lora_param.weight.update import Deferred, NormalForm

__all__ = ["composed", "product"]


@implements(F.linear)
def linear(input: Any, weight: Any, bias: Tensor | None = None) -> Any:
    """x (W + ΔW)ᵀ + b as x Wᵀ + b + scale·(x Aᵀ) Bᵀ."""
    if not isinstance(weight, AdaptedWeight) or isinstance(bias, AdaptedWeight):
        return NotImplemented
    if logical_dim(weight.base) != 2 or input.is_nested:
        return NotImplemented
    x, first = built(input), weight.updates[0] if weight.updates else None
    if type(first) is Deferred and len(weight.updates) == 1 and not tracing():
        y = _by_kernel(x, weight.base, bias, first)
        if y is not None:
            return y
    V = lowered_as_stored(weight)
    return NotImplemented if V is None else product(x, V, bias)


def _by_kernel(x: Tensor, W: Tensor, bias: Tensor | None, u: Deferred) -> Tensor | None:
    """What the variant's own kernel gives, where it has one for this update."""
    if not u.region.is_whole or u.strength != 1 or storage_of(W) is not None:
        return None
    x, W, bias = autocast(x, W, bias)
    with exact(x):
        return u.variant.linear(x, W, bias, u.tensors, u.scale, u.dropout, u.known)


def product(x: Tensor, V: NormalForm, bias: Tensor | None) -> Tensor:
    """x Vᵀ + b in the way that fits where it runs.

    Args:
        x: input of shape (*, n).
        V: of shape (m, n).
        bias: shape (m,), or None.

    Returns:
        Shape (*, m).
    """
    if tracing():
        return composed(x, V, bias)
    W = V.base
    if autocasts(x):
        x, W, bias = autocast(x, W, bias)
    if (
        V.alpha is not None
    ):  # x as one matrix: torch does this only where W trains, and the bits differ
        y = composed(x.reshape(-1, x.shape[-1]), NormalForm(W, V.updates, V.alpha), bias)
        return y.view(*x.shape[:-1], y.shape[-1])
    return factored_linear(x, W, bias, V.updates)


def composed(x: Tensor, V: NormalForm, bias: Tensor | None) -> Tensor:
    """As `product`, out of torch's own operations. α is (m, 1) or (1, n)."""
    W, updates, alpha = V
    of_rows = alpha is not None and alpha.shape[1] == 1
    read = x if alpha is None or of_rows else (x * alpha[0]).to(x.dtype)
    y = base_linear(read, W, bias)  # (*, m)
    if alpha is not None and of_rows:
        y = rescale(y, bias, alpha[:, 0])
    return add_updates(y, x, updates, lambda x, A, B: F.linear(F.linear(x, A), B))
