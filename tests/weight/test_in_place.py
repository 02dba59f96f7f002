"""What an operation with an adapted weight gives can be written to in place, as any output can."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from catalogue import CASES, Case, reference_output
from torch import Tensor, nn

import lora_param as lp

VARIANTS = pytest.mark.parametrize("variant", ["lora", "dora", "miss"])


@VARIANTS
def test_an_in_place_activation_after_an_adapted_layer(variant: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    lp.apply(net, "all-linear", rank=2, variant=variant)
    for shape in ((5, 4), (2, 3, 4), (4,)):
        net(torch.randn(shape)).sum().backward()


def _add(y: Tensor) -> Tensor:
    y += torch.linspace(0, 1, y.shape[-1], dtype=y.dtype)
    return y


def _zero(y: Tensor) -> Tensor:
    y[..., 0] = 0
    return y


WRITES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": F.relu_,
    "+=": _add,
    "[]=": _zero,
    "mul_": lambda y: y.mul_(0.5),
    "dropout": lambda y: F.dropout(y, 0.0, inplace=True),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name != "top-level"],  # its tanh keeps what it gave, adapted or not
    ids=lambda case: case.name,
)
def test_every_output_can_be_written_to(case: Case, write: str) -> None:
    data, model = case.data(), case.adapted().eval()
    found = WRITES[write](model(*data))
    with torch.no_grad():
        expected = WRITES[write](reference_output(case, model, data).clone())
        without = WRITES[write](model(*data))
    torch.testing.assert_close(found.detach(), expected, **case.tolerance)
    torch.testing.assert_close(without, expected, **case.tolerance)
    found.square().sum().backward()


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda x, w: x @ w,
    "left": lambda x, w: w @ x[:, :6].mT,
    "addmm": lambda x, w: torch.addmm(torch.ones(6), x, w),
    "mv": lambda x, w: w @ x[0, :6],
    "linear": lambda x, w: F.linear(x[:, :6], w),
    "einsum": lambda x, w: torch.einsum("bi,io->bo", x, w),
    "embedding": lambda x, w: F.embedding(torch.arange(len(x)), w),
}


@VARIANTS
@pytest.mark.parametrize("name", OPERATIONS)
def test_writes_after_an_operation_on_a_bare_weight(name: str, variant: str) -> None:
    torch.manual_seed(0)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(8, 6))
    lp.apply(model, ["w"], rank=2, variant=variant)
    with torch.no_grad():
        for p in lp.parameters(model):
            p.add_(torch.randn_like(p) * 0.3)
    x = torch.randn(3, 8)
    grads = []
    for weight in (model.w, model.w.clone()):
        y = OPERATIONS[name](x, weight)
        y += 1
        y.relu_()
        model.zero_grad()
        y.square().sum().backward()
        grads.append([p.grad.clone() for p in lp.parameters(model)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
