"""Dropout outside of the kernels: the same bits as inside of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rules_samples import STACK, make, normal
from torch import Tensor

from lora_param.targets.regions import WHOLE, Region
from lora_param.weight.dropout import draw_bits, dropout, keep_probability, masks


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 5), (0, 4), (3, 0)])
def test_it_drops_by_the_bits_and_scales_up(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x, 0.3)
    torch.manual_seed(3)
    rows = x.detach().reshape(-1, shape[-1]) if x.numel() else x.detach()
    parts = [m for _, m in masks(rows, draw_bits(*rows.shape, 0.3, x.device))]
    mask = torch.cat(parts).reshape(shape) if parts else torch.ones(shape)
    torch.testing.assert_close(y, x * mask / keep_probability(0.3))
    torch.manual_seed(3)
    assert not x.numel() or torch.autograd.gradcheck(_repeated, (x,))
    assert not x.numel() or torch.autograd.gradgradcheck(_repeated, (x,))


def _repeated(x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return dropout(x, 0.3)


RULES: dict[str, tuple[tuple[int, ...], list[Region], Callable[[Any], Tensor], tuple[int, ...]]] = {
    "conv": ((8, 16, 3, 3), [WHOLE], lambda w: lambda x: F.conv2d(x, w), (2, 16, 9, 9)),
    "transposed": ((16, 8, 3), [WHOLE], lambda w: lambda x: F.conv_transpose1d(x, w), (2, 16, 9)),
    "left": ((8, 16), [WHOLE], lambda w: lambda x: w @ x, (16, 50)),
    "right stack": ((3, 16, 8), [STACK], lambda w: lambda x: torch.bmm(x, w), (3, 50, 16)),
    "einsum": ((8, 16), [WHOLE], lambda w: lambda x: torch.einsum("ni,oi->no", x, w), (50, 16)),
}


@pytest.mark.parametrize("rule", list(RULES))
def test_no_rule_keeps_a_mask_of_numbers(rule: str) -> None:
    shape, regions, operation, inputs = RULES[rule]
    w, x = make(shape, regions, dropout=0.5), normal(*inputs)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        operation(w)(x)
    storages = {t.untyped_storage().data_ptr() for t in kept if t.numel() == x.numel()}
    # x itself, and what dropout made of it, which the product with A keeps
    assert len(storages) <= 2
