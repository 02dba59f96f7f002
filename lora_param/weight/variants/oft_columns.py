"""OFT over the columns of W, which are the layer's inputs: W' = W Rᵀ, as PEFT has it.

`oft_R` holds, for each block of `rank` columns, what is above the diagonal of a skew matrix Q. R is
its Cayley transform (I - Q) (I + Q)⁻¹, or the first terms of that one's Neumann series, the last
one not doubled, where the form says how many. `shared` has one block for all columns. At another
strength than 1, R lies between it and the identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora_param.weight.precision import exact
from lora_param.weight.variants.base import Tensors
from lora_param.weight.variants.oft import Rotation

__all__ = ["VARIANT"]


class _OFTColumns(Rotation):
    def delta(self, W: Tensor, tensors: Tensors, scale: float, strength: float) -> Tensor:
        with exact(W):
            Q = _skew(tensors["oft_R"].to(W.dtype))  # (k, b, b)
            R = _series(Q, terms) if (terms := self.form.size("terms", 0)) else _cayley(Q)
            columns = W.reshape(*W.shape[:-1], -1, R.shape[-1]).transpose(-3, -2)  # (blocks, m, b)
            moved = columns @ R.mT - columns
            return moved.transpose(-3, -2).flatten(-2) * strength  # (m, n)


def _skew(above: Tensor) -> Tensor:
    """What is above the diagonal, row by row, less its transpose. (k, b·(b-1)/2) → (k, b, b)"""
    size = math.isqrt(2 * above.shape[-1]) + 1
    rows, columns = torch.triu_indices(size, size, 1, device=above.device)
    flat = above.new_zeros(above.shape[0], size * size)
    upper = flat.index_add(1, rows * size + columns, above).reshape(-1, size, size)
    return upper - upper.mT


def _cayley(Q: Tensor) -> Tensor:
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    R: Tensor = torch.linalg.solve(one + Q, one - Q, left=False)
    return R


def _series(Q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + 2 Q² + ... + Q^(terms - 1); of 3 terms what PEFT makes of 4, of 2 it is I + 2 Q."""
    power = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    found, last = power, 3 if terms == 3 else terms - 1
    for i in range(1, last + 1):
        power = power @ Q
        found = found + (power if i == last > 1 else 2 * power)
    return found


VARIANT = _OFTColumns()
