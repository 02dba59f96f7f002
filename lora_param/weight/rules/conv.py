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
from lora_param.weight.rules.common import factored, lowered
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


def _pointwise(matrix: Tensor, spatial: int) -> Tensor:
    """The kernel that multiplies the channels of each position with a matrix."""
    return matrix.reshape(*matrix.shape, *[1] * spatial)


def _rule(conv: _Conv, spatial: int) -> Callable[..., Any]:
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
        _, n, *k = V.base.shape
        places = stride, padding, dilation

        def base(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
            return conv(x, W, b, *places)  # (*, out, S')

        def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            h = conv(x, A.reshape(A.shape[0], -1, *k), None, *places)  # (*, r, S')
            return conv(h, _pointwise(B, spatial))  # (*, out, S')

        rows, dim = _rows(input, V, stride, n), -spatial - 1
        shift = None if bias is None else bias.reshape(-1, *[1] * spatial)
        return factored(V, input, base, product, bias, rows=rows, dim=dim, added=shift)

    return rule


def _transposed_rule(conv: _Conv, spatial: int) -> Callable[..., Any]:
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
        m, _, *k = V.base.shape
        places = stride, padding, output_padding, 1, dilation

        def base(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
            return conv(x, W, b, *places)  # (*, out, S')

        def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            h = _CONV[spatial](x, _pointwise(B.t(), spatial))  # (*, r, S)
            return conv(h, A.reshape(A.shape[0], -1, *k), None, *places)  # (*, out, S')

        rows, dim = _rows(input, V, 1, m), -spatial - 1
        return factored(V, input, base, product, bias, rows=rows, dim=dim, by_rows=True)

    return rule


for _spatial, _conv in _CONV.items():
    implements(_conv)(_rule(_conv, _spatial))
for _spatial, _conv in _TRANSPOSED.items():
    implements(_conv)(_transposed_rule(_conv, _spatial))
