"""torch's private names, and those that not every torch has: looked up in this file alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["GROUPED_PRODUCTS", "as_plain_tensors", "parse_to", "transforms_active"]

as_plain_tensors = torch._C.DisableTorchFunctionSubclass
"""Within it, operations on our tensors are those of their own data."""

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""A transform of torch.func is at work."""

parse_to: Callable[..., tuple[Any, ...]] = torch._C._nn._parse_to
"""The device and dtype that arguments of `Tensor.to` mean."""

GROUPED_PRODUCTS: tuple[Callable[..., Any], ...] = tuple(
    getattr(owner, name)
    for owner, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(owner, name)
)
"""The product of sorted rows by a stack of matrices: public, private, either or none."""
