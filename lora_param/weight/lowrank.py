"""Low-rank factors of a matrix, and of a product that is given by its factors.

Everything works on a matrix or on a stack of them (*, m, n), in fp32 or wider, and gives the best
approximation in the Frobenius norm (Eckart & Young 1936): B @ A of the first singular directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_param.errors import OptionError, worded

__all__ = ["Kept", "LowRank", "factorize", "orthonormal", "reduce_product"]

_OVERSAMPLE = 8  # further directions that a randomized search looks at
_ITERATIONS = 2  # passes that sharpen it
_EXACT = 64  # sizes up to which a full decomposition costs nothing


class LowRank(NamedTuple):
    """Factors of an approximation.

    Attributes:
        A: shape (*, r, n), rows orthogonal.
        B: shape (*, m, r), columns orthogonal and of the same lengths as A's rows.
        energy: share of ‖Δ‖² that B @ A holds, over the whole stack; 1 where Δ is 0.
    """

    A: Tensor
    B: Tensor
    energy: float


@dataclass(frozen=True, slots=True)
class Kept:
    """How much of a matrix to keep: exactly one of the three.

    Attributes:
        rank: at most as many directions.
        energy: the fewest that hold this share of ‖Δ‖².
        error: the fewest with ‖Δ - B A‖ of at most this share of ‖Δ‖.

    Raises:
        OptionError: none or several are given, or a value out of range.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        given = {n: v for n in ("rank", "energy", "error") if (v := getattr(self, n)) is not None}
        if len(given) != 1:
            found = " and ".join(given) or "nothing"
            three = worded("rank, energy and error", "-r, --energy and --error")
            raise OptionError("what to keep", found, f"one of {three}")
        if self.rank is not None and self.rank < 1:
            raise OptionError("rank", self.rank, "a whole number of at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise OptionError("energy", self.energy, "a share above 0 and at most 1")
        if self.error is not None and not 0 <= self.error < 1:
            raise OptionError("error", self.error, "a share from 0 up to, not including, 1")

    def count(self, values: Tensor, total: float) -> int:
        """How many of the singular values (*, k), greatest first, to keep; at least one.

        Args:
            values: of a stack all matrices keep as many.
            total: ‖Δ‖² of the whole stack.
        """
        if self.rank is not None:
            return min(self.rank, values.shape[-1])
        squares = values.double().square().reshape(-1, values.shape[-1]).sum(0)  # (k,)
        share = self.energy if self.energy is not None else 1 - _share(self.error)
        wanted = share * total * (1 - 1e-12)
        enough = torch.nonzero(squares.cumsum(0) >= wanted)
        return int(enough[0]) + 1 if len(enough) else values.shape[-1]


def _share(error: float | None) -> float:
    assert error is not None
    return error * error


def factorize(delta: Tensor, keep: Kept, *, exact: bool = False, seed: int = 0) -> LowRank:
    """Low-rank factors of a matrix.

    Found by random projections with power iterations (Halko, Martinsson & Tropp 2011,
    https://arxiv.org/abs/0909.4061, algorithm 4.4), which costs O(m·n·r) where the decomposition
    costs O(m·n·min(m, n)). Where a share is asked for, the search doubles until it is found.

    Args:
        delta: shape (*, m, n), fp32 or fp64.
        keep: how much.
        exact: by the full decomposition.
        seed: of the projections; the result is repeatable.

    >>> x = torch.outer(torch.tensor([3.0, 4.0]), torch.ones(2))
    >>> low = factorize(x, Kept(rank=1))
    >>> torch.allclose(low.B @ low.A, x), round(low.energy, 6)
    (True, 1.0)
    """
    small = min(delta.shape[-2:])
    total = float(delta.double().square().sum()) if delta.numel() < 1 << 24 else _energy(delta)
    if total == 0:
        rank = min(keep.rank or 1, small)
        A = delta.new_zeros(*delta.shape[:-2], rank, delta.shape[-1])
        return LowRank(A, delta.new_zeros(*delta.shape[:-1], rank), 1.0)
    looked = min(small, (keep.rank or 16) + _OVERSAMPLE)
    while not exact and small > _EXACT and looked * 2 < small:
        U, S, Vh = _search(delta, looked, seed)
        count = keep.count(S, total)
        if keep.rank is not None or count <= looked - _OVERSAMPLE:
            return _factors(U, S, Vh, count, total)
        looked *= 2
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return _factors(U, S, Vh, keep.count(S, total), total)


def _energy(delta: Tensor) -> float:
    """‖Δ‖² of a large tensor, without a copy of it in fp64."""
    norm = torch.linalg.vector_norm(delta, dtype=torch.float64)
    return float(norm * norm)


def _search(delta: Tensor, directions: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Its first singular directions. Δ (*, m, n) → U (*, m, k), S (*, k), Vᵀ (*, k, n)"""
    generator = torch.Generator(delta.device).manual_seed(seed)
    shape = (*delta.shape[:-2], delta.shape[-1], directions)
    noise = torch.randn(shape, generator=generator, dtype=delta.dtype, device=delta.device)
    Q = orthonormal(delta @ noise)  # (*, m, k)
    for _ in range(_ITERATIONS):
        Q = orthonormal(delta @ orthonormal(delta.mT @ Q))  # (*, m, k)
    U, S, Vh = torch.linalg.svd(Q.mT @ delta, full_matrices=False)  # of (*, k, n)
    return Q @ U, S, Vh


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the space that the columns span. (*, m, k) → (*, m, min(m, k))"""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def _factors(U: Tensor, S: Tensor, Vh: Tensor, count: int, total: float) -> LowRank:
    kept = S[..., :count]
    root = kept.clamp(min=0).sqrt()  # (*, r)
    A = root.unsqueeze(-1) * Vh[..., :count, :]
    B = U[..., :count] * root.unsqueeze(-2)
    energy = float(kept.double().square().sum()) / total
    return LowRank(A.contiguous(), B.contiguous(), min(energy, 1.0))


def reduce_product(A: Tensor, B: Tensor, keep: Kept) -> LowRank:
    """The best factors of lower rank of B @ A, from the factors alone.

    With B = Q_B R_B and Aᵀ = Q_A R_A the decomposition is that of the small R_B R_Aᵀ. Computed in
    fp64, which the small matrices can afford.

    Args:
        A: shape (*, r, n).
        B: shape (*, m, r).
        keep: how much.

    Returns:
        Factors in A's dtype.

    >>> A, B = torch.randn(4, 9), torch.randn(7, 4)
    >>> low = reduce_product(A, B, Kept(rank=4))
    >>> torch.allclose(low.B @ low.A, B @ A, atol=1e-5)
    True
    """
    Q_B, R_B = torch.linalg.qr(B.double())  # (*, m, k), (*, k, r)
    Q_A, R_A = torch.linalg.qr(A.double().mT)  # (*, n, l), (*, l, r)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)  # of (*, k, l)
    total = float(S.square().sum())
    if total == 0 or not math.isfinite(total):
        rank = min(keep.rank or 1, S.shape[-1])
        return LowRank(torch.zeros_like(A[..., :rank, :]), torch.zeros_like(B[..., :rank]), 1.0)
    count = keep.count(S, total)
    low = _factors(Q_B @ U, S, Vh @ Q_A.mT, count, total)
    return LowRank(low.A.to(A.dtype), low.B.to(B.dtype), low.energy)
