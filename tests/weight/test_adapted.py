from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_param.weight.rules  # noqa: F401
from lora_param.errors import BelowAutogradError, ComputedWeightError
from lora_param.weight.adapted import AdaptedWeight, adapt
from lora_param.weight.update import Update


@pytest.fixture
def weight() -> AdaptedWeight:
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(5, 7), requires_grad=False)
    A, B = nn.Parameter(torch.randn(2, 7)), nn.Parameter(torch.randn(5, 2))
    return adapt(W, Update(A, B, 0.5))


def dense(w: AdaptedWeight) -> Tensor:
    return w.base + 0.5 * (w.updates[0].B @ w.updates[0].A)


def test_it_reads_as_a_tensor(weight: AdaptedWeight) -> None:
    assert isinstance(weight, Tensor)
    assert weight.shape == (5, 7)
    assert weight.size(0) == len(weight) == 5
    assert weight.stride() == (7, 1)
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert weight.ndim == weight.dim() == 2
    assert weight.numel() == 35
    assert weight.is_floating_point()
    assert weight.requires_grad
    assert not weight.is_leaf
    assert weight.grad is None
    assert weight.grad_fn is not None
    assert "AdaptedWeight" in repr(weight)
    with torch.no_grad():
        assert not weight.requires_grad


OPERATIONS = {
    "add": lambda w: w + 1,
    "radd": lambda w: torch.ones(5, 7) + w,
    "matmul": lambda w: torch.ones(3, 5) @ w,
    "transpose": lambda w: w.T @ torch.ones(5, 2),
    "index": lambda w: w[1:3, ::2],
    "sum": lambda w: w.sum(0),
    "norm": lambda w: w.norm(),
    "clone": lambda w: w.clone(),
    "float": lambda w: w.double(),
    "view": lambda w: w.view(7, 5),
    "stack": lambda w: torch.stack([w, w]),
    "cat": lambda w: torch.cat((w, torch.ones(1, 7))),
    "einsum": lambda w: torch.einsum("oi,bi->bo", w, torch.ones(2, 7)),
    "chunk": lambda w: w.chunk(5)[2],
    "where": lambda w: torch.where(w > 0, w, torch.zeros(())),
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "contiguous": lambda w: w.contiguous(),
    "as operand": lambda w: torch.ones(5, 7).add_(w.detach()),
    "linear input": lambda w: F.linear(w, torch.ones(2, 7)),
    "both": lambda w: F.linear(w, w),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_sees_the_sum(weight: AdaptedWeight, name: str) -> None:
    torch.testing.assert_close(OPERATIONS[name](weight), OPERATIONS[name](dense(weight)))


def test_gradients_flow_through_whatever_builds_it(weight: AdaptedWeight) -> None:
    A, B = weight.updates[0].A, weight.updates[0].B
    found = torch.autograd.grad(weight.sin().sum(), (A, B))
    expected = torch.autograd.grad(dense(weight).sin().sum(), (A, B))
    torch.testing.assert_close(found, expected)


def test_many_reads_cost_one_build(weight: AdaptedWeight) -> None:
    assert weight.build() is weight.build()
    with torch.no_grad():
        assert not weight.build().requires_grad
    assert weight.build().requires_grad


WRITES = {
    "add_": lambda w: w.add_(1),
    "iadd": lambda w: w.__iadd__(1),
    "copy_": lambda w: w.copy_(torch.zeros(5, 7)),
    "setitem": lambda w: w.__setitem__(0, 0),
    "init": nn.init.zeros_,
    "init kaiming": nn.init.kaiming_uniform_,
    "data": lambda w: setattr(w, "data", torch.zeros(5, 7)),
    "requires_grad": lambda w: setattr(w, "requires_grad", False),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "out": lambda w: torch.add(torch.ones(5, 7), 1, out=w),
}


@pytest.mark.parametrize("name", WRITES)
def test_writing_into_it_is_refused(weight: AdaptedWeight, name: str) -> None:
    with torch.no_grad(), pytest.raises(ComputedWeightError, match="would be lost"):
        WRITES[name](weight)


def test_below_autograd_a_gradient_is_never_lost(weight: AdaptedWeight) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        with pytest.raises(BelowAutogradError, match="lose the gradients"):
            torch.sin(weight)
        with torch.no_grad():
            torch.testing.assert_close(torch.sin(weight), dense(weight).sin())


def test_copies_and_pickles(weight: AdaptedWeight) -> None:
    for twin in (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))):
        assert torch.equal(twin.build(), weight.build())
        with torch.no_grad():
            twin.updates[0].A.zero_()
        assert not torch.equal(twin.detach(), weight.detach())


def test_linear_does_not_build_it(weight: AdaptedWeight) -> None:
    x = torch.randn(3, 7)
    torch.testing.assert_close(F.linear(x, weight), F.linear(x, dense(weight)))
    assert not weight._built
