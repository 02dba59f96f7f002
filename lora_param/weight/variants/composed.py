"""What the variants have in common whose ΔW is made of their tensors alone, in their own way.

Such an update also comes with DoRA's lengths: W' = m ∘ V / ‖V‖ with V = W + scale·ΔW, over rows or
over columns, where the form says so (see `variants.dora`). On a convolution a column is an input
with its whole kernel.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from lora_param.targets.forms import Form
from lora_param.weight.dora import row_norms, row_ratios, row_squares
from lora_param.weight.precision import compute_dtype
from lora_param.weight.variants.base import Fresh, Lowered, Tensors, Variant, product

__all__ = ["Composed", "column_norms", "unfold_kernel", "with_lengths"]


class Composed(Variant):
    """`made` gives ΔW at scale 1, and `factors` two matrices of the same product.

    Attributes:
        form: words and sizes of the form that it is of.
    """

    def __init__(self, form: Form | None = None) -> None:
        self.form = form or Form()
        self.of_rows = "rows" in self.form.words
        self.of_columns = "columns" in self.form.words
        self.needs_W = self.of_rows or self.of_columns

    def of_form(self, form: Form) -> Self:
        """The variant in this form."""
        return type(self)(form)

    def made(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        """ΔW at scale 1. (*, m, n)"""
        raise NotImplementedError

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor] | None:
        """A (*, r, n) and B (*, m, r) of that ΔW; None where it is no such product."""
        return None

    def lengths(self, make: Fresh) -> dict[str, Tensor]:
        """DoRA's lengths of W, where the form has them."""
        if not self.needs_W:
            return {}
        W = make.W()
        if self.of_rows:
            return {"magnitude": row_norms(row_squares(W)).to(make.dtype)}
        return {"magnitude": column_norms(W, make.shapes["magnitude"][-1]).to(make.dtype)}

    def pair(
        self, tensors: Tensors, scale: float, strength: float
    ) -> tuple[Tensor, Tensor, float] | None:
        found = None if self.needs_W else self.factors(tensors)
        return None if found is None else (*found, scale * strength)

    def lower(
        self,
        W: Tensor,
        tensors: Tensors,
        scale: float,
        strength: float,
        known: Tensor | None = None,
    ) -> Lowered | None:
        if self.of_columns or (self.of_rows and W.requires_grad and torch.is_grad_enabled()):
            return None
        wide = compute_dtype(W.dtype)
        found = self.factors({n: t.to(wide) if self.of_rows else t for n, t in tensors.items()})
        if found is None:
            return None
        A, B = found
        m, n = W.shape[-2:]
        if A.shape[-2] > min(m, n):  # of no lower rank than what it makes
            return None
        if not self.of_rows:
            return Lowered(None, A, B, scale * strength)
        squares = row_squares(W.to(wide)) if known is None else known
        ratios = row_ratios(W, A, B, tensors["magnitude"].to(wide), scale, squares)  # (*, m)
        alpha = (ratios - 1) * strength + 1
        return Lowered(alpha, A, B * ratios.unsqueeze(-1), scale * strength)

    def delta(self, W: Tensor, tensors: Tensors, scale: float, strength: float) -> Tensor:
        update = self.made(tensors, W.dtype)
        if not self.needs_W:
            return update * (scale * strength)
        V = W + update * scale
        magnitude = tensors["magnitude"].to(W.dtype)
        return (with_lengths(V, magnitude, self.of_rows) - W) * strength

    def known(self, W: Tensor) -> Tensor | None:
        return row_squares(W.to(compute_dtype(W.dtype))) if self.of_rows else None


def with_lengths(V: Tensor, magnitude: Tensor, of_rows: bool) -> Tensor:
    """V with rows, or columns, of these lengths. (*, m, n), (*, m or channels) → (*, m, n)"""
    if of_rows:
        return V * (magnitude / row_norms(row_squares(V))).unsqueeze(-1)
    channels = magnitude.shape[-1]
    ratios = magnitude / column_norms(V, channels)  # (*, channels)
    return V * ratios.repeat_interleave(V.shape[-1] // channels, -1).unsqueeze(-2)


def column_norms(W: Tensor, channels: int) -> Tensor:
    """Of each input with its whole kernel, over all outputs. (*, m, n) → (*, channels)"""
    inputs = W.reshape(*W.shape[:-1], channels, -1).transpose(-3, -2).flatten(-2)  # (*, c, m·k)
    return row_norms(row_squares(inputs))


def unfold_kernel(core: Tensor, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """Tucker's core over its inputs' factor: what makes the kernel of each of its rows.

    (*, p, q, kernel), (*, q, channels) → (*, p, channels·kernel)
    """
    p, kernel = core.shape[-3], core.shape[-1]
    flat = core.transpose(-2, -1).flatten(-3, -2)  # (*, p·kernel, q)
    unfolded = product(inputs, flat, 1.0, dtype)  # (*, p·kernel, channels)
    return unfolded.reshape(*core.shape[:-3], p, kernel, -1).transpose(-2, -1).flatten(-2)
