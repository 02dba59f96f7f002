"""DoRA: an update of each row's direction, and a learned length for each row.

W' = m ∘ V / ‖V‖ with V = W + scale·(B @ A), the norms being those of V's rows, and m a vector that
begins as the norms of W's rows (Liu et al. 2024, https://arxiv.org/abs/2402.09353, eq. 5). The norm
takes part in the gradient; the paper's §4.3 leaves it out to save memory, which the closed form
of ‖V‖ below makes needless: V is never formed.

As with every variant, ΔW is what is added to W, here W' - W, and a strength multiplies it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decomposed_delta", "row_cross", "row_norms", "row_ratios", "row_squares"]


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


def row_cross(W: Tensor, A: Tensor) -> Tensor:
    """W Aᵀ, computed in the dtype that W has and given in that of A. (m, n), (r, n) → (m, r)"""
    A_like = A.to(W.dtype)
    tall = W.shape[0] >= W.shape[1]  # the quicker orientation on a CPU
    return (W @ A_like.t() if tall else (A_like @ W.t()).t()).to(A.dtype)


def row_ratios(
    W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float, squares: Tensor
) -> Tensor:
    """m / ‖W + scale·(B @ A)‖ by rows, without forming that matrix. (m,)

    ‖V‖² = ‖W‖² + 2·scale·rowsum((W Aᵀ) ∘ B) + scale²·rowsum((B (A Aᵀ)) ∘ B).

    Args:
        W: frozen base of shape (m, n); in its own dtype, in which W Aᵀ is computed.
        A: factor of shape (r, n).
        B: factor of shape (m, r).
        magnitude: shape (m,).
        scale: what multiplies B @ A.
        squares: `row_squares(W)`. (m,)

    Returns:
        In the dtype of the factors.
    """
    moved = row_cross(W, A) + (B @ (A @ A.t())) * (scale / 2)  # (m, r)
    return magnitude / row_norms(squares + (moved * B).sum(-1) * (2 * scale))
