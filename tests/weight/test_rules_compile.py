"""Rules under torch.compile: what torch.compile does not ask a rule for, it would take for W."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_param as lp

offs = torch.tensor([2, 2, 7], dtype=torch.int32)
ids = torch.tensor([[1, 1, 4], [0, 2, 1]])

OPERATIONS = {  # target, weight, what is done, x
    "right": ("w", (5, 4), lambda w, x: x @ w, (3, 5)),
    "transpose": ("w", (4, 5), lambda w, x: x @ w.T, (3, 5)),
    "left": ("w", (4, 3), lambda w, x: w @ x, (3, 5)),
    "addmm": ("w", (5, 4), lambda w, x: torch.addmm(torch.zeros(4), x, w), (3, 5)),
    "slice": ("w", (6, 5), lambda w, x: F.linear(x, w[1:4]), (3, 5)),
    "chunk": ("w[1:3]", (6, 5), lambda w, x: F.linear(x, w.chunk(2)[0]), (3, 5)),
    "einsum": ("w", (4, 5), lambda w, x: torch.einsum("bi,oi->bo", x, w), (3, 5)),
    "conv": ("w[1:3]", (4, 5, 3), lambda w, x: F.conv1d(x, w, padding=1), (2, 5, 7)),
    "conv transposed": ("w", (5, 4, 3), lambda w, x: F.conv_transpose1d(x, w), (2, 5, 7)),
    "embedding": ("w", (9, 4), lambda w, _: F.embedding(ids, w, 2), (1,)),
    "embedding bag": ("w", (9, 4), lambda w, _: F.embedding_bag(ids, w), (1,)),
    "bmm": ("w[*]", (3, 5, 4), lambda w, x: torch.bmm(x, w), (3, 2, 5)),
    "expert": ("w[*]", (3, 5, 4), lambda w, x: x @ w[1], (2, 5)),
    "unbind": ("w[*]", (3, 5, 4), lambda w, x: x @ w.unbind()[1], (2, 5)),
    "lstm cell": ("w", (16, 4), lambda w, x: torch.lstm_cell(x, (x, x), w, w)[0], (3, 4)),
    "gru cell": ("w", (12, 4), lambda w, x: torch.gru_cell(x, x, w, w), (3, 4)),
    "grouped": ("w[*]", (3, 8, 16), lambda w, x: F.grouped_mm(x, w, offs=offs), (7, 8)),
}
if not hasattr(F, "grouped_mm"):
    del OPERATIONS["grouped"]


class Model(nn.Module):
    def __init__(self, shape: tuple[int, ...], operation: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.w, x)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_is_eager(name: str) -> None:
    target, shape, operation, x_shape = OPERATIONS[name]
    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "grouped" else torch.float32  # all that its tracing takes
    model = lp.apply(Model(shape, operation).to(dtype), [target], rank=2)
    factors = list(lp.parameters(model))
    with torch.no_grad():
        for p in factors:
            p.normal_()
    x = torch.randn(x_shape, dtype=dtype)
    expected = model(x)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), factors),
        torch.autograd.grad(expected.square().sum(), factors),
    )
