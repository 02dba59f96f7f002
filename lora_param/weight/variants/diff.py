"""A whole ΔW: W' = W + strength·scale·diff. LyCORIS' `full` trains it, and of norms and biases."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_param.weight.variants.base import Tensors
from lora_param.weight.variants.composed import Composed

__all__ = ["VARIANT"]


class _Diff(Composed):
    by_rows = ("diff",)
    has_blocks = True

    def made(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        return tensors["diff"].to(dtype)


VARIANT = _Diff()
