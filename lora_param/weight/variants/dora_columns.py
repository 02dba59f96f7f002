"""DoRA with a learned length for each column of W instead of each row.

W' = V ∘ m / ‖V‖ with V = W + scale·(B @ A), the norms being those of V's columns. It is DoRA (see
`dora`) of a weight that is stored as (in, out), as an embedding or transformers' Conv1D has it.
The factor of a column has no place in the normal form: the weight is built. On a convolution, in
the form `kernel9` of its elements, the length is that of an input with its whole kernel.
"""

from __future__ import annotations

from torch import Tensor

from lora_param.weight.variants.base import Fresh, Lowered, Tensors, Variant, product
from lora_param.weight.variants.composed import column_norms, with_lengths

__all__ = ["VARIANT"]


class _DoRAColumns(Variant):
    def fresh(self, make: Fresh) -> dict[str, Tensor]:
        channels = make.shapes["magnitude"][-1]
        magnitude = column_norms(make.W(), channels).to(make.dtype)  # (*, channels)
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
        return (with_lengths(V, tensors["magnitude"].to(W.dtype), of_rows=False) - W) * strength


VARIANT = _DoRAColumns()
