"""x (W + ΔW)ᵀ from W and the factors, with a backward of its own.

What autograd would do with x Wᵀ + scale·(x Aᵀ) Bᵀ is right but wasteful: it adds whole activations
together and keeps what dropout made. Here every product accumulates in place, no m × n matrix is
kept for backward, x is kept once, and each direction chooses between two orders of contraction:

- factored, 2·T·r·(m + n) operations: x Wᵀ, then the skinny products;
- built, 2·m·n·r operations: W + ΔW into a scratch buffer, then one product.

The choice is per shape (RunLoRA, Cherniuk et al. 2023, https://arxiv.org/abs/2312.03415). Products
are oriented for the CPU's libraries: both gradients have the rank as rows of the left operand.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.dropout import draw_bits, keep_probability, masked_blocks
from lora_param.weight.update import Update

__all__ = ["composed_linear", "factored_linear"]

_SCRATCH = 64 << 20  # bytes; the most that a thread keeps for building
_SMALL = 1 << 17  # elements of x, up to which autograd's own operations are quicker
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
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (x, W, *factors))
    if grad and (x.numel() > _SMALL or any(u.dropout for u in updates)):
        return cast(Tensor, _Linear.apply(x, W, bias, updates, *factors))  # type: ignore[no-untyped-call]
    rows = x if x.dim() == 2 else x.reshape(-1, W.shape[1])
    y = (
        _add_each(rows, W, bias, updates, factors)
        if grad
        else _forward(rows, W, bias, updates, factors, None)
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], W.shape[0])


def _add_each(
    x: Tensor, W: Tensor, bias: Tensor | None, updates: Sequence[Update], factors: Sequence[Tensor]
) -> Tensor:
    """y for x (T, n) by operations that autograd records: for few rows, where the time that a
    backward of our own takes to be called is more than what it saves."""
    y = F.linear(x, W, bias)  # (T, m)
    for u, A, B in zip(updates, factors[::2], factors[1::2], strict=True):
        h = F.linear(_of_input(x, u), A)  # (T, r)
        _of_output(y, u).addmm_(h, B.t(), alpha=u.scale)
    return y


def composed_linear(x: Tensor, W: Tensor, bias: Tensor | None, updates: Sequence[Update]) -> Tensor:
    """The same out of torch's own operations, for tracing and for function transforms."""
    y = F.linear(x, W, bias)  # (*, m)
    for u in updates:
        part = x if u.region.columns is None else x[..., slice(*u.region.columns)]
        if u.dropout:
            part = F.dropout(part, u.dropout)
        h = F.linear(part, u.A.to(x.dtype))  # (*, r)
        z = F.linear(h, u.B.to(x.dtype)) * u.scale  # (*, rows)
        if u.region.rows is not None:
            start, stop = u.region.rows
            z = F.pad(z, (start, y.shape[-1] - stop))
        y = y + z
    return y


def _prefers_built(W: Tensor, rows: int, other: int, updates: Sequence[Update]) -> bool:
    """Building W + ΔW is cheaper than `rows` skinny products whose output is (rows, other).

    Both are bound by memory: building reads and writes m × n elements, adding to an output reads
    and writes rows × m. Low precisions are never built: W + ΔW would be rounded.
    """
    if W.dtype not in (torch.float32, torch.float64) or any(u.dropout for u in updates):
        return False
    return rows > other


def _build(W: Tensor, updates: Sequence[Update], factors: Sequence[Tensor]) -> Tensor:
    """W + ΔW, valid until this thread builds the next one. (m, n)"""
    built = _scratch(W)
    if len(updates) == 1 and updates[0].region.is_whole:
        return torch.addmm(W, factors[1], factors[0], alpha=updates[0].scale, out=built)
    built.copy_(W)
    for u, A, B in zip(updates, factors[::2], factors[1::2], strict=True):
        built[u.region.index].addmm_(B, A, alpha=u.scale)
    return built


def _scratch(W: Tensor) -> Tensor:
    """A buffer like W, on a CPU one that a thread uses again: fresh memory costs more to touch
    than the build does. Large weights get memory of their own, which is given back."""
    if W.dim() == 2 and not W.is_contiguous() and W.t().is_contiguous():
        return _scratch(W.t()).t()
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
    """y for x (T, n). `kept` is given x Aᵀ (scaled) and the bits of dropout, for backward."""
    if _prefers_built(W, x.shape[0], W.shape[1], updates):
        if kept is not None:
            kept += [None, None] * len(updates)
        return F.linear(x, _build(W, updates, factors), bias)
    y = F.linear(x, W, bias)  # (T, m)
    for u, A, B in zip(updates, factors[::2], factors[1::2], strict=True):
        part_x, bits = _of_input(x, u), None
        if u.dropout:
            bits = draw_bits(part_x.shape[0], part_x.shape[1], u.dropout, x.device)
        h = _down(part_x, A, bits)  # (T, r)
        _of_output(y, u).addmm_(h, B.t(), alpha=_scale(u))
        if kept is not None:
            kept += [h, bits]
    return y


def _scale(u: Update) -> float:
    """What multiplies B @ A, and makes up for what dropout takes away."""
    return u.scale / keep_probability(u.dropout) if u.dropout else u.scale


def _down(x: Tensor, A: Tensor, bits: Tensor | None) -> Tensor:
    """x Aᵀ, or that of x with its dropped elements zero. (T, r)"""
    if bits is None:
        return x @ A.t()
    if torch.is_grad_enabled():
        return torch.cat([(x[rows] * mask) @ A.t() for rows, mask in masked_blocks(x, bits)])
    h, masked = x.new_empty(x.shape[0], A.shape[0]), None
    for rows, mask in masked_blocks(x, bits):
        masked = _buffer(masked, mask, x)
        torch.mm(torch.mul(x[rows], mask, out=masked), A.t(), out=h[rows])
    return h


def _buffer(last: Tensor | None, mask: Tensor, like: Tensor) -> Tensor:
    """Room for one masked block: the last block's where the shape is the same."""
    return last if last is not None and last.shape == mask.shape else like.new_empty(mask.shape)


class _Linear(torch.autograd.Function):
    """x (W + ΔW)ᵀ + bias: saves x, W and the factors, and x Aᵀ (T, r) where it was computed."""

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
        y = _forward(x.reshape(-1, W.shape[1]), W, bias, updates, factors, kept)
        ctx.updates = updates
        ctx.save_for_backward(x, W, *factors, *kept)
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        updates: Sequence[Update] = ctx.updates
        x, W, *rest = ctx.saved_tensors
        count = 2 * len(updates)
        factors, kept = rest[:count], rest[count:]
        needs_x, needs_W, needs_bias, _, *needs = ctx.needs_input_grad
        x2 = x.reshape(-1, W.shape[1])  # (T, n)
        g = grad.reshape(-1, W.shape[0])  # (T, m)
        again = torch.is_grad_enabled()  # a graph of this backward: nothing may be cut off
        built = not again and _prefers_built(W, g.shape[0], W.shape[0], updates)
        dx: Tensor | None = None
        if needs_x:
            dx = g @ (_build(W, updates, factors) if built else W)  # (T, n)
        grads: list[Tensor | None] = []
        for i, u in enumerate(updates):
            A, B = factors[2 * i : 2 * i + 2]
            h, bits = kept[2 * i : 2 * i + 2]
            needs_A, needs_B = needs[2 * i : 2 * i + 2]
            part_g, part_x = _of_output(g, u), _of_input(x2, u)
            dA = dB = None
            if needs_A or (needs_x and not built):
                gB = part_g @ B  # (T, r)
                into = None if dx is None or built else _of_input(dx, u)
                dA = _through_A(gB, A, part_x, into, bits, _scale(u), needs_A)
            if needs_B:
                if h is None or again:
                    h = _down(part_x, A, bits)
                dB = (h.t() @ part_g).mul_(_scale(u)).t()  # (m, r)
            grads += [dA, dB]
        dW = g.t() @ x2 if needs_W else None  # (m, n)
        dbias = g.sum(0) if needs_bias else None  # (m,)
        if dx is not None:
            dx = dx.view(x.shape)
        return dx, dW, dbias, None, *grads


def _through_A(
    gB: Tensor,
    A: Tensor,
    x: Tensor,
    dx: Tensor | None,
    bits: Tensor | None,
    scale: float,
    needs_A: bool,
) -> Tensor | None:
    """dA = scale·(g B)ᵀ x, and scale·(g B) A added to dx, both under the mask of dropout."""
    if bits is None:
        if dx is not None:
            dx.addmm_(gB, A, alpha=scale)
        return (gB.t() @ x).mul_(scale) if needs_A else None  # (r, n)
    dA, block = torch.zeros_like(A) if needs_A else None, None
    for rows, mask in masked_blocks(x, bits):
        if torch.is_grad_enabled():
            masked, through = x[rows] * mask, (gB[rows] @ A) * mask
            dA = None if dA is None else dA.addmm_(gB[rows].t(), masked, alpha=scale)
            if dx is not None:
                dx[rows].add_(through, alpha=scale)
            continue
        block = _buffer(block, mask, x)
        if dA is not None:
            dA.addmm_(gB[rows].t(), torch.mul(x[rows], mask, out=block), alpha=scale)
        if dx is not None:
            dx[rows].add_(torch.mm(gB[rows], A, out=block).mul_(mask), alpha=scale)
    return dA
