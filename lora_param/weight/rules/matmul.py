"""Products with an adapted matrix, or with a stack of them, on either side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.rules.common import (
    add_into,
    autocast,
    built,
    dense_is_cheaper,
    factors,
    lowered,
    part_of_input,
    scaled_base,
    stacked_updates,
    tracing,
)
from lora_param.weight.rules.linear import product
from lora_param.weight.rules.views import transposed
from lora_param.weight.update import NormalForm, Update

__all__: list[str] = []

_FEW = 64  # rows below which a factor is not worth copying into a better layout


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and _dim(value) == 2


def _is_stack(value: Any) -> bool:
    return isinstance(value, Tensor) and _dim(value) == 3 and not value.is_nested


def _dim(value: Tensor) -> int:
    """Its dimensions: of an adapted weight by way of W, which is quicker to ask."""
    return value.base.dim() if isinstance(value, AdaptedWeight) else value.dim()


# --- x @ V, V a matrix (k, n) -----------------------------------------------------------------


def _right(x: Tensor, V: NormalForm, bias: Tensor | None = None) -> Tensor:
    """x V + b with V (k, n): the linear of Vᵀ. x (*, k) → (*, n).

    Its A is V's Bᵀ, made contiguous because x Aᵀ takes half the time that way.
    """
    W = transposed(V)
    assert W is not None
    if not tracing() and x.numel() > _FEW * x.shape[-1]:
        W = W._replace(updates=[replace(u, A=u.A.contiguous()) for u in W.updates])
    return product(x, W, bias)


# --- what the factors add to a product that is there already ----------------------------------


def _add_right(y: Tensor, x: Tensor, V: NormalForm, alpha: float = 1.0) -> Tensor:
    """y + alpha·x ΔV. x (*, T, k), V (k, n) or (E, k, n), y (*, T, n)."""
    for u in V.updates:
        A, B = factors(u, y.dtype)
        h = _dropped(x, u.region.rows, u) @ B  # (*, T, r)
        y = add_into(y, h @ A, u.scale * alpha, u.region.columns, -1)  # (*, T, n)
    return y


def _dropped(x: Tensor, span: tuple[int, int] | None, u: Update) -> Tensor:
    """What x V reads of x (*, k): V's rows are its inputs."""
    return part_of_input(x, replace(u, region=replace(u.region, rows=None, columns=span)), -1)


def _add_left(y: Tensor, x: Tensor, V: NormalForm, alpha: float = 1.0) -> Tensor:
    """y + alpha·ΔV x. V (m, k) or (E, m, k), x (*, k, T), y (*, m, T)."""
    for u in V.updates:
        A, B = factors(u, y.dtype)
        h = A @ part_of_input(x, u, -2)  # (*, r, T)
        y = add_into(y, B @ h, u.scale * alpha, u.region.rows, -2)  # (*, m, T)
    return y


def _rows(x: Tensor, k: int, V: NormalForm) -> int:
    """Vectors of size k in x, for each matrix of V."""
    return x.numel() // max(k * prod(V.base.shape[:-2]), 1)


def _is_dense(x: Tensor, V: NormalForm, k: int) -> bool:
    return dense_is_cheaper(V, _rows(x, k, V), V.base.shape[-2], V.base.shape[-1])


# --- rules ------------------------------------------------------------------------------------


def _matmul(x: Any, y: Any) -> Any:
    V = lowered(y)
    if V is not None:
        x = built(x)
        if x.dim() == 0:
            return NotImplemented
        if V.base.dim() == 2:
            return _right(x, V)
        if stacked_updates(V) and x.dim() >= 2 and not _is_dense(x, V, V.base.shape[-2]):
            x, base = autocast(x, scaled_base(V))
            return _add_right(torch.matmul(x, base), x, V)
        return NotImplemented
    V = lowered(x)
    if V is None or isinstance(y, AdaptedWeight) or y.dim() == 0:
        return NotImplemented
    if V.base.dim() == 2 and y.dim() == 1:
        return product(y, V, None)
    if (
        (V.base.dim() == 2 or stacked_updates(V))
        and y.dim() >= 2
        and not _is_dense(y, V, V.base.shape[-1])
    ):
        y, base = autocast(y, scaled_base(V))
        return _add_left(torch.matmul(base, y), y, V)
    return NotImplemented


@implements(torch.matmul, Tensor.matmul, Tensor.__matmul__)
def matmul(input: Any, other: Any = None, **named: Any) -> Any:
    """x V and V x with a matrix or a stack, whatever the other operand's dimensions."""
    if named or not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return NotImplemented
    if input.is_nested or other.is_nested:
        return NotImplemented
    return _matmul(input, other)


@implements(Tensor.__rmatmul__)
def rmatmul(self: Any, other: Any) -> Any:
    """`other @ self`."""
    return matmul(other, self)


@implements(torch.mm, Tensor.mm)
def mm(input: Any, mat2: Any = None, *rest: Any, **named: Any) -> Any:
    """The product of two matrices."""
    if rest or named or not (_is_matrix(input) and _is_matrix(mat2)):
        return NotImplemented
    return _matmul(input, mat2)


@implements(torch.mv, Tensor.mv)
def mv(input: Any, vec: Any = None, **named: Any) -> Any:
    """The product of a matrix and a vector."""
    if named or not _is_matrix(input) or not isinstance(vec, Tensor) or vec.dim() != 1:
        return NotImplemented
    return _matmul(input, vec)


@implements(torch.bmm, Tensor.bmm)
def bmm(input: Any, mat2: Any = None, *rest: Any, **named: Any) -> Any:
    """The products of two stacks."""
    if rest or named or not (_is_stack(input) and _is_stack(mat2)):
        return NotImplemented
    if input.shape[0] != mat2.shape[0]:
        return NotImplemented
    return _matmul(input, mat2)


@implements(torch.addmm, Tensor.addmm)
def addmm(
    input: Any,
    mat1: Any = None,
    mat2: Any = None,
    *rest: Any,
    beta: Any = 1,
    alpha: Any = 1,
    **named: Any,
) -> Any:
    """beta·input + alpha·(x V) or alpha·(V x)."""
    if rest or named or not (_is_matrix(mat1) and _is_matrix(mat2)):
        return NotImplemented
    if isinstance(input, AdaptedWeight) or not isinstance(input, Tensor):
        return NotImplemented
    if input.dim() == 1 and input.shape[0] == mat2.shape[1] and beta == alpha == 1:
        V = lowered(mat2)
        if V is not None:
            return _right(built(mat1), V, input)
    return _added(torch.addmm, input, mat1, mat2, beta, alpha)


@implements(torch.baddbmm, Tensor.baddbmm)
def baddbmm(
    input: Any,
    batch1: Any = None,
    batch2: Any = None,
    *rest: Any,
    beta: Any = 1,
    alpha: Any = 1,
    **named: Any,
) -> Any:
    """beta·input + alpha·(x V) or alpha·(V x), of stacks."""
    if rest or named or not (_is_stack(batch1) and _is_stack(batch2)):
        return NotImplemented
    if isinstance(input, AdaptedWeight) or not isinstance(input, Tensor):
        return NotImplemented
    if not all(stacked_updates(b) for b in (batch1, batch2) if isinstance(b, AdaptedWeight)):
        return NotImplemented
    return _added(torch.baddbmm, input, batch1, batch2, beta, alpha)


def _added(
    operation: Callable[..., Tensor], input: Tensor, x: Any, y: Any, beta: Any, alpha: Any
) -> Any:
    """beta·input + alpha·(x y), where one of both is adapted."""
    right = isinstance(y, AdaptedWeight)
    V, other = (lowered(y), built(x)) if right else (lowered(x), y)
    if V is None:
        return NotImplemented
    if _is_dense(other, V, V.base.shape[-2] if right else V.base.shape[-1]):
        return NotImplemented
    start, other, base = autocast(input, other, scaled_base(V))
    if right:
        total = operation(start, other, base, beta=beta, alpha=alpha)
        return _add_right(total, other, V, alpha)
    total = operation(start, base, other, beta=beta, alpha=alpha)
    return _add_left(total, other, V, alpha)
