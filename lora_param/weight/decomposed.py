"""x W'ᵀ for DoRA's W' = m ∘ V / ‖V‖ with V = W + scale·(B @ A), with a backward of its own.

With c = m / ‖V‖ and u = x Vᵀ the output is c ∘ u. V is not formed for it, u is kept for the
gradient of c, and the norms take one more skinny product with W in each direction; backward, where
x has few rows, it rides along in the product that gives dx.

It covers one DoRA of a whole frozen weight at full strength; everything else is lowered.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.cost import prefers_built
from lora_param.weight.dora import row_cross, row_norms, row_ratios
from lora_param.weight.dropout import draw_bits
from lora_param.weight.factored import (
    down,
    own_scale,
    rescale,
    scaled_product,
    scratch,
    through_A,
)
from lora_param.weight.update import Update

__all__ = ["decomposed_linear"]

_FEW = 512  # rows of x up to which the gradient of the norms rides along with dx
_CACHED = 1 << 16  # elements of a product that stay in a core's cache


def decomposed_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, u: Update, magnitude: Tensor, squares: Tensor
) -> Tensor:
    """x (m ∘ V / ‖V‖)ᵀ + bias.

    Args:
        x: input of shape (*, n).
        W: frozen weight of shape (m, n), of x's dtype.
        bias: shape (m,), or None.
        u: A, B and scale, in the dtype of the norms, and dropout.
        magnitude: shape (m,), in the dtype of the norms.
        squares: `row_squares(W)`. (m,)

    Returns:
        Shape (*, m).
    """
    A, B = u.A, u.B
    trained = (x, A, B, magnitude, *(() if bias is None else (bias,)))
    if torch.is_grad_enabled() and any(t.requires_grad for t in trained):
        y = cast(Tensor, _Decomposed.apply(x, W, bias, A, B, magnitude, squares, u))  # type: ignore[no-untyped-call]
        return y if x.dim() == 2 else y.view(*x.shape[:-1], W.shape[0])
    rows = x.reshape(-1, W.shape[1])
    ratios = row_ratios(W, A, B, magnitude, u.scale, squares)
    if prefers_built(W, (u,), rows.shape[0], *W.shape):
        y = F.linear(rows, _build(W, A, B, ratios, u.scale), bias)
    else:
        y = rescale(_undivided(rows, W, bias, A, B, u, _draw(rows, u))[0], bias, ratios)
    return y.view(*x.shape[:-1], W.shape[0])


def _draw(x: Tensor, u: Update) -> Tensor | None:
    """Which elements of x (T, n) its dropout keeps."""
    return draw_bits(x.shape[0], x.shape[1], u.dropout, x.device) if u.dropout else None


def _build(W: Tensor, A: Tensor, B: Tensor, ratios: Tensor, scale: float) -> Tensor:
    """c ∘ V, valid until this thread builds the next one. (m, n)"""
    built = torch.mul(W, ratios.unsqueeze(-1), out=scratch(W))
    return built.addmm_(B * ratios.unsqueeze(-1), A, alpha=scale)


def _undivided(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    u: Update,
    bits: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x Vᵀ + b (T, m) for x (T, n), and A xᵀ (r, T); x without what `bits` drop, before A."""
    y = F.linear(x, W, bias)  # (T, m)
    Ax = down(x, A.to(x.dtype), bits)  # (r, T)
    return y.addmm_(Ax.t(), B.to(x.dtype).t(), alpha=own_scale(u)), Ax


class _Decomposed(torch.autograd.Function):
    """Saves x, W, the factors, A xᵀ (r, T), and the output before it is rescaled (T, m)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        squares: Tensor,
        u: Update,
    ) -> Tensor:
        scale, rows = u.scale, x.reshape(-1, W.shape[1])
        cross, gram = row_cross(W, A), A @ A.t()  # (m, r), (r, r)
        slope = torch.addmm(cross, B, gram, alpha=scale)  # (m, r): half of what moves ‖V‖² / scale
        total = torch.add(squares, cross.add_(slope).mul_(B).sum(-1), alpha=scale)
        norms = row_norms(total)  # (m,)
        ratios = magnitude / norms
        bits = _draw(rows, u)
        before, Ax = _undivided(rows, W, bias, A, B, u, bits)
        ctx.update = u
        ctx.save_for_backward(
            x, W, bias, A, B, magnitude, squares, slope, norms, ratios, before, Ax, bits
        )
        return rescale(before, bias, ratios)  # (T, m), no view, which could not be written to

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            return _through_a_graph(ctx, grad)
        u: Update = ctx.update
        x, W, bias, A, B, _, _, slope, norms, ratios, before, Ax, bits = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B, needs_magnitude, _, _ = ctx.needs_input_grad
        rows = x.reshape(-1, W.shape[1])  # (T, n)
        g = grad  # (T, m)
        dbias = g.sum(0) if bias is not None else None  # (m,)
        of_ratios = _column_dots(g, before)  # (m,)
        if dbias is not None:
            of_ratios = of_ratios - bias * dbias
        # d‖V‖² by B is 2·scale·slope, by A it is 2·scale·Bᵀ V; and c = m / ‖V‖.
        weight = (of_ratios * ratios / (norms * norms)).mul_(-u.scale).unsqueeze(-1)  # (m, 1)
        scaled_B = B * ratios.unsqueeze(-1)  # (m, r)
        weighted = (B * weight).t()  # (r, m)
        dB: Tensor | None = None
        if needs_B:
            direct = scaled_product(Ax, g, Ax.new_empty(B.t().shape), own_scale(u)).t()  # (m, r)
            dB = torch.addcmul(slope * weight, direct.to(B.dtype), ratios.unsqueeze(-1))
        dx: Tensor | None = None
        dA: Tensor | None = None
        of_norms: Tensor | None = None
        built = prefers_built(W, (u,), g.shape[0], W.shape[1], W.shape[0])
        narrow = weighted.to(W.dtype)
        if needs_x and needs_A and not built and g.shape[0] <= _FEW:
            both = torch.cat([(g * ratios).to(W.dtype), narrow]) @ W  # (T + r, n)
            dx, of_norms = both[: g.shape[0]], both[g.shape[0] :]
        else:
            if needs_x and built:
                dx = g @ _build(W, A, B, ratios, u.scale)  # (T, n)
            elif needs_x:
                dx = (g * ratios).to(W.dtype) @ W  # (T, n)
            if needs_A:
                of_norms = narrow @ W  # (r, n)
        if needs_x or needs_A:
            Bg = scaled_B.to(g.dtype).t() @ g.t()  # (r, T)
            into = None if built else dx
            dA = through_A(Bg, A.to(g.dtype), rows, into, bits, own_scale(u), needs_A)
        if dA is not None and of_norms is not None:
            dA = torch.addmm(of_norms.to(A.dtype), weighted @ B, A, alpha=u.scale).add_(dA)
        return (
            None if dx is None else dx.view(x.shape),
            None,
            dbias if needs_bias else None,
            dA,
            dB,
            of_ratios / norms if needs_magnitude else None,
            None,
            None,
        )


def _through_a_graph(ctx: Any, grad: Tensor) -> Any:
    """Gradients that can be differentiated again: those of torch's own operations."""
    u: Update = ctx.update
    x, W, bias, A, B, magnitude, squares, *_, bits = ctx.saved_tensors
    inputs = (x, W, bias, A, B, magnitude)
    rows = x.reshape(-1, W.shape[1])
    ratios = row_ratios(W, A, B, magnitude, u.scale, squares)
    y = rescale(_undivided(rows, W, bias, A, B, u, bits)[0], bias, ratios)
    asked = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(y.view(grad.shape), asked, grad, create_graph=True))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:6]), None, None


def _column_dots(a: Tensor, b: Tensor) -> Tensor:
    """Σ over rows of a ∘ b, in fp32 at least. (T, m), (T, m) → (m,)

    On a CPU in blocks of rows that stay in its cache.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    step = max(1, _CACHED // a.shape[1])
    if a.device.type != "cpu" or a.shape[0] <= step:
        return (a * b).sum(0, dtype=wide)
    parts = zip(torch.split(a, step), torch.split(b, step), strict=True)
    return torch.stack([(x * y).sum(0, dtype=wide) for x, y in parts]).sum(0)
