"""LoRA: ΔW = strength·scale·(B @ A) (Hu et al. 2021, https://arxiv.org/abs/2106.09685, eq. 3)."""

from __future__ import annotations

from torch import Tensor

from lora_param.weight.variants.base import Tensors, Variant

__all__ = ["VARIANT"]


class _LoRA(Variant):
    uses_W = False
    needs_W = False
    has_blocks = True

    def pair(self, tensors: Tensors, scale: float, strength: float) -> tuple[Tensor, Tensor, float]:
        return tensors["lora_A"], tensors["lora_B"], scale * strength


VARIANT = _LoRA()
