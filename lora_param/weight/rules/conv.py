"""Convolutions of one group: with W, and with A and then B.

A (r, in·k) is a convolution of its own with r outputs, under the same stride, padding and
dilation, and B (out, r) mixes these at each position. Transposed convolutions store their weight
the other way round, (in, out, k), so that B comes first. A grouped or depthwise weight builds: its
update mixes across groups in the rows' order, which is no convolution of low rank, and the weight
is small.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lora_param.weight.adapted import AdaptedWeight, implements
from lora_param.weight.factored import rescale
from lora_param.weight.rules.common import (
    add_into,
    autocast,
    built,
    dense_is_cheaper,
    factors,
    lowered,
    part,
    part_of_input,
)
from lora_param.weight.update import NormalForm

__all__: list[str] = []

_Conv = Callable[..., Tensor]
_CONV: dict[int, _Conv] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, _Conv] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def _rows(x: Tensor, weight: NormalForm, stride: Any, channels: int) -> int:
    """About the number of positions that the kernel is put on."""
    spatial = weight.base.dim() - 2
    steps = stride if isinstance(stride, int) else prod(stride)
    steps = steps**spatial if isinstance(stride, int) or len(stride) == 1 else steps
    return int(x.numel() // max(channels * steps, 1))


def _applying(input: Any, weight: Any, bias: Any, groups: Any) -> NormalForm | None:
    """The weight in normal form, where the rule applies."""
    if isinstance(bias, AdaptedWeight) or not isinstance(input, Tensor) or groups != 1:
        return None
    if any(u.region.stacked for u in getattr(weight, "updates", ())):
        return None
    return lowered(weight)


def _over_channels(t: Tensor, spatial: int) -> Tensor:
    """A number for each channel, to be multiplied with (*, channels, S)."""
    return t.reshape(-1, *[1] * spatial)


def _rule(conv: _Conv, spatial: int) -> Callable[..., Any]:
    channel = -spatial - 1

    def rule(
        input: Any,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        """x ∗ (W + ΔW) as x ∗ W + scale·B (x ∗ A). x (*, in, S) → (*, out, S')."""
        V = _applying(input, weight, bias, groups)
        if V is None:
            return NotImplemented
        x, (m, n, *k) = built(input), V.base.shape
        if dense_is_cheaper(V, _rows(x, V, stride, n), m, n * prod(k)):
            return NotImplemented
        x, W, bias = autocast(x, V.base, bias)
        y = conv(x, W, bias, stride, padding, dilation)  # (*, out, S')
        if V.alpha is not None:
            shift = None if bias is None else _over_channels(bias, spatial)
            y = rescale(y, shift, _over_channels(V.alpha, spatial))
        for u in V.updates:
            A, B = factors(u, x.dtype)
            A = A.reshape(A.shape[0], -1, *k)  # (r, in, k)
            h = conv(part_of_input(x, u, channel), A, None, stride, padding, dilation)  # (*, r, S')
            z = conv(h, B.reshape(*B.shape, *[1] * spatial))  # (*, out, S')
            y = add_into(y, z, u.scale, u.region.rows, channel)
        return y

    return rule


def _transposed_rule(conv: _Conv, spatial: int) -> Callable[..., Any]:
    channel = -spatial - 1

    def rule(
        input: Any,
        weight: Any,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        """x ∗ᵀ (W + ΔW) as x ∗ᵀ W + scale·(Bᵀ x) ∗ᵀ A. x (*, in, S) → (*, out, S')."""
        V = _applying(input, weight, bias, groups)
        if V is None:
            return NotImplemented
        x, (m, n, *k) = built(input), V.base.shape
        if dense_is_cheaper(V, _rows(x, V, 1, m), m, n * prod(k)):
            return NotImplemented
        x, W, bias = autocast(x, V.base, bias)
        scaled = x if V.alpha is None else (x * _over_channels(V.alpha, spatial)).to(x.dtype)
        y = conv(scaled, W, bias, stride, padding, output_padding, 1, dilation)  # (*, out, S')
        for u in V.updates:
            A, B = factors(u, x.dtype)
            A = A.reshape(A.shape[0], -1, *k)  # (r, out, k)
            read = part(x, u.region.rows, channel)
            if u.dropout:
                read = F.dropout(read, u.dropout)
            h = _CONV[spatial](read, B.t().reshape(*B.t().shape, *[1] * spatial))  # (*, r, S)
            z = conv(h, A, None, stride, padding, output_padding, 1, dilation)  # (*, out, S')
            y = add_into(y, z, u.scale, u.region.columns, channel)
        return y

    return rule


for _spatial, _conv in _CONV.items():
    implements(_conv)(_rule(_conv, _spatial))
for _spatial, _conv in _TRANSPOSED.items():
    implements(_conv)(_transposed_rule(_conv, _spatial))
