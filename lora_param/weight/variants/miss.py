"""MiSS: every block of `rank` columns gets the same update Mᵀ (out × rank).

ΔW = strength·scale·(Mᵀ @ [I I ...]), the identities cut to the columns of W: LoRA with a constant A
(Kang & Yin 2024, https://arxiv.org/abs/2409.15371, §3). M starts at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_param.weight.blocks import Index
from lora_param.weight.variants.base import Fresh, Lowered, Tensors, Variant

__all__ = ["VARIANT"]


class _MiSS(Variant):  # uses W's shape
    needs_W = False
    has_blocks = True

    def fresh(self, make: Fresh) -> dict[str, Tensor]:
        return {"lora_M": make.zeros("lora_M")}

    def lower(
        self,
        W: Tensor,
        tensors: Tensors,
        scale: float,
        strength: float,
        known: Tensor | None = None,
    ) -> Lowered:
        M = tensors["lora_M"]  # (*, r, m)
        rank, columns = M.shape[-2], torch.arange(W.shape[-1], device=M.device)
        A = (columns % rank == torch.arange(rank, device=M.device).unsqueeze(-1)).to(M.dtype)
        return Lowered(None, A.expand(*M.shape[:-2], *A.shape), M.mT, scale * strength)

    def of_block(self, tensors: Tensors, index: Index) -> Tensors:
        *stack, rows = index
        return {"lora_M": tensors["lora_M"][(*stack, slice(None), rows)]}  # (*, r, m)


VARIANT = _MiSS()
