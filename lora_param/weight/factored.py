"""x (W + ΔW)ᵀ from W and the factors, with a backward of its own.

What autograd would do with x Wᵀ + scale·(x Aᵀ) Bᵀ is right but wasteful: it adds whole activations
together and keeps what dropout made. Here every product accumulates in place, no m × n matrix is
kept for backward, x is kept once, and each direction chooses by `cost` whether W + ΔW is built into
a scratch buffer.

The skinny products have the rank as rows of the left operand, forward as (A xᵀ) and backward as
(Bᵀ gᵀ), both (r, T): a CPU's libraries take up to ten times as long for the other orientation.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.base import left_product, linear
from lora_param.weight.cost import prefers_built
from lora_param.weight.dropout import draw_bits, keep_probability, masks
from lora_param.weight.update import Update

__all__ = [
    "down",
    "factored_linear",
    "own_scale",
    "rescale",
    "scaled_product",
    "scratch",
    "through_A",
]

_SCRATCH = 64 << 20  # bytes; the most that a thread keeps for building
_local = threading.local()


def _of_output(y: Tensor, u: Update) -> Tensor:
    """The columns of y (T, m) that an update adds to: a view."""
    return y if u.region.rows is None else y[:, slice(*u.region.rows)]


def _of_input(x: Tensor, u: Update) -> Tensor:
    """The columns of x (T, n) that an update reads: a view."""
    return x if u.region.columns is None else x[:, slice(*u.region.columns)]


def factored_linear(x: Tensor, W: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """x (W + ΔW)ᵀ + bias.

    Args:
        x: input of shape (*, n).
        W: weight of shape (m, n).
        bias: shape (m,), or None.
        updates: what is added to W; their factors are cast to x's dtype.

    Returns:
        Shape (*, m).
    """
    dtype = x.dtype
    factors: list[Tensor] = []
    for u in updates:
        factors += (u.A, u.B) if u.A.dtype == dtype else (u.A.to(dtype), u.B.to(dtype))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, W, *factors)):
        y = cast(Tensor, _Linear.apply(x, W, bias, updates, *factors))  # type: ignore[no-untyped-call]
    else:
        y = _forward(x, W, bias, updates, factors, None)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def rescale(y: Tensor, bias: Tensor | None, alpha: Tensor) -> Tensor:
    """α ∘ (y - b) + b, which is y itself, bit for bit, where α is 1. Both broadcast to y."""
    wide = alpha if bias is None else alpha.to(torch.promote_types(alpha.dtype, bias.dtype))
    z = y * wide if bias is None else torch.addcmul(bias - wide * bias, y.to(wide.dtype), wide)
    return z.to(y.dtype)


def _build(W: Tensor, updates: Sequence[Update], factors: Sequence[Tensor]) -> Tensor:
    """W + ΔW, valid until this thread builds the next one. (m, n)"""
    built = scratch(W)
    if len(updates) == 1 and updates[0].region.is_whole:
        return torch.addmm(W, factors[1], factors[0], alpha=updates[0].scale, out=built)
    built.copy_(W)
    for u, A, B in zip(updates, factors[::2], factors[1::2], strict=True):
        built[u.region.index].addmm_(B, A, alpha=u.scale)
    return built


def scratch(W: Tensor) -> Tensor:
    """A buffer like W, on a CPU one that a thread uses again: fresh memory costs more to touch
    than the build does. Large weights get memory of their own, which is given back."""
    if W.dim() == 2 and not W.is_contiguous() and W.t().is_contiguous():
        return scratch(W.t()).t()
    count = W.numel() * W.element_size()
    if W.device.type != "cpu" or not W.is_contiguous() or count > _SCRATCH:
        return torch.empty_like(W)
    buffer: Tensor | None = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < count:
        buffer = _local.buffer = torch.empty(count, dtype=torch.uint8)
    return buffer[:count].view(W.dtype).view(W.shape)


def _forward(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    updates: Sequence[Update],
    factors: Sequence[Tensor],
    kept: list[Tensor | None] | None,
) -> Tensor:
    """y (T, m) for x (*, n). `kept` is given, for backward, A xᵀ and each dropout's bits."""
    late = bias if adds_bias_late(x) else None
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])  # (T, n)
    if prefers_built(W, updates, x.shape[0], W.shape[0], x.shape[1]):
        if kept is not None:
            kept += [None, None] * len(updates)
        return F.linear(x, _build(W, updates, factors), bias)
    y = linear(x, W, bias if late is None else None)  # (T, m)
    if late is not None:
        y += late
    for u, A, B in zip(updates, factors[::2], factors[1::2], strict=True):
        part_x, bits = _of_input(x, u), None
        if u.dropout:
            bits = draw_bits(part_x.shape[0], part_x.shape[1], u.dropout, x.device)
        Ax = down(part_x, A, bits)  # (r, T)
        _of_output(y, u).addmm_(Ax.t(), B.t(), alpha=own_scale(u))
        if kept is not None:
            kept += [Ax, bits]
    return y


def adds_bias_late(x: Tensor) -> bool:
    """torch rounds x Wᵀ before the bias is added: in low precision, to an x with gaps in memory."""
    return x.dim() > 2 and x.dtype.itemsize < 4 and not x.is_contiguous()


def own_scale(u: Update) -> float:
    """What multiplies B @ A, and makes up for what dropout takes away."""
    return u.scale / keep_probability(u.dropout) if u.dropout else u.scale


def down(x: Tensor, A: Tensor, bits: Tensor | None) -> Tensor:
    """A xᵀ, or that of x with its dropped elements zero. (r, T)"""
    if bits is None:
        return A @ x.t()
    parts = [A @ (_rows(x, i, mask) * mask).t() for i, mask in masks(x, bits)]  # (r, rows) each
    if not parts:  # no rows
        return A.new_empty(A.shape[0], 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _rows(t: Tensor, start: int, mask: Tensor) -> Tensor:
    """The rows of t that a mask is for: a view."""
    return t.narrow(0, start, mask.shape[0])


class _Linear(torch.autograd.Function):
    """x (W + ΔW)ᵀ + bias: saves x, W and the factors, and A xᵀ (r, T) where it was computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        updates: Sequence[Update],
        *factors: Tensor,
    ) -> Tensor:
        kept: list[Tensor | None] = []
        y = _forward(x, W, bias, updates, factors, kept)
        ctx.updates = updates
        ctx.save_for_backward(x, W, *factors, *kept)
        return y  # (T, m): a view of it, made in here, could not be written to in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        updates: Sequence[Update] = ctx.updates
        x, W, *rest = ctx.saved_tensors
        count = 2 * len(updates)
        factors, kept = rest[:count], rest[count:]
        needs_x, needs_W, needs_bias, _, *needs = ctx.needs_input_grad
        x2 = x.reshape(-1, x.shape[-1])  # (T, n)
        g = grad  # (T, m)
        again = torch.is_grad_enabled()  # a graph of this backward: nothing may be cut off
        built = not again and prefers_built(W, updates, g.shape[0], x2.shape[1], g.shape[1])
        dx: Tensor | None = None
        if needs_x:
            dx = g @ _build(W, updates, factors) if built else left_product(g, W)  # (T, n)
        grads: list[Tensor | None] = []
        for i, u in enumerate(updates):
            A, B = factors[2 * i : 2 * i + 2]
            Ax, bits = kept[2 * i : 2 * i + 2]
            needs_A, needs_B = needs[2 * i : 2 * i + 2]
            part_g, part_x = _of_output(g, u), _of_input(x2, u)
            dA = dB = None
            if needs_A or (needs_x and not built):
                Bg = B.t() @ part_g.t()  # (r, T)
                into = None if dx is None or built else _of_input(dx, u)
                dA = through_A(Bg, A, part_x, into, bits, own_scale(u), needs_A)
            if needs_B:
                if Ax is None or again:
                    Ax = down(part_x, A, bits)
                dB = scaled_product(Ax, part_g, B.t(), own_scale(u)).t()  # (m, r)
            grads += [dA, dB]
        dW = g.t() @ x2 if needs_W else None  # (m, n)
        dbias = g.sum(0) if needs_bias else None  # (m,)
        if dx is not None:
            dx = dx.view(x.shape)
        return dx, dW, dbias, None, *grads


def scaled_product(a: Tensor, b: Tensor, like: Tensor, scale: float) -> Tensor:
    """scale·(a @ b), of the shape of `like`, which is not read; in one pass."""
    return torch.addmm(like, a, b, beta=0, alpha=scale)


def through_A(
    Bg: Tensor,
    A: Tensor,
    x: Tensor,
    dx: Tensor | None,
    bits: Tensor | None,
    scale: float,
    needs_A: bool,
) -> Tensor | None:
    """dA = scale·Bg x, and scale·Bgᵀ A added to dx, both under the mask of dropout. Bg (r, T)."""
    if bits is None:
        if dx is not None:
            dx.addmm_(Bg.t(), A, alpha=scale)
        return scaled_product(Bg, x, A, scale) if needs_A else None  # (r, n)
    dA = torch.zeros_like(A) if needs_A else None
    for start, mask in masks(x, bits):
        part = Bg.narrow(1, start, mask.shape[0])  # (r, rows)
        if dA is not None:
            dA.addmm_(part, _rows(x, start, mask) * mask, alpha=scale)
        if dx is not None:
            _rows(dx, start, mask).addcmul_(part.t() @ A, mask, value=scale)
    return dA
