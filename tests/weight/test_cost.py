"""The choice between both ways, at shapes where they were measured (see `tests/bench/cost.py`)."""

from __future__ import annotations

import pytest
import torch

from lora_param.weight.cost import prefers_built
from lora_param.weight.update import Update


def chosen(rows: int, m: int, n: int, r: int, *, dtype: torch.dtype = torch.float32, **how: bool):
    W = torch.empty(m, n, dtype=dtype, device="meta")
    return prefers_built(W, [Update(torch.zeros(r, n), torch.zeros(m, r), 1.0)], rows, m, n, **how)


@pytest.mark.parametrize(("rows", "expected"), [(7, False), (8, False), (9, True)])
@pytest.mark.parametrize("r", [1, 64])
def test_a_kernel_with_its_own_backward_builds_above_as_many_rows_as_inputs(
    rows: int, expected: bool, r: int
) -> None:
    assert chosen(rows, 100, 8, r) is expected


@pytest.mark.parametrize(
    ("rows", "m", "n", "r", "gradient", "expected"),
    [
        (25088, 64, 147, 8, False, True),  # a convolution of 3 to 64 channels, kernel 7
        (25088, 64, 147, 8, True, True),
        (6272, 64, 64, 8, True, True),  # 64 to 64 channels, kernel 1
        (392, 256, 2304, 8, True, False),  # 256 to 256 channels, kernel 3
        (98, 512, 4608, 8, False, False),
        (256, 512, 512, 8, False, False),  # W x
        (2048, 512, 512, 8, False, True),
        (2048, 512, 512, 8, True, False),
        (256, 256, 256, 8, True, False),  # a stack of 256 × 256
    ],
)
def test_elsewhere_what_was_measured_decides(
    rows: int, m: int, n: int, r: int, gradient: bool, expected: bool
) -> None:
    assert chosen(rows, m, n, r, both=True, gradient=gradient) is expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_not_built(dtype: torch.dtype) -> None:
    assert not chosen(1000, 8, 8, 2, dtype=dtype)
