"""An adapted weight as α ∘ W + Σ scale·(B @ A): rows of W rescaled, and updates that only add.

What DoRA does to a weight takes this form, which rules can work with: α rescales the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.dora import row_ratios
from lora_param.weight.update import Update, compute_dtype

__all__ = ["rescaled"]


def rescaled(W: Tensor, updates: Sequence[Update]) -> tuple[Tensor | None, Sequence[Update]] | None:
    """The factor of each row of W, and updates without a magnitude, which equal those given.

    Args:
        W: base of shape (m, *).
        updates: what makes the adapted weight.

    Returns:
        α (m,), or None where no row is rescaled, and the updates; or None where the weight has
        no such form: a magnitude over part of the columns or over a stack, or a base that trains.
    """
    if all(u.magnitude is None for u in updates):
        return None, updates
    if W.requires_grad and torch.is_grad_enabled():
        return None
    alpha: Tensor | None = None
    plain: list[Update] = []
    device = W.device.type
    with torch.autocast(device, enabled=False):
        for u in updates:
            if u.magnitude is None:
                plain.append(u)
                continue
            if u.region.columns is not None or u.region.stacked:
                return None
            ratios = _ratios(W, u, u.magnitude)
            own = _over_all_rows(ratios, u, W.shape[0])
            alpha = own if alpha is None else alpha + own - 1
            B = u.B * ratios.unsqueeze(-1)  # (rows, r)
            plain.append(replace(u, B=B, scale=u.scale * u.strength, magnitude=None))
    return alpha, plain


def _ratios(W: Tensor, u: Update, magnitude: Tensor) -> Tensor:
    """m / ‖V‖ over the rows of an update. (rows,)"""
    wide = compute_dtype(W.dtype)
    part = W if u.region.rows is None else W[slice(*u.region.rows)]
    return row_ratios(
        part.flatten(1), u.A.to(wide), u.B.to(wide), magnitude.to(wide), u.scale, u.squares
    )


def _over_all_rows(ratios: Tensor, u: Update, rows: int) -> Tensor:
    """What one update multiplies each row of W by; 1 beside its region. (m,)"""
    if not (isinstance(u.strength, float) and u.strength == 1):
        ratios = (ratios - 1) * u.strength + 1
    if u.region.rows is None:
        return ratios
    start, stop = u.region.rows
    return F.pad(ratios, (start, rows - stop), value=1.0)
