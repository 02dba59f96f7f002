"""In which dtype things are computed: the merge's, and what autocast asks for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["autocasts", "compute_dtype", "exact"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of `dtype` is merged: fp32, or fp64 where the weight is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(t: Tensor) -> bool:
    """Autocast is on for the device of this tensor; on the meta device it never is."""
    kind = t.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def exact(t: Tensor) -> AbstractContextManager[None]:
    """Without autocast on the device of t: for what is to run in the dtype that it has."""
    return torch.autocast(t.device.type, enabled=False) if autocasts(t) else nullcontext()
