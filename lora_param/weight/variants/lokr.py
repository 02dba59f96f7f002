"""LoKr: ΔW = scale·(w1 ⊗ w2), a Kronecker product of a small matrix and of one of low rank.

Yeh et al. 2023 (LyCORIS), https://arxiv.org/abs/2309.14859, §3.2; Edalati et al. 2022 (KronA),
https://arxiv.org/abs/2212.10650. w1 is whole or w1_a @ w1_b, w2 is w2_a @ w2_b or whole, or in
Tucker's form on a convolution, whose kernel belongs to w2. With w1 = P Q and w2 = S T it is the
product (P ⊗ S) (Q ⊗ T), an identity standing in where one of them is whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_param.weight.variants.base import Fresh, Tensors, product
from lora_param.weight.variants.composed import Composed, unfold_kernel

__all__ = ["VARIANT", "whole"]

_Factors = tuple[Tensor, Tensor]


class _LoKr(Composed):
    def fresh(self, make: Fresh) -> dict[str, Tensor]:
        found = {n: make.uniform(n) for n in make.shapes if n != "magnitude"}
        zero = "lokr_w2" if "lokr_w2" in make.shapes else "lokr_w2_b"
        return {**found, zero: make.zeros(zero), **self.lengths(make)}

    def made(self, tensors: Tensors, dtype: torch.dtype) -> Tensor:
        w1, w2 = (whole(tensors, i, dtype) for i in "12")
        return _kron(w1, w2)

    def factors(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        dtype = next(iter(tensors.values())).dtype
        (P, Q), (S, T) = (_with_identity(*_halves(tensors, i, dtype)) for i in "12")
        return _kron(Q, T), _kron(P, S)


def _halves(tensors: Tensors, which: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The two factors of w1 or w2, or the whole and None."""
    whole = tensors.get(f"lokr_w{which}")
    if whole is not None:
        return whole, None
    a, b = tensors[f"lokr_w{which}_a"], tensors[f"lokr_w{which}_b"]
    core = tensors.get(f"lokr_t{which}")
    return (a, b) if core is None else (a.mT, unfold_kernel(core, b, dtype))


def whole(tensors: Tensors, which: str, dtype: torch.dtype) -> Tensor:
    """w1 or w2, multiplied out. (*, rows, columns)"""
    a, b = _halves(tensors, which, dtype)
    return a.to(dtype) if b is None else product(b, a, 1.0, dtype)


def _with_identity(a: Tensor, b: Tensor | None) -> _Factors:
    """Two factors; a whole matrix is one of them, beside the smaller identity."""
    if b is not None:
        return a, b
    rows, columns = a.shape[-2:]
    one = torch.eye(min(rows, columns), dtype=a.dtype, device=a.device)
    one = one.expand(*a.shape[:-2], *one.shape)
    return (one, a) if rows <= columns else (a, one)


def _kron(left: Tensor, right: Tensor) -> Tensor:
    """left ⊗ right, matrix by matrix. (*, a, c), (*, b, d) → (*, a·b, c·d)"""
    blocks = left[..., :, None, :, None] * right[..., None, :, None, :]  # (*, a, b, c, d)
    return blocks.flatten(-2).flatten(-3, -2)


VARIANT = _LoKr()
