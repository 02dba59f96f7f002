"""Transposes, slices and indices of an adapted weight: adapted weights again, of W's view.

A view of W + ΔW is that view of W plus products of the factors' own rows and columns. Whatever
takes out something that has no factors of its own (a row, a stride, a reshape) builds the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_param.targets.regions import Region
from lora_param.weight.adapted import AdaptedWeight, adapted, implements
from lora_param.weight.base import logical_dim, logical_shape, take
from lora_param.weight.pieces import pieces
from lora_param.weight.rules.common import lowered, stacked_updates
from lora_param.weight.update import Deferred, NormalForm, Update

__all__ = ["transposed"]


# --- transposes -------------------------------------------------------------------------------


def transposed(V: NormalForm) -> NormalForm | None:
    """The transpose, or that of each matrix of a stack: (B A)ᵀ = Aᵀ Bᵀ. None where it has no
    factors.

    Shape (n, m) for (m, n), (E, n, m) for (E, m, n).
    """
    if V.base.dim() != 2 and not stacked_updates(V):
        return None
    updates = [
        replace(
            u, A=u.B.mT, B=u.A.mT, region=Region(u.region.columns, u.region.rows, u.region.stacked)
        )
        for u in V.updates
    ]
    alpha = None if V.alpha is None else V.alpha.mT
    return NormalForm(V.base.transpose(-2, -1), updates, alpha)


def _swapped(weight: AdaptedWeight, dim0: int, dim1: int) -> Any:
    dims = logical_dim(weight.base)
    if {dim0 % dims, dim1 % dims} != {dims - 2, dims - 1}:
        return NotImplemented
    V = lowered(weight)
    swapped = None if V is None else transposed(V)
    return NotImplemented if swapped is None else adapted(*swapped)


@implements(*(getattr(Tensor, name).__get__ for name in ("T", "H")), Tensor.t, torch.t)
def transpose_matrix(weight: Any, *_: object) -> Any:
    """The transpose of a matrix."""
    return _swapped(weight, 0, 1) if logical_dim(weight.base) == 2 else NotImplemented


@implements(
    *(getattr(Tensor, name).__get__ for name in ("mT", "mH")), Tensor.adjoint, torch.adjoint
)
def transpose_matrices(weight: Any, *_: object) -> Any:
    """The transpose of each matrix."""
    return _swapped(weight, -2, -1)


@implements(
    *(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes),
    *(Tensor.swapdims, torch.swapdims),
)
def transpose(weight: Any, *dims: Any, **named: Any) -> Any:
    """The transpose of the last two dimensions."""
    if named or len(dims) != 2 or not all(isinstance(d, int) for d in dims):
        return NotImplemented
    return _swapped(weight, *dims)


@implements(Tensor.permute, torch.permute)
def permute(weight: Any, *dims: Any, **named: Any) -> Any:
    """A permutation that only swaps the last two dimensions."""
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = tuple(dims[0])
    if named or len(dims) != weight.dim():
        return NotImplemented
    order = [d % len(dims) for d in dims]
    n = len(order)
    if order != [*range(n - 2), n - 1, n - 2]:
        return NotImplemented
    return _swapped(weight, -2, -1)


# --- slices -----------------------------------------------------------------------------------


def _overlap(span: tuple[int, int], start: int, stop: int) -> tuple[int, int] | None:
    low, high = max(span[0], start), min(span[1], stop)
    return (low, high) if low < high else None


def _cut(u: Update, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Update | None:
    """What an update of a weight of this shape is on start:stop of a dimension; None if nothing."""
    if u.region.stacked:
        A, B = u.A, u.B
        if dim != 1:
            A = A[start:stop] if dim == 0 else A[..., start:stop]
        if dim != 2:
            B = B[start:stop] if dim == 0 else B[:, start:stop]
        return replace(u, A=A, B=B)
    spans = [u.region.rows, u.region.columns]
    first, last = spans[dim] or (0, shape[dim])
    kept = _overlap((first, last), start, stop)
    if kept is None:
        return None
    taken = slice(kept[0] - first, kept[1] - first)
    moved = (kept[0] - start, kept[1] - start)
    spans[dim] = None if moved == (0, stop - start) else moved
    A, B = u.A, u.B
    if taken != slice(0, last - first):
        if dim == 0:
            B = B[taken]
        elif len(shape) == 2:
            A = A[:, taken]
        else:
            A = A.reshape(A.shape[0], last - first, -1)[:, taken].reshape(A.shape[0], -1)
    return replace(u, A=A, B=B, region=Region(spans[0], spans[1]))


def _can_cut(weight: Any, dim: int) -> bool:
    if not isinstance(weight, AdaptedWeight):
        return False
    if stacked_updates(weight):
        return dim < 3
    return dim < min(2, weight.dim()) and not any(u.region.stacked for u in weight.updates)


def _narrowed(V: NormalForm, base: Tensor, dim: int, start: int) -> AdaptedWeight:
    """The part of V whose base is `base`, from `start` on in a dimension."""
    stop, alpha = start + base.shape[dim], V.alpha
    if start == 0 and stop == V.base.shape[dim]:
        return adapted(base, V.updates, alpha)
    shape = tuple(V.base.shape)
    cuts = [_cut(u, shape, dim, start, stop) for u in V.updates]
    if alpha is not None and alpha.shape[dim] > 1:
        alpha = alpha.narrow(dim, start, base.shape[dim])
    return adapted(base, [u for u in cuts if u is not None], alpha)


@implements(Tensor.narrow, torch.narrow)
def narrow(input: Any, dim: Any, start: Any, length: int) -> Any:
    """Rows or columns."""
    if not all(isinstance(i, int) for i in (dim, start)):
        return NotImplemented
    dim %= input.dim()
    V = lowered(input) if _can_cut(input, dim) else None
    if V is None:
        return NotImplemented
    base = V.base.narrow(dim, start, length)
    return _narrowed(V, base, dim, start % max(V.base.shape[dim], 1))


def _pieces(V: NormalForm, bases: Sequence[Tensor], dim: int) -> tuple[AdaptedWeight, ...]:
    pieces, start = [], 0
    for base in bases:
        pieces.append(_narrowed(V, base, dim, start))
        start += base.shape[dim]
    return tuple(pieces)


@implements(Tensor.chunk, torch.chunk)
def chunk(input: Any, chunks: Any, dim: int = 0) -> Any:
    """Equal parts."""
    V = lowered(input) if _can_cut(input, dim % input.dim()) else None
    if V is None:
        return NotImplemented
    return _pieces(V, V.base.chunk(chunks, dim), dim % V.base.dim())


@implements(Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)
def split(tensor: Any, split_size_or_sections: Any = None, dim: int = 0, **named: Any) -> Any:
    """Parts of given sizes."""
    if named or split_size_or_sections is None:
        return NotImplemented
    V = lowered(tensor) if _can_cut(tensor, dim % tensor.dim()) else None
    if V is None:
        return NotImplemented
    parts = torch.split(V.base, split_size_or_sections, dim)
    return _pieces(V, parts, dim % V.base.dim())


# --- indices ----------------------------------------------------------------------------------


def _of_stack(weight: AdaptedWeight, index: Any) -> Any:
    """One matrix of a stack, or a stack of those that a tensor names."""
    if _is_number(index):
        built = pieces(weight)
        if built is not None:
            return built[index]
    base = take(weight.base, index)
    region = Region(stacked=base.dim() == 3)
    updates: list[Update | Deferred] = []
    for u in weight.updates:
        if isinstance(u, Update):
            updates.append(replace(u, A=u.A[index], B=u.B[index], region=region))
        else:
            tensors = {n: t[index] for n, t in u.tensors.items()}
            known = None if u.known is None else u.known[index]
            updates.append(replace(u, tensors=tensors, known=known, region=region))
    return adapted(base, updates, None if weight.alpha is None else weight.alpha[index])


@implements(Tensor.select, torch.select)
def select(input: Any, dim: Any, index: Any) -> Any:
    """One matrix of a stack."""
    if not stacked_updates(input) or dim not in (0, -3):
        return NotImplemented
    return _of_stack(input, index) if isinstance(index, int) else NotImplemented


@implements(Tensor.unbind, torch.unbind)
def unbind(input: Any, dim: int = 0) -> Any:
    """The matrices of a stack."""
    if not stacked_updates(input) or dim not in (0, -3):
        return NotImplemented
    count = len(input.base)
    built = pieces(input, count)
    return built if built is not None else tuple(_of_stack(input, e) for e in range(count))


def _is_number(index: Any) -> bool:
    """An integer, or a tensor that holds one."""
    return type(index) is int or (type(index) is Tensor and index.dim() == 0 and _integral(index))


def _integral(t: Tensor) -> bool:
    return not t.is_floating_point() and t.dtype not in (torch.bool, torch.uint8)


def _names_matrices(index: Any) -> bool:
    """An index that takes whole matrices out of a stack: an integer, or a tensor of them."""
    if isinstance(index, Tensor):
        return _integral(index) and index.dim() <= 1
    return isinstance(index, int) and not isinstance(index, bool)


@implements(Tensor.__getitem__)
def getitem(weight: Any, index: Any) -> Any:
    """Slices of step one along rows and columns; matrices of a stack by number."""
    if not isinstance(weight, AdaptedWeight):
        return NotImplemented
    indices = list(index) if isinstance(index, tuple) else [index]
    if sum(i is Ellipsis for i in indices) == 1:
        at = next(k for k, i in enumerate(indices) if i is Ellipsis)
        indices[at : at + 1] = [slice(None)] * (weight.dim() - len(indices) + 1)
    if not indices or len(indices) > weight.dim():
        return NotImplemented
    if _names_matrices(indices[0]) and stacked_updates(weight):
        weight = _of_stack(weight, indices.pop(0))
        if not isinstance(weight, AdaptedWeight):
            return weight[tuple(indices)] if indices else weight
        if weight.dim() == 3:
            indices.insert(0, slice(None))
    for dim, item in enumerate(indices):
        if item is None or isinstance(item, Tensor):
            return NotImplemented
        if item == slice(None):
            continue
        if not isinstance(item, slice) or not _can_cut(weight, dim):
            return NotImplemented
        kept = range(logical_shape(weight.base)[dim])[item]
        V = lowered(weight)
        if kept.step != 1 or len(kept) == 0 or V is None:
            return NotImplemented
        weight = _narrowed(V, V.base.narrow(dim, kept.start, len(kept)), dim, kept.start)
    return weight
