"""DoRA: an update of each row's direction, and a learned length for each row.

W' = m ∘ V / ‖V‖ with V = W + scale·(B @ A), the norms being those of V's rows, and m a vector that
begins as the norms of W's rows (Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5). The norm
takes part in the gradient; the paper's §4.3 leaves it out to save memory, which the closed form
of ‖V‖ makes needless: V is never formed. With c = m / ‖V‖, W' is c ∘ W + scale·((c ∘ B) @ A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_param.weight.decomposed import decomposed_linear
from lora_param.weight.dora import row_norms, row_ratios, row_squares
from lora_param.weight.precision import compute_dtype
from lora_param.weight.update import Update
from lora_param.weight.variants.base import (
    Fresh,
    Lowered,
    Tensors,
    Variant,
    product,
)

__all__ = ["VARIANT"]


class _DoRA(Variant):
    by_rows = ("lora_B", "magnitude")
    has_blocks = True

    def fresh(self, make: Fresh) -> dict[str, Tensor]:
        magnitude = row_norms(row_squares(make.W())).to(make.dtype)  # (*, m)
        return {**make.factors(), "magnitude": magnitude}

    def lower(
        self,
        W: Tensor,
        tensors: Tensors,
        scale: float,
        strength: float,
        known: Tensor | None = None,
    ) -> Lowered | None:
        if W.requires_grad and torch.is_grad_enabled():  # its norms' gradient: built
            return None
        wide = compute_dtype(W.dtype)
        A, B, magnitude = (tensors[n].to(wide) for n in ("lora_A", "lora_B", "magnitude"))
        squares = row_squares(W.to(wide)) if known is None else known
        ratios = row_ratios(W, A, B, magnitude, scale, squares)  # (*, m)
        full = isinstance(strength, float) and strength == 1  # a tensor is not asked
        alpha = ratios if full else (ratios - 1) * strength + 1
        return Lowered(alpha, A, B * ratios.unsqueeze(-1), scale * strength)

    def delta(self, W: Tensor, tensors: Tensors, scale: float, strength: float) -> Tensor:
        V = W + product(tensors["lora_A"], tensors["lora_B"], scale, W.dtype)
        ratios = tensors["magnitude"].to(W.dtype) / row_norms(row_squares(V))  # (*, m)
        return (V * ratios.unsqueeze(-1) - W) * strength

    def known(self, W: Tensor) -> Tensor:
        return row_squares(W.to(compute_dtype(W.dtype)))

    def linear(
        self,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        tensors: Tensors,
        scale: float,
        dropout: float,
        known: Tensor | None,
    ) -> Tensor | None:
        if W.requires_grad and torch.is_grad_enabled():
            return None
        wide = compute_dtype(W.dtype)
        A, B, magnitude = (tensors[n].to(wide) for n in ("lora_A", "lora_B", "magnitude"))
        squares = row_squares(W.to(wide)) if known is None else known
        u = Update(A, B, scale, dropout=dropout)
        return decomposed_linear(x, W, bias, u, magnitude, squares)


VARIANT = _DoRA()
