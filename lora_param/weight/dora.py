"""Norms of the rows of V = W + scale·(B @ A), without forming V."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["row_cross", "row_norms", "row_ratios", "row_squares"]


def row_squares(matrix: Tensor) -> Tensor:
    """‖row‖² of each row. (*, m, n) → (*, m)

    Summed in one order whatever the memory's, so that equal rows have equal norms.
    """
    matrix = matrix.contiguous()
    return (matrix * matrix).sum(-1)


def row_norms(squares: Tensor) -> Tensor:
    """√‖row‖², kept above zero, so that a row of zeros has a direction (none) and a gradient."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def row_cross(W: Tensor, A: Tensor) -> Tensor:
    """W Aᵀ, computed in W's dtype and given in that of A. (*, m, n), (*, r, n) → (*, m, r)"""
    A_like = A.to(W.dtype)
    tall = W.shape[-2] >= W.shape[-1]  # the quicker orientation on a CPU
    return (W @ A_like.mT if tall else (A_like @ W.mT).mT).to(A.dtype)


def row_ratios(
    W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float, squares: Tensor
) -> Tensor:
    """m / ‖W + scale·(B @ A)‖ by rows, without forming that matrix. (*, m)

    ‖V‖² = ‖W‖² + 2·scale·rowsum((W Aᵀ) ∘ B) + scale²·rowsum((B (A Aᵀ)) ∘ B).

    Args:
        W: frozen base of shape (*, m, n); in its own dtype, in which W Aᵀ is computed.
        A: factor of shape (*, r, n).
        B: factor of shape (*, m, r).
        magnitude: shape (*, m).
        scale: what multiplies B @ A.
        squares: `row_squares(W)`. (*, m)

    Returns:
        In the dtype of the factors.
    """
    moved = row_cross(W, A) + (B @ (A @ A.mT)) * (scale / 2)  # (m, r)
    return magnitude / row_norms(squares + (moved * B).sum(-1) * (2 * scale))
