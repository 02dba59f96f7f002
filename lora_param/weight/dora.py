"""DoRA: an update of each row's direction, and a learned length for each row.

W' = m ∘ V / ‖V‖ with V = W + scale·(B @ A), the norms being those of V's rows, and m a vector that
begins as the norms of W's rows (Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5). The norm
takes part in the gradient; the paper's §4.3 leaves it out to save memory, which the closed form
of ‖V‖ below makes needless: V is never formed.

As with every variant, ΔW is what is added to W, here W' - W, and a strength multiplies it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["decomposed_delta", "row_norms", "row_ratios", "row_squares"]


def row_squares(matrix: Tensor) -> Tensor:
    """‖row‖² of each row. (*, m, n) → (*, m)

    Summed in one order whatever the memory's, so that equal rows have equal norms.
    """
    matrix = matrix.contiguous()
    return (matrix * matrix).sum(-1)


def row_norms(squares: Tensor) -> Tensor:
    """√‖row‖², kept above zero, so that a row of zeros has a direction (none) and a gradient."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def decomposed_delta(W: Tensor, delta: Tensor, magnitude: Tensor, strength: float) -> Tensor:
    """ΔW = strength·(m ∘ V / ‖V‖ - W) with V = W + delta, all of shape (*, m, n).

    >>> W = torch.tensor([[3.0, 4.0]])
    >>> decomposed_delta(W, torch.zeros(1, 2), torch.tensor([10.0]), 1.0)
    tensor([[3., 4.]])
    """
    V = W + delta
    ratio = magnitude / row_norms(row_squares(V))  # (*, m)
    return (V * ratio.unsqueeze(-1) - W) * strength


def row_ratios(
    W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float, squares: Tensor | None = None
) -> Tensor:
    """m / ‖W + scale·(B @ A)‖ by rows, without forming that matrix. (m,)

    ‖V‖² = ‖W‖² + 2·scale·rowsum((W Aᵀ) ∘ B) + scale²·rowsum((B (A Aᵀ)) ∘ B).

    Args:
        W: frozen base of shape (m, n); in its own dtype, in which W Aᵀ is computed.
        A: factor of shape (r, n).
        B: factor of shape (m, r).
        magnitude: shape (m,).
        scale: what multiplies B @ A.
        squares: `row_squares(W)` where it is known. (m,)

    Returns:
        In the dtype of the factors.
    """
    if squares is None:
        squares = row_squares(W.to(A.dtype))
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        cross = _cross(W, A)  # (m, r)
        moved = cross + (B @ (A @ A.t())) * (scale / 2)  # (m, r)
        return magnitude / row_norms(squares + (moved * B).sum(-1) * (2 * scale))
    return cast(Tensor, _Ratios.apply(W, A, B, magnitude, scale, squares))  # type: ignore[no-untyped-call]


def _cross(W: Tensor, A: Tensor) -> Tensor:
    """W Aᵀ, in the dtype that W has and then in that of A. (m, r)"""
    return (W @ A.to(W.dtype).t()).to(A.dtype)


class _Ratios(torch.autograd.Function):
    """m / ‖V‖: with P = W Aᵀ and G = A Aᵀ, half the derivative of ‖V‖² by B is scale·(P + s·B G),
    and by A it is scale·Bᵀ V."""

    @staticmethod
    def forward(
        ctx: Any, W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float, squares: Tensor
    ) -> Tensor:
        cross, gram = _cross(W, A), A @ A.t()  # (m, r), (r, r)
        slope = torch.addmm(cross, B, gram, alpha=scale)  # (m, r): P + s·B G
        # ‖V‖² = ‖W‖² + s·rowsum(B ∘ (P + (P + s·B G)))
        total = torch.add(squares, cross.add_(slope).mul_(B).sum(-1), alpha=scale)
        norms = total.clamp_min_(torch.finfo(total.dtype).tiny).sqrt_()  # (m,)
        ratios = magnitude / norms
        ctx.scale = scale
        ctx.save_for_backward(W, A, B, magnitude, slope, norms, squares)
        return ratios

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        W, A, B, magnitude, slope, norms, squares = ctx.saved_tensors
        scale: float = ctx.scale
        if torch.is_grad_enabled():  # a graph of this backward: from what has a graph itself
            slope = torch.addmm(_cross(W, A), B, A @ A.t(), alpha=scale)
            again = (_cross(W, A) + slope).mul(B).sum(-1)
            norms = row_norms(squares + again * scale)
        of_magnitude = grad / norms  # (m,)
        weight = (of_magnitude * magnitude / (norms * norms)).mul(-scale).unsqueeze(-1)  # (m, 1)
        dB = weight * slope if ctx.needs_input_grad[2] else None  # (m, r)
        dA: Tensor | None = None
        if ctx.needs_input_grad[1]:
            weighted = (weight * B).t()  # (r, m)
            dA = (weighted.to(W.dtype) @ W).to(A.dtype)  # (r, n)
            dA = torch.addmm(dA, weighted @ B, A, alpha=scale)
        return None, dA, dB, of_magnitude, None, None
