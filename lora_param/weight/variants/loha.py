"""LoHa: ΔW = scale·((w1_a @ w1_b) ∘ (w2_a @ w2_b)), of rank up to r² with the numbers of 2r.

Hyeon-Woo et al. 2021 (FedPara), https://arxiv.org/abs/2108.06098, eq. 3; as LyCORIS and PEFT have
it. The product is one of two matrices: rows of B are the Kronecker products of the rows of w1_a and
w2_a, columns of A those of the columns of w1_b and w2_b. In Tucker's form (proposition 3 there) the
factors of a convolution's kernel stand apart, as `hada_t1` and `hada_t2`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_param.targets.forms import Form
from lora_param.weight.variants.base import Fresh, Tensors, product
from lora_param.weight.variants.composed import Composed, unfold_kernel

__all__ = ["VARIANT"]


class _LoHa(Composed):
    def __init__(self, form: Form | None = None) -> None:
        super().__init__(form)
        if "tucker" not in self.form.words and not self.of_columns:
            self.by_rows = ("hada_w1_a", "hada_w2_a", "magnitude")
            self.has_blocks = True

    def fresh(self, make: Fresh) -> dict[str, Tensor]:
        found = {n: make.uniform(n) for n in make.shapes if n != "magnitude"}
        return {**found, "hada_w2_a": make.zeros("hada_w2_a"), **self.lengths(make)}

    def made(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        halves = (_half(tensors, i, dtype) for i in "12")
        first, second = (product(b, a, 1.0, dtype) for a, b in halves)
        return first * second

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        (a1, b1), (a2, b2) = (_half(tensors, i, tensors["hada_w1_a"].dtype) for i in "12")
        A = (b1.unsqueeze(-2) * b2.unsqueeze(-3)).flatten(-3, -2)  # (*, r·r, n)
        B = (a1.unsqueeze(-1) * a2.unsqueeze(-2)).flatten(-2)  # (*, m, r·r)
        return A, B


def _half(tensors: Tensors, which: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One of the two products' factors. (*, m, r), (*, r, n)"""
    a, b = tensors[f"hada_w{which}_a"], tensors[f"hada_w{which}_b"]
    core = tensors.get(f"hada_t{which}")
    return (a, b) if core is None else (a.mT, unfold_kernel(core, b, dtype))


VARIANT = _LoHa()
