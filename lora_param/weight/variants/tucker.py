"""LoRA of a convolution in Tucker's form: the kernel has a core of its own between the factors.

ΔW[o, i, ...] = scale·Σ up[o, p] mid[p, q, ...] down[q, i], LoCon's `lora_mid` of LyCORIS (Yeh et
al. 2023, https://arxiv.org/abs/2309.14859). It is LoRA with A made of mid and down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_param.weight.variants.base import Tensors, product
from lora_param.weight.variants.composed import Composed, unfold_kernel

__all__ = ["VARIANT"]


class _Tucker(Composed):
    def made(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        A = unfold_kernel(tensors["lora_mid"], tensors["lora_down"], dtype)
        return product(A, tensors["lora_up"], 1.0, dtype)

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        up = tensors["lora_up"]
        return unfold_kernel(tensors["lora_mid"], tensors["lora_down"], up.dtype), up


VARIANT = _Tucker()
