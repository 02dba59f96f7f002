"""DoRA with a learned length for each column of W instead of each row.

W' = V ∘ m / ‖V‖ with V = W + scale·(B @ A), the norms being those of V's columns. It is DoRA (see
`dora`) of a weight that is stored as (in, out), as an embedding or transformers' Conv1D has it.
The factor of a column has no place in the normal form: the weight is built.
"""

from __future__ import annotations

from torch import Tensor

from lora_param.weight.dora import row_norms, row_squares
from lora_param.weight.variants.base import Fresh, Lowered, Tensors, Variant, product

__all__ = ["VARIANT"]


class _DoRAColumns(Variant):
    def fresh(self, make: Fresh) -> dict[str, Tensor]:
        magnitude = row_norms(row_squares(make.W().mT)).to(make.dtype)  # (*, n)
        return {**make.factors(), "magnitude": magnitude}

    def lower(
        self,
        W: Tensor,
        tensors: Tensors,
        scale: float,
        strength: float,
        known: Tensor | None = None,
    ) -> Lowered | None:
        return None

    def delta(self, W: Tensor, tensors: Tensors, scale: float, strength: float) -> Tensor:
        V = W + product(tensors["lora_A"], tensors["lora_B"], scale, W.dtype)  # (*, m, n)
        ratios = tensors["magnitude"].to(W.dtype) / row_norms(row_squares(V.mT))  # (*, n)
        return (V * ratios.unsqueeze(-2) - W) * strength


VARIANT = _DoRAColumns()
