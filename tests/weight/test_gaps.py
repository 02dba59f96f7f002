"""Inputs with gaps in memory, such as transposed ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lora_param as lp


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_fresh_has_torchs_bits_for_an_input_with_gaps(
    variant: str, trains: bool, dtype: torch.dtype, bias: bool
) -> None:
    """Where the weight is frozen torch multiplies such an input batch by batch: LED's encoder."""
    for shape in ((2, 12, 16), (3, 2, 5, 16), (2, 40, 16)):
        torch.manual_seed(0)
        x = torch.randn(shape).transpose(0, 1).to(dtype)
        plain = nn.Linear(16, 16, bias, dtype=dtype).requires_grad_(trains)
        layer = lp.apply(copy.deepcopy(plain), rank=2, variant=variant, freeze=not trains)
        assert torch.equal(layer(x), plain(x)), shape
        with torch.no_grad():
            assert torch.equal(layer(x), plain(x)), shape
