"""What operations do with an adapted weight without building it. Anything else builds it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.factored import composed_linear, factored_linear

__all__: list[str] = []


def _tracing() -> bool:
    """Operations are being recorded or transformed: only torch's own may be used."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would make of the operands of a product."""
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.dtype == torch.float32 else t for t in tensors]


@implements(F.linear)
def linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    """x (W + ΔW)ᵀ + b as x Wᵀ + b + scale·(x Aᵀ) Bᵀ."""
    if not isinstance(weight, AdaptedWeight) or isinstance(bias, AdaptedWeight):
        return NotImplemented
    W, updates = weight.base, weight.updates
    if W.dim() != 2:
        return NotImplemented
    x = input.build() if isinstance(input, AdaptedWeight) else input
    if _tracing():
        return composed_linear(x, W, bias, updates)
    x, W, bias = _autocast(x, W, bias)  # type: ignore[assignment]
    return factored_linear(x, W, bias, updates)
