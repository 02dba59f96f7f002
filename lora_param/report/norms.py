"""Size and shape of an update, from its factors alone: the m × n matrix is never built."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["effective_rank", "measure", "singular_values", "update_norm"]

Floats = NDArray[np.float64]

_ROWS = 1024  # of a factor multiplied at a time: so few that BLAS takes no threads, which wait
_SMALLEST = 1e-6  # of the eigenvalues to the largest: the singular values keep nine digits


def singular_values(
    A: ArrayLike,
    B: ArrayLike,
    scale: float,
) -> Floats:
    """Singular values of scale·(B @ A), greatest first.

    With BᵀB = R_Bᵀ R_B and A Aᵀ = R_Aᵀ R_A they are those of the small matrix scale·R_B R_Aᵀ. R is
    a root of the factor's Gram matrix, or of its QR decomposition where that would lose digits.

    Args:
        A: factor of shape (rank, in), or (E, rank, in) for a stack.
        B: factor of shape (out, rank), or (E, out, rank) for a stack.
        scale: what multiplies B @ A.

    Returns:
        Shape (k,), or (E, k) for a stack, with k at most the rank. All NaN where a factor holds NaN
        or infinity.

    Example:
        >>> singular_values([[3.0, 4.0]], [[1.0], [0.0]], 2.0)
        array([10.])
    """
    down, up = np.asarray(A, np.float64), np.asarray(B, np.float64)
    if not (np.isfinite(down).all() and np.isfinite(up).all() and np.isfinite(scale)):
        k = min(up.shape[-2], up.shape[-1], down.shape[-1])
        return np.full((*up.shape[:-2], k), np.nan)
    R_B = _root(up)  # (*, min(out, r), r)
    R_A = _root(np.swapaxes(down, -1, -2))  # (*, min(in, r), r)
    small = R_B @ np.swapaxes(R_A, -1, -2)
    return np.asarray(np.linalg.svd(small, compute_uv=False)) * abs(scale)


def _root(tall: Floats) -> Floats:
    """R with RᵀR = tallᵀ tall, of as many rows as a QR decomposition has. tall (*, n, r)"""
    n, r = tall.shape[-2:]
    if n > r and r:
        gram = np.zeros((*tall.shape[:-2], r, r))
        for i in range(0, n, _ROWS):
            part = tall[..., i : i + _ROWS, :]
            gram += np.swapaxes(part, -1, -2) @ part  # (*, r, r)
        values, vectors = np.linalg.eigh(gram)  # (*, r), (*, r, r)
        if (values[..., 0] > _SMALLEST * values[..., -1]).all():
            root: Floats = np.sqrt(values)[..., :, None] * np.swapaxes(vectors, -1, -2)
            return root
    return np.asarray(np.linalg.qr(tall, mode="r"))


def update_norm(
    A: ArrayLike,
    B: ArrayLike,
    scale: float,
) -> float:
    """Frobenius norm of scale·(B @ A); of a stack, over all of it.

    Takes what `singular_values` takes.

    >>> update_norm([[3.0, 4.0]], [[1.0], [0.0]], 2.0)
    10.0
    """
    return _norm(singular_values(A, B, scale))


def effective_rank(values: ArrayLike) -> float:
    """How many directions carry an update: exp of the Shannon entropy of s/Σs.

    Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", eq. 3. It is
    k where k singular values are equal and the others zero, and 0 for no update at all.

    Args:
        values: singular values, (k,), or (E, k) for a stack, of which the mean is taken.

    >>> round(effective_rank([2.0, 2.0, 0.0]), 6), effective_rank([0.0, 0.0])
    (2.0, 0.0)
    """
    s = np.asarray(values, np.float64)
    s = s.reshape(-1, s.shape[-1])
    if not np.isfinite(s).all():
        return float("nan")
    total = s.sum(-1, keepdims=True)  # (E, 1)
    share = np.divide(s, total, out=np.zeros_like(s), where=total > 0)
    logs = np.log(share, out=np.zeros_like(s), where=share > 0)  # 0 · log 0 is 0
    ranks = np.exp(-(share * logs).sum(-1))  # (E,)
    return float(np.where(total[:, 0] > 0, ranks, 0.0).mean())


def measure(
    A: ArrayLike,
    B: ArrayLike,
    scale: float,
) -> tuple[float, float, tuple[float, ...]]:
    """`update_norm`, `effective_rank` and singular values of an update, from one decomposition.

    Of a stack each singular value is the root of the sum of squares over its matrices, so that the
    norm of the singular values is the update's, as it is for a matrix.
    """
    values = singular_values(A, B, scale)
    spectrum = np.sqrt((values.reshape(-1, values.shape[-1]) ** 2).sum(0))  # (k,)
    return _norm(values), effective_rank(values), tuple(spectrum.tolist())


def _norm(values: Floats) -> float:
    return float(np.sqrt((values**2).sum()))
