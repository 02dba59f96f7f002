"""What all rules share: when they apply, in which dtype they run, and how updates are added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, lower
from lora_param.weight.base import dense, logical_dim, storage_of
from lora_param.weight.cost import prefers_built
from lora_param.weight.dropout import dropout
from lora_param.weight.factored import rescale
from lora_param.weight.precision import autocasts, exact
from lora_param.weight.private import forward_level, jit_tracing, transforms_active
from lora_param.weight.update import NormalForm, Update

__all__ = ["add_into", "add_updates", "autocast", "built", "factored", "folded"]
__all__ += ["lowered", "lowered_as_stored", "stacked_updates", "tracing", "whole"]


def stacked_updates(weight: AdaptedWeight | NormalForm) -> bool:
    """The weight is a stack of matrices (E, m, n), each with factors of its own."""
    return logical_dim(weight.base) == 3 and all(u.region.stacked for u in weight.updates)


def lowered(value: Any) -> NormalForm | None:
    """An adapted weight in normal form, W dense; None for anything else, and where it has none."""
    form = lowered_as_stored(value)
    if form is None or storage_of(form.base) is None:
        return form
    return NormalForm(dense(form.base), form.updates, form.alpha)


def lowered_as_stored(value: Any) -> NormalForm | None:
    """As `lowered`, with W as it is stored, for products that can work on it.

    Computed in the dtypes that its tensors have, whatever autocast says.
    """
    if not isinstance(value, AdaptedWeight):
        return None
    with exact(value.base):
        return lower(value)


def folded(V: NormalForm) -> NormalForm:
    """The same with α ∘ W for W, in its dtype, for products with no place for α of their own."""
    if V.alpha is None:
        return V
    return NormalForm((V.base * V.alpha).to(V.base.dtype), V.updates, None)


def built(value: Any) -> Any:
    """The argument as a plain tensor, for operands that a rule has no use for as factors."""
    return value.build() if isinstance(value, AdaptedWeight) else value


def _traced() -> bool:
    """`torch.jit.trace` records; torch.compile cannot be asked."""
    return not torch.compiler.is_compiling() and jit_tracing()


def tracing() -> bool:
    """Operations are being recorded, transformed or differentiated forward: only torch's own, out
    of place, may be used."""
    return (
        torch.compiler.is_compiling()
        or transforms_active()
        or jit_tracing()
        or forward_level() >= 0
    )


def autocast(*tensors: Tensor | None) -> list[Any]:
    """What autocast would make of the operands of a product."""
    first = next(t for t in tensors if t is not None)
    if not autocasts(first):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(t: Tensor | None) -> Tensor | None:
        eligible = t is not None and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible and t is not None else t

    return [cast(t) for t in tensors]


def part(t: Tensor, span: tuple[int, int] | None, dim: int) -> Tensor:
    """A view of what lies within a range of one dimension."""
    return t if span is None else t.narrow(dim, span[0], span[1] - span[0])


def dropped(x: Tensor, p: float) -> Tensor:
    """x after dropout: torch's own, where a graph of its operations is being made."""
    if not p:
        return x
    return F.dropout(x, p) if tracing() else dropout(x, p)


def add_into(
    y: Tensor, z: Tensor, scale: float | Tensor, span: tuple[int, int] | None, dim: int
) -> Tensor:
    """y with scale·z added to a range of `dim` (negative): in place, unless tracing.

    y is the result of a product, which no backward has saved.
    """
    if not tracing() and not isinstance(scale, Tensor):
        part(y, span, dim).add_(z, alpha=scale)
        return y
    z = z * scale
    if span is not None:
        start, stop = span
        z = F.pad(z, [0, 0] * (-dim - 1) + [start, y.shape[dim] - stop])
    return y + z


def add_updates(
    y: Tensor,
    x: Tensor,
    updates: Sequence[Update],
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    dim: int = -1,
    by_rows: bool = False,
    scale: float = 1.0,
) -> Tensor:
    """y with each update's product with x added: the factored half of every rule.

    Args:
        y: the product of x with W.
        x: the other operand.
        updates: what is added to W.
        product: of what an update reads of x after its dropout, with A and B, all in x's dtype.
        dim: the dimension (negative) of W's inputs in x, and of its outputs in y.
        by_rows: W's rows are its inputs, as in x W; otherwise its columns, as in W x.
        scale: multiplies what is added.
    """
    for u in updates:
        reads, adds = u.region.columns, u.region.rows
        if by_rows:
            reads, adds = adds, reads
        read = dropped(part(x, reads, dim), u.dropout)
        z = product(read, u.A.to(x.dtype), u.B.to(x.dtype))
        y = add_into(y, z, u.scale * scale, adds, dim)
    return y


def factored(
    V: NormalForm,
    x: Any,
    base: Callable[..., Tensor],
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
    *others: Tensor | None,
    rows: int,
    dim: int = -1,
    by_rows: bool = False,
    scale: float = 1.0,
    added: Tensor | None = None,
) -> Any:
    """What an operation gives with V as W and factors; NotImplemented where building is cheaper.

    Args:
        V: the weight.
        x: the operand that it is multiplied with.
        base: the operation, of x, W and `others`.
        product: see `add_updates`, also for `dim`, `by_rows` and `scale`.
        *others: further operands of `base`, cast as autocast would.
        rows: vectors in x for each matrix of V.
        added: what `base` adds to the product, broadcastable to it.
    """
    m, n = matrix_of(V)
    training = (torch.is_grad_enabled() and _trains(V)) or _traced()
    gradient = training and not V.base.requires_grad
    if prefers_built(V.base, V.updates, rows, m, n, both=True, gradient=gradient):
        return NotImplemented
    x, W, *others_cast = autocast(built(x), V.base, *others)
    alpha = None if V.alpha is None else _along(dim, V.alpha, stacked_updates(V))
    of_inputs = V.alpha is not None and by_rows == (V.alpha.shape[-1] == 1)
    y = base((x * alpha).to(x.dtype) if of_inputs else x, W, *others_cast)
    if alpha is not None and not of_inputs:
        y = rescale(y, added, alpha)
    return add_updates(y, x, V.updates, product, dim=dim, by_rows=by_rows, scale=scale)


def _trains(V: NormalForm) -> bool:
    """Gradients flow into W or into what is added."""
    if V.base.requires_grad or (V.alpha is not None and V.alpha.requires_grad):
        return True
    return any(t.requires_grad for u in V.updates for t in (u.A, u.B))


def _along(dim: int, alpha: Tensor, stacked: bool) -> Tensor:
    """α as it multiplies a dimension (negative) of an operand or of the result."""
    if not stacked:
        return alpha.reshape(-1, *[1] * (-dim - 1))
    return alpha.flatten(1).unsqueeze(1 if dim == -1 else 2)  # (E, 1, n) or (E, m, 1)


def matrix_of(V: NormalForm) -> tuple[int, int]:
    """Rows and columns of its matrices: of each in a stack, else with all but the rows flat."""
    *_, m, n = V.base.shape if stacked_updates(V) else (len(V.base), V.base[0].numel())
    return m, n


def whole(updates: Sequence[Update]) -> bool:
    """No update is limited to rows or columns."""
    return all(u.region.is_whole or u.region.stacked for u in updates)
