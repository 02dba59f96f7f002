"""A full copy: a tensor that takes the place of W, or of a part of it.

W' = value at full strength, bit for bit; W + strength·(value - W) at another. It has no rank.
A model's head, its biases and the rows of added tokens come like this in other tools' adapters.
"""

from __future__ import annotations

from torch import Tensor

from lora_param.weight.variants.base import Lowered, Tensors, Variant

__all__ = ["VARIANT"]


class _Copy(Variant):
    value = "value"

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
        return (tensors["value"].to(W.dtype) - W) * (scale * strength)


VARIANT = _Copy()
