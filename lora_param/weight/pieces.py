"""The matrices of a stack, built together where that is cheaper than products with their factors.

A loop over experts reads a matrix at a time. Of small ones, the overhead of a factored product is
more than the whole stack takes to build, once for all that are read from one adapted weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, NoReturn

import torch
from torch import Tensor

from lora_param.errors import ComputedWeightError
from lora_param.weight.adapted import AdaptedWeight, EagerAdaptedWeight, Pieces
from lora_param.weight.base import storage_of
from lora_param.weight.precision import exact
from lora_param.weight.private import no_torch_function
from lora_param.weight.rules.common import tracing
from lora_param.weight.update import Update

__all__ = ["pieces"]

_READ = 1 << 16  # elements of a stack that take as long to build as two factored products' overhead


class _Piece(Tensor):
    """A matrix that was built: its methods refuse to write to it."""

    # asked nothing: it costs nothing
    __torch_function__ = no_torch_function  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _refusing(name: str) -> Callable[..., NoReturn]:
    def method(self: Tensor, *_: Any, **__: Any) -> NoReturn:  # noqa: ARG001  a method
        raise ComputedWeightError(name)

    return method


_OPERATORS = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
for _name in dir(Tensor):
    _in_place = _name.endswith("_") and not _name.endswith("__") and _name != "requires_grad_"
    if _in_place or _name == "__setitem__":
        setattr(_Piece, _name, _refusing(_name))
for _name in _OPERATORS.split():
    setattr(_Piece, f"__i{_name}__", _refusing(f"__i{_name}__"))


def pieces(weight: AdaptedWeight, reads: int = 1) -> Sequence[Tensor] | None:
    """W[i] + ΔW[i] for each i of a stack, or None where one at a time is cheaper.

    Args:
        weight: a stack (E, m, n), each of its updates with factors for each matrix.
        reads: how many matrices are being asked for.
    """
    if type(weight) is not EagerAdaptedWeight or tracing():
        return None
    if weight.pieces is not None:
        matrices = weight.pieces.current()
        if matrices is not None:
            return matrices
    weight.reads += reads
    W, parts = weight.base, weight.parts
    if W.numel() > _READ * weight.reads or W.dtype not in (torch.float32, torch.float64):
        return None
    if storage_of(W) or any(u.dropout for u in weight.updates):
        return None
    if any(t.is_inference() for t in parts):
        return None
    built = _build(weight)
    matrices = built.unbind()
    for matrix in matrices:  # as_subclass would be one more operation, in the graph too
        matrix.__class__ = _Piece
    weight.pieces = Pieces(parts, matrices)
    return matrices


def _build(weight: AdaptedWeight) -> Tensor:
    """W + ΔW, rounded as a product is. (E, m, n)"""
    total = weight.base
    with exact(total):
        for u in weight.updates:
            if weight.alpha is not None or not isinstance(u, Update) or u.A.dtype != total.dtype:
                return weight.build()
            total = torch.baddbmm(total, u.B, u.A, alpha=u.scale)
    return total
