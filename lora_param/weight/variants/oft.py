"""OFT: blocks of the rows of W are rotated, W' = Rᵀ W with R the Cayley transform of the blocks.

Qiu et al. 2023, https://arxiv.org/abs/2306.07280, §3.2 and §3.3, as LyCORIS' diag-oft has it:
R = (I + Q) (I - Q)⁻¹ with Q the difference of a block and its transpose, brought back to a norm of
at most scale·(rows of W), over all blocks together, in the form `constrained`; `rescale` multiplies
rows.
At another strength than 1, R lies between it and the identity.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from lora_param.targets.forms import Form
from lora_param.weight.precision import exact
from lora_param.weight.variants.base import Lowered, Tensors, Variant

__all__ = ["VARIANT", "Rotation", "rotations"]


class Rotation(Variant):
    """Rows of W are mixed; W has to be built.

    Attributes:
        form: words and sizes of the form that it is of.
    """

    def __init__(self, form: Form | None = None) -> None:
        self.form = form or Form()

    def of_form(self, form: Form) -> Self:
        """The variant in this form."""
        return type(self)(form)

    def lower(
        self,
        W: Tensor,
        tensors: Tensors,
        scale: float,
        strength: float,
        known: Tensor | None = None,
    ) -> Lowered | None:
        return None

    def blocks(self, W: Tensor, tensors: Tensors, scale: float) -> Tensor:
        """R of each block. (*, b, b)"""
        limit = scale * W.shape[-2] if "constrained" in self.form.words else None
        return rotations(tensors["oft_blocks"].to(W.dtype), limit)


class _OFT(Rotation):
    def delta(self, W: Tensor, tensors: Tensors, scale: float, strength: float) -> Tensor:
        with exact(W):
            R = self.blocks(W, tensors, scale)  # (k, b, b)
            rows = W.reshape(*R.shape[:-1], -1)  # (k, b, n)
            moved = (R.mT @ rows - rows).flatten(-3, -2)  # (m, n)
            if "rescale" in tensors:
                gain = tensors["rescale"].to(W.dtype).unsqueeze(-1)
                moved = gain * moved + (gain - 1) * W
            return moved * strength


def rotations(blocks: Tensor, limit: float | None) -> Tensor:
    """The Cayley transform of the skew part of each block. (*, b, b) → (*, b, b)

    Args:
        blocks: what trains.
        limit: the norm that the skew parts may have at most, all together.
    """
    Q = blocks - blocks.mT
    if limit is not None:
        norm = torch.linalg.vector_norm(Q) + 1e-8
        Q = Q * (limit / norm).clamp(max=1.0)
    one = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    R: Tensor = torch.linalg.solve(one - Q, one + Q, left=False)  # (I + Q) (I - Q)⁻¹
    return R


VARIANT = _OFT()
