"""Products with an adapted matrix, or with a stack of them, on either side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.base import logical_dim
from lora_param.weight.rules.common import built, factored, lowered, stacked_updates, tracing
from lora_param.weight.rules.linear import product
from lora_param.weight.rules.views import transposed
from lora_param.weight.update import NormalForm

__all__: list[str] = []

_FEW = 64  # rows below which a factor is not worth copying into a better layout


def _is_matrix(value: Any) -> bool:
    return isinstance(value, Tensor) and _dim(value) == 2


def _is_stack(value: Any) -> bool:
    return isinstance(value, Tensor) and _dim(value) == 3 and not value.is_nested


def _dim(value: Tensor) -> int:
    """Its dimensions: of an adapted weight by way of W, which is quicker to ask."""
    return logical_dim(value.base) if isinstance(value, AdaptedWeight) else value.dim()


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


# --- products with stacks, and V x ------------------------------------------------------------


def _product(
    V: NormalForm, x: Any, base: Callable[..., Tensor], *others: Tensor, right: bool, **options: Any
) -> Any:
    """x V for x (*, T, k) and V (k, n) or (E, k, n); or V x for V (m, k) or (E, m, k), x (*, k, T).

    `base` takes both operands in their order, and `others`; `options` are those of `factored`.
    """
    k = V.base.shape[-2 if right else -1]
    options["rows"] = x.numel() // max(k * prod(V.base.shape[:-2]), 1)
    if right:
        return factored(V, x, base, _through_B, *others, by_rows=True, **options)
    return factored(V, x, lambda x, W, *y: base(W, x, *y), _through_A, *others, dim=-2, **options)


def _through_B(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return (x @ B) @ A  # (*, T, r), then (*, T, n)


def _through_A(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return B @ (A @ x)  # (*, r, T), then (*, m, T)


# --- rules ------------------------------------------------------------------------------------


def _matmul(x: Any, y: Any) -> Any:
    V = lowered(y)
    if V is not None:
        x = built(x)
        if x.dim() == 0:
            return NotImplemented
        if V.base.dim() == 2:
            return _right(x, V)
        if stacked_updates(V) and x.dim() >= 2:
            return _product(V, x, torch.matmul, right=True)
        return NotImplemented
    V = lowered(x)
    if V is None or isinstance(y, AdaptedWeight) or y.dim() == 0:
        return NotImplemented
    if V.base.dim() == 2 and y.dim() == 1:
        return product(y, V, None)
    if (V.base.dim() == 2 or stacked_updates(V)) and y.dim() >= 2:
        return _product(V, y, torch.matmul, right=False)
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

    def base(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        return operation(start, a, b, beta=beta, alpha=alpha)

    added = input * beta if V.alpha is not None and beta else None
    return _product(V, other, base, input, right=right, scale=alpha, added=added)
