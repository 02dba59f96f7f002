"""ΔW from factors, and W + ΔW: pure functions on tensors.

The same `merge` serves the parametrization and both bakes: what was trained is what ships.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_param.targets.regions import WHOLE, Region
from lora_param.weight.dora import decomposed_delta

__all__ = ["Update", "add_deltas", "compute_dtype", "join_factors", "merge", "update_delta"]
__all__ += ["update_matrix"]


@dataclass(slots=True, eq=False)
class Update:
    """One ΔW = scale·(B @ A) over a region of a weight.

    Attributes:
        A: factor of shape (rank, in), or (E, rank, in) for a stack.
        B: factor of shape (out, rank), or (E, out, rank) for a stack.
        scale: what multiplies B @ A; a 0-d tensor while compiling.
        region: the part of the weight it adds to.
        dropout: probability with which an element of the input is dropped before A, where the
            operation shows the input.
        magnitude: DoRA's length of each row, (out,) or (E, out); None for plain LoRA.
        strength: multiplies DoRA's ΔW, whose `scale` is within its norm; a 0-d tensor while
            compiling. Plain LoRA's is part of `scale`.
        squares: what `row_squares` gives for the region of W, where it is known.
    """

    A: Tensor
    B: Tensor
    scale: float
    region: Region = WHOLE
    dropout: float = 0.0
    magnitude: Tensor | None = None
    strength: float = 1.0
    squares: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What of it may be trained."""
        return (self.A, self.B) if self.magnitude is None else (self.A, self.B, self.magnitude)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of `dtype` is merged: fp32, or fp64 where the weight is."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def join_factors(
    A: Tensor, B: Tensor, initial_A: Tensor | None = None, initial_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factors of B @ A - initial_B @ initial_A as one pair of twice the rank.

    >>> A, B = torch.ones(1, 3), torch.ones(2, 1)
    >>> A2, B2 = join_factors(A, B, A, B)
    >>> (B2 @ A2).abs().max().item()
    0.0
    """
    if initial_A is None or initial_B is None:
        return A, B
    return torch.cat([A, initial_A], -2), torch.cat([B, -initial_B], -1)


def update_matrix(A: Tensor, B: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale·(B @ A), computed in `dtype` whatever autocast says. (*, out, in)

    Both factors are made contiguous first, so that the bits do not depend on how they are stored.
    """
    device = A.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return update_matrix(A, B, scale, dtype)
    return (B.to(dtype).contiguous() @ A.to(dtype).contiguous()) * scale


def update_delta(u: Update, W: Tensor, dtype: torch.dtype) -> Tensor:
    """ΔW of one update of W, in the shape of its region."""
    delta = update_matrix(u.A, u.B, u.scale, dtype)
    if u.magnitude is not None:
        part = W[u.region.index].to(dtype).reshape(delta.shape)
        delta = decomposed_delta(part, delta, u.magnitude.to(dtype), u.strength)
    return delta.reshape(u.region.shape(tuple(W.shape)))


def add_deltas(W: Tensor, deltas: Iterable[tuple[Region, Tensor]]) -> Tensor:
    """W with each ΔW added to its region, in fp32 (fp64 for fp64 weights), not yet rounded."""
    merged = W.to(compute_dtype(W.dtype))
    for region, delta in deltas:
        if region.is_whole or region.stacked:
            merged = merged + delta
        else:
            part = merged[region.index] + delta
            merged = merged.clone()
            merged[region.index] = part
    return merged if merged is not W else W.clone()


def merge(W: Tensor, updates: Iterable[Update]) -> Tensor:
    """W + ΔW of every update, added in fp32 (fp64 for fp64 weights) and rounded once to W's dtype.

    Differentiable in W and the factors. The result is always a new tensor of W's shape.

    >>> W = torch.zeros(2, 3, dtype=torch.bfloat16)
    >>> merge(W, [Update(torch.ones(1, 3), torch.ones(2, 1), 0.5)]).dtype
    torch.bfloat16
    """
    dtype = compute_dtype(W.dtype)
    return add_deltas(W, ((u.region, update_delta(u, W, dtype)) for u in updates)).to(W.dtype)
