"""What all rules share: when they apply, what dtype they run in, what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, lower
from lora_param.weight.base import dense, storage_of
from lora_param.weight.precision import autocasts, exact
from lora_param.weight.private import forward_level, jit_tracing, transforms_active
from lora_param.weight.update import NormalForm, Update

__all__ = [
    "add_into",
    "autocast",
    "built",
    "dense_is_cheaper",
    "factors",
    "lowered",
    "lowered_as_stored",
    "part",
]
__all__ += ["part_of_input", "scaled_base", "stacked_updates", "tracing", "whole"]


def stacked_updates(weight: AdaptedWeight | NormalForm) -> bool:
    """The weight is a stack of matrices (E, m, n), each with factors of its own."""
    return weight.base.dim() == 3 and all(u.region.stacked for u in weight.updates)


def lowered(value: Any) -> NormalForm | None:
    """An adapted weight in normal form, W dense; None for anything else, and where it has none."""
    form = lowered_as_stored(value)
    if form is None or storage_of(form.base) is None:
        return form
    return form._replace(base=dense(form.base))


def lowered_as_stored(value: Any) -> NormalForm | None:
    """As `lowered`, with W as it is stored, for products that can work on it.

    Computed in the dtypes that its tensors have, whatever autocast says.
    """
    if not isinstance(value, AdaptedWeight):
        return None
    with exact(value.base):
        return lower(value)


def scaled_base(V: NormalForm) -> Tensor:
    """α ∘ W in W's dtype, for products that have no place for α of their own."""
    return V.base if V.alpha is None else (V.base * V.alpha).to(V.base.dtype)


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


def factors(u: Update, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B in the dtype that the product runs in."""
    return u.A.to(dtype), u.B.to(dtype)


def part(t: Tensor, span: tuple[int, int] | None, dim: int) -> Tensor:
    """A view of what lies within a range of one dimension."""
    return t if span is None else t.narrow(dim, span[0], span[1] - span[0])


def part_of_input(x: Tensor, u: Update, dim: int) -> Tensor:
    """What an update reads of x, whose inputs lie along `dim`, after its dropout."""
    x = part(x, u.region.columns, dim)
    return F.dropout(x, u.dropout) if u.dropout else x


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


def dense_is_cheaper(V: NormalForm, rows: int, m: int, n: int) -> bool:
    """Building W + ΔW costs less than `rows` passes through its factors.

    Counted in multiplications, with m × n the matrix and r the ranks together: the factors take
    rows·r·(m + n), the build m·n·r. Training pays each three times, and a built weight needs its
    own gradient besides, rows·m·n, where W itself is frozen. Low precisions are never built here,
    which would round W + ΔW, nor is a weight with dropout, whose input a built one does not see.
    A trace counts as training: it is run with gradients, however it was recorded.
    """
    low = V.base.dtype not in (torch.float32, torch.float64)
    if low or any(u.dropout for u in V.updates):
        return False
    r = sum(u.A.shape[-2] for u in V.updates)
    lazy, dense = rows * r * (m + n), m * n * r
    if (torch.is_grad_enabled() and _trains(V)) or _traced():
        lazy, dense = 3 * lazy, 3 * dense
        if not V.base.requires_grad:
            dense += rows * m * n
    return lazy > dense


def _trains(V: NormalForm) -> bool:
    """Gradients flow into W or into what is added."""
    if V.base.requires_grad or (V.alpha is not None and V.alpha.requires_grad):
        return True
    return any(t.requires_grad for u in V.updates for t in (u.A, u.B))


def whole(updates: Sequence[Update]) -> bool:
    """No update is limited to rows or columns."""
    return all(u.region.is_whole or u.region.stacked for u in updates)
