"""Rows gathered from an adapted table: those of W, plus those of B times A.

Dropout has no place here, as there is no input: it is left out, which is what the warning says.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.base import gather, logical_shape
from lora_param.weight.cost import prefers_built
from lora_param.weight.precision import exact
from lora_param.weight.rules.common import add_into, add_updates, lowered
from lora_param.weight.update import NormalForm, Update

__all__: list[str] = []

_NO_DROPOUT = "dropout has no effect on an embedding: it acts on the input of A, and ids are none"


def _rows_of_B(ids: Tensor, u: Update, B: Tensor) -> Tensor:
    """B[ids], zero for the ids outside of the update's rows. (*, r)"""
    if u.region.rows is None:
        return F.embedding(ids, B)
    start, stop = u.region.rows
    inside = (ids >= start) & (ids < stop)
    return F.embedding((ids - start).clamp(0, stop - start - 1), B) * inside.unsqueeze(-1)


def _prefers_built(W: Tensor, ids: Tensor) -> bool:
    inputs, outputs = logical_shape(W)
    return prefers_built(W, (), ids.numel(), outputs, inputs)


def _warn(weight: AdaptedWeight | NormalForm) -> None:
    if any(u.dropout for u in weight.updates):
        warnings.warn(_NO_DROPOUT, stacklevel=4)


@implements(F.embedding)
def embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001  torch's signature
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """W[ids] + scale·B[ids] A. ids (*) → (*, D), with W (V, D), B (V, r), A (r, D).

    `max_norm` renormalises rows in place and the two other options shape the table's own gradient:
    these build it.
    """
    if not isinstance(weight, AdaptedWeight) or weight.dim() != 2:
        return NotImplemented
    if max_norm is not None or scale_grad_by_freq or sparse or isinstance(input, AdaptedWeight):
        return NotImplemented
    if _prefers_built(weight.base, input):
        return NotImplemented
    y = gather(input, weight.base, padding_idx)  # (*, D)
    with exact(y):
        form = _gathered(weight, input, y)
        if form is None:
            return NotImplemented
        _warn(weight)
        alpha, parts = form
        padding = None
        if padding_idx is not None and torch.is_grad_enabled():
            padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)  # (*, 1)
        if alpha is not None:
            y = _unlearned((y * alpha).to(y.dtype), padding)
        for u, B in parts:
            z = B.to(y.dtype) @ u.A.to(y.dtype)  # (*, D)
            y = add_into(y, _unlearned(z, padding), u.scale, u.region.columns, -1)
    return y


def _unlearned(z: Tensor, padding: Tensor | None) -> Tensor:
    """z, through which the rows of padding learn nothing. z (*, D), padding (*, 1)"""
    return z if padding is None else torch.where(padding, z.detach(), z)


def _gathered(
    weight: AdaptedWeight, ids: Tensor, rows: Tensor
) -> tuple[Tensor | None, list[tuple[Update, Tensor]]] | None:
    """What is added to the gathered rows of W: α (*, 1), and each update with its B[ids] (*, r).

    Only these rows are lowered, where the variant can. None where the weight has to be built.
    """
    total: Tensor | None = weight.alpha
    if total is not None:
        total = F.embedding(ids, total)  # (*, 1)
    parts: list[tuple[Update, Tensor]] = []
    for u in weight.updates:
        if isinstance(u, Update):
            parts.append((u, _rows_of_B(ids, u, u.B)))
            continue
        by_row = bool(u.variant.by_rows) and u.region.rows is None
        form = (
            u.of_rows(ids.flatten()).lower(rows.flatten(0, -2)) if by_row else u.lower(weight.base)
        )
        if form is None:
            return None
        alpha, plain = form
        if by_row:
            parts.append((plain, plain.B.view(*ids.shape, -1)))
            alpha = None if alpha is None else alpha.view(*ids.shape, 1)
        else:
            parts.append((plain, _rows_of_B(ids, plain, plain.B)))
            alpha = None if alpha is None else F.embedding(ids, alpha)
        if alpha is not None:
            total = alpha if total is None else total + alpha - 1
    return total, parts


@implements(F.embedding_bag)
def embedding_bag(
    input: Any,
    weight: Any,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001  torch's signature
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """Sums or means of rows, which are linear in the table: bags of B, times A. (bags, D)

    A maximum is not linear, and builds it.
    """
    if max_norm is not None or scale_grad_by_freq or sparse or mode not in ("sum", "mean"):
        return NotImplemented
    V = lowered(weight)
    if V is None or V.alpha is not None or V.base.dim() != 2 or isinstance(input, AdaptedWeight):
        return NotImplemented
    if _prefers_built(V.base, input) or any(u.region.rows for u in V.updates):
        return NotImplemented
    _warn(V)

    def bags(table: Tensor) -> Tensor:
        samples = None if per_sample_weights is None else per_sample_weights.to(table.dtype)
        return F.embedding_bag(
            input,
            table,
            offsets,
            mode=mode,
            per_sample_weights=samples,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
        )

    y = bags(V.base)  # (bags, D)
    with exact(y):
        updates = [replace(u, dropout=0.0) for u in V.updates]
        # (bags, D)
        return add_updates(y, y, updates, lambda _, A, B: bags(B) @ A, by_rows=True)
