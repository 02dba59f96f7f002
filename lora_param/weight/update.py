"""ΔW, and W + ΔW: pure functions on tensors.

The same `merge` serves the parametrization and both bakes: what was trained is what ships.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.targets.regions import WHOLE, Region
from lora_param.weight.base import dense
from lora_param.weight.blocks import Index
from lora_param.weight.precision import compute_dtype
from lora_param.weight.variants.base import Variant, product

__all__ = ["Deferred", "NormalForm", "Update", "add_deltas", "fold_initial", "lower_all"]
__all__ += ["make_update", "merge", "replacing"]


@dataclass(slots=True, eq=False)
class Update:
    """scale·(B @ A) over a region of a weight: what rules work with.

    Attributes:
        A: factor of shape (rank, in), or (E, rank, in) for a stack.
        B: factor of shape (out, rank), or (E, out, rank) for a stack.
        scale: what multiplies B @ A, strength included; a 0-d tensor while compiling.
        region: the part of the weight it adds to.
        dropout: probability with which an element of the input is dropped before A, where the
            operation shows the input.
    """

    A: Tensor
    B: Tensor
    scale: float
    region: Region = WHOLE
    dropout: float = 0.0

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The tensors through which gradients flow."""
        return self.A, self.B

    def delta(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """ΔW in the shape of its region of W."""
        delta = product(self.A, self.B, self.scale, dtype)
        return delta.reshape(self.region.shape(tuple(W.shape)))

    def of_block(self, index: Index) -> Update:
        """The update of a block of its region, seen as a matrix or a stack: see `blocks_of`."""
        region = Region(stacked=len(index) > 1)
        return Update(self.A[index[:-1]], self.B[index], self.scale, region)


@dataclass(slots=True, eq=False)
class Deferred:
    """An update that depends on W, to be lowered where an operation shows what it needs of W.

    Attributes:
        variant: what makes it of the tensors.
        tensors: by name.
        scale: alpha/rank, or what the scaling makes of both; a 0-d tensor while compiling.
        strength: multiplies the whole update; a 0-d tensor while compiling.
        region, dropout: as of `Update`.
        known: what `variant.known` gives for the region of W, where W is frozen.
    """

    variant: Variant
    tensors: Mapping[str, Tensor]
    scale: float
    strength: float
    region: Region = WHOLE
    dropout: float = 0.0
    known: Tensor | None = None

    @property
    def trained(self) -> tuple[Tensor, ...]:
        """The tensors through which gradients flow."""
        return tuple(self.tensors.values())

    def delta(self, W: Tensor, dtype: torch.dtype) -> Tensor:
        """ΔW in the shape of its region of W."""
        shape = tuple(W.shape)
        part = W[self.region.index].to(dtype).reshape(self.region.matrix(shape))
        delta = self.variant.delta(part, self.tensors, self.scale, self.strength)
        return delta.reshape(self.region.shape(shape))

    def lower(self, W: Tensor) -> tuple[Tensor | None, Update] | None:
        """α, broadcastable to W, and what is added; or None where the weight has to be built.

        Over a range of columns α has no such form, unless it is 1.
        """
        W = dense(W)
        shape, region = tuple(W.shape), self.region
        part = (
            W if region.is_whole and W.dim() == 2 else W[region.index].reshape(region.matrix(shape))
        )
        lowered = self.variant.lower(part, self.tensors, self.scale, self.strength, self.known)
        if lowered is None or (lowered.alpha is not None and region.columns is not None):
            return None
        alpha, A, B, scale = lowered
        if alpha is not None:
            if region.rows is not None:
                start, stop = region.rows
                alpha = F.pad(alpha, (start, shape[0] - stop), value=1.0)
            alpha = alpha.reshape(*alpha.shape, *[1] * (W.dim() - alpha.dim()))
        return alpha, Update(A, B, scale, region, self.dropout)

    def of_block(self, index: Index) -> Deferred:
        """As of `Update`, where the variant has blocks."""
        tensors, region = self.variant.of_block(self.tensors, index), Region(stacked=len(index) > 1)
        return Deferred(self.variant, tensors, self.scale, self.strength, region)

    def of_rows(self, ids: Tensor) -> Deferred:
        """The same update of rows that are gathered from the table W. ids (T,)"""
        of_row = self.variant.by_rows
        tensors = {n: t[ids] if n in of_row else t for n, t in self.tensors.items()}
        known = None if self.known is None else self.known[ids]
        return replace(self, tensors=tensors, known=known)


def make_update(
    variant: Variant,
    tensors: Mapping[str, Tensor],
    scale: float,
    strength: float,
    region: Region = WHOLE,
    dropout: float = 0.0,
    known: Tensor | None = None,
) -> Update | Deferred:
    """The update that a target's tensors make. They hold no initial pair, see `fold_initial`."""
    if variant.uses_W:
        # a dict of its own: the module may hold other tensors by the time that this is lowered
        return Deferred(variant, dict(tensors), scale, strength, region, dropout, known)
    pair = variant.pair(tensors, scale, strength)
    assert pair is not None
    return Update(*pair, region, dropout)


def fold_initial(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors with the pair that is subtracted made part of the factors, of twice the rank.

    B @ A - initial_B @ initial_A = [B, -initial_B] @ [A; initial_A].

    >>> A, B = torch.ones(1, 3), torch.ones(2, 1)
    >>> t = fold_initial({"lora_A": A, "lora_B": B, "initial_A": A, "initial_B": B})
    >>> list(t), (t["lora_B"] @ t["lora_A"]).abs().max().item()
    (['lora_A', 'lora_B'], 0.0)
    """
    if "initial_A" not in tensors:
        return tensors
    rest = {n: t for n, t in tensors.items() if not n.startswith("initial_")}
    return {
        **rest,
        "lora_A": torch.cat([tensors["lora_A"], tensors["initial_A"]], -2),
        "lora_B": torch.cat([tensors["lora_B"], -tensors["initial_B"]], -1),
    }


class NormalForm(NamedTuple):
    """α ∘ W + Σ scale·(B @ A): what every rule works on.

    Attributes:
        base: W.
        updates: what is added, in order.
        alpha: what multiplies W, broadcastable to it; None is 1.
    """

    base: Tensor
    updates: Sequence[Update]
    alpha: Tensor | None


def lower_all(W: Tensor, updates: Iterable[Update | Deferred]) -> NormalForm | None:
    """W and its updates in normal form, or None where some update has none.

    Each update adds what it adds to W alone.
    """
    total: Tensor | None = None
    lowered: list[Update] = []
    for u in updates:
        if isinstance(u, Update):
            lowered.append(u)
            continue
        form = u.lower(W)
        if form is None:
            return None
        alpha, plain = form
        lowered.append(plain)
        if alpha is not None:
            total = alpha if total is None else total + alpha - 1
    return NormalForm(W, lowered, total)


def replacing(updates: Iterable[Update | Deferred]) -> list[Deferred]:
    """The full copies that take the place of W: at full strength, the first on its elements."""
    found: list[Deferred] = []
    for u in updates:
        if isinstance(u, Deferred) and u.variant.value:
            full = isinstance(u.strength, float | int) and u.scale * u.strength == 1
            if full and not any(u.region.overlaps(other.region) for other in found):
                found.append(u)
    return found


def add_deltas(
    W: Tensor, deltas: Iterable[tuple[Region, Tensor]], copies: Iterable[Deferred] = ()
) -> Tensor:
    """W with each ΔW added to its region, in fp32 (fp64 for fp64 weights), not yet rounded.

    Args:
        W: the weight.
        deltas: what is added, and where.
        copies: what takes the place of W before that, see `replacing`.
    """
    merged = W.to(compute_dtype(W.dtype))
    for u in copies:
        value = u.tensors[u.variant.value].to(merged.dtype)
        value = value.reshape(u.region.shape(tuple(W.shape)))
        if u.region.is_whole:
            merged = value.clone()
        else:
            merged = merged.clone()
            merged[u.region.index] = value
    for region, delta in deltas:
        if region.is_whole or region.stacked:
            merged = merged + delta
        else:
            part = merged[region.index] + delta
            merged = merged.clone()
            merged[region.index] = part
    return merged if merged is not W else W.clone()


def merge(W: Tensor, updates: Iterable[Update | Deferred], alpha: Tensor | None = None) -> Tensor:
    """α ∘ W + ΔW of every update, added in fp32 (fp64 for fp64 weights), rounded once to W's dtype.

    Differentiable in W and the factors. The result is always a new tensor of W's shape.

    >>> W = torch.zeros(2, 3, dtype=torch.bfloat16)
    >>> merge(W, [Update(torch.ones(1, 3), torch.ones(2, 1), 0.5)]).dtype
    torch.bfloat16
    """
    W = dense(W)
    dtype = compute_dtype(W.dtype)
    updates = tuple(updates)
    copies = replacing(updates)
    deltas = ((u.region, u.delta(W, dtype)) for u in updates if u not in copies)
    start = W if alpha is None else W.to(dtype) * alpha
    return add_deltas(start, deltas, copies).to(W.dtype)
