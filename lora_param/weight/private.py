"""torch's private names, and those that not every torch has: looked up in this file alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

__all__ = ["GROUPED_PRODUCTS", "TensorMeta", "as_plain_tensors", "forward_level", "jit_tracing"]
__all__ += ["no_torch_function", "parse_to", "transforms_active"]

TensorMeta = torch._C._TensorMeta
"""The class of the class Tensor."""

as_plain_tensors = torch._C.DisableTorchFunctionSubclass
"""Within it, operations on our tensors are those of their own data."""

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""A transform of torch.func is at work."""

no_torch_function = torch._C._disabled_torch_function_impl
"""What stands as `__torch_function__` of a class whose operations are those of its own data."""

jit_tracing: Callable[[], bool] = torch._C._is_tracing
"""`torch.jit.trace` records operations."""

parse_to: Callable[..., tuple[Any, ...]] = torch._C._nn._parse_to
"""The device and dtype that arguments of `Tensor.to` mean."""

GROUPED_PRODUCTS: tuple[Callable[..., torch.Tensor], ...] = tuple(
    getattr(owner, name)
    for owner, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))
    if hasattr(owner, name)
)
"""The product of sorted rows by a stack of matrices: public, private, either or none."""


def forward_level() -> int:
    """How many levels of forward-mode differentiation are entered, less one."""
    return forward_ad._current_level
