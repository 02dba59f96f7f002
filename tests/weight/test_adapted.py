from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
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
    "data =": lambda w: setattr(w, "data", torch.zeros(5, 7)),
    "requires_grad": lambda w: setattr(w, "requires_grad", False),
    "requires_grad_": lambda w: w.requires_grad_(False),
    "out": lambda w: torch.add(torch.ones(5, 7), 1, out=w),
    "data": lambda w: w.data.zero_(),
    "data copy_": lambda w: w.data.copy_(torch.zeros(5, 7)),
    "data iadd": lambda w: w.data.__iadd__(1),
    "data setitem": lambda w: w.data.__setitem__(0, 0),
    "data data =": lambda w: setattr(w.data, "data", torch.zeros(5, 7)),
    "init of data": lambda w: nn.init.normal_(w.data),
    "detach": lambda w: w.detach().fill_(0),
    "detach of data": lambda w: w.data.detach()[1].view(-1).zero_(),
    "activation in place": lambda w: F.relu(w, inplace=True),
    "activation of rows in place": lambda w: F.elu(w[0:2], inplace=True),
    "row": lambda w: w[0].zero_(),
    "row setitem": lambda w: w[0].__setitem__(1, 0),
    "rows": lambda w: w[1:3].zero_(),
    "view": lambda w: w.view(-1).zero_(),
    "reshape": lambda w: w.reshape(7, 5).zero_(),
    "flatten": lambda w: w.flatten().zero_(),
    "transpose": lambda w: w.T.zero_(),
    "transpose of data": lambda w: w.data.T.zero_(),
    "diagonal": lambda w: w.diagonal().zero_(),
    "fill_diagonal_": lambda w: w.detach().fill_diagonal_(0),
    "chunk": lambda w: w.chunk(5)[2].zero_(),
    "chunk of data": lambda w: w.data.chunk(5)[2].zero_(),
    "unbind": lambda w: w.unbind()[0].zero_(),
    "iterate": lambda w: [row.zero_() for row in w],
    "contiguous": lambda w: w.contiguous().zero_(),
    "float": lambda w: w.float().zero_(),
    "narrow": lambda w: w.data.narrow(0, 0, 2).zero_(),
    "unsqueeze": lambda w: w.unsqueeze(0).zero_(),
    "foreach": lambda w: torch._foreach_mul_([w], 0),
    "foreach data": lambda w: torch._foreach_mul_([torch.ones(2), w.data], 0),
    "out data": lambda w: torch.add(torch.ones(5, 7), 1, out=w.data),
    "out row": lambda w: torch.add(torch.ones(7), 1, out=w[0]),
    "outs": lambda w: torch.max(torch.ones(5, 7), 1, out=(w[:, 0], torch.zeros(5).long())),
    "set_": lambda w: w.set_(torch.zeros(5, 7)),
    "set_ data": lambda w: w.data.set_(torch.zeros(5, 7)),
    "swap_tensors": lambda w: torch.utils.swap_tensors(w, torch.zeros(5, 7)),
    "swap_tensors data": lambda w: torch.utils.swap_tensors(w.data, torch.zeros(5, 7)),
    "storage": lambda w: w.untyped_storage().fill_(0),
    "storage of data": lambda w: w.data.untyped_storage().copy_(torch.zeros(35).untyped_storage()),
    "storage setitem": lambda w: w[0].untyped_storage().__setitem__(0, 0),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_writing_into_it_is_refused(
    weight: AdaptedWeight, name: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    before = dense(weight).detach().clone()
    with mode(), pytest.raises(ComputedWeightError, match="would be lost"):
        WRITES[name](weight)
    torch.testing.assert_close(weight.detach(), before)


@pytest.mark.parametrize("read", [lambda w: w.numpy(force=True), lambda w: w.detach().numpy()])
def test_arrays_of_it_are_read_only(
    weight: AdaptedWeight, read: Callable[[Tensor], np.ndarray]
) -> None:
    for array in (read(weight), np.asarray(weight.detach()), weight.data[0].numpy()):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0
    weight.detach().numpy().copy()[:] = 0
    np.asarray(weight.detach(), np.float64)[:] = 0  # copies of their own
    torch.testing.assert_close(weight.detach(), dense(weight).detach())


def test_what_has_memory_of_its_own_is_a_plain_tensor(weight: AdaptedWeight) -> None:
    results = [weight + 1, weight.clone(), weight.double(), weight.sum(0), weight.detach() * 2]
    results += [weight[:, [0, 2]], weight.data.clone(), F.linear(torch.ones(7), weight.detach())]
    results += [torch.stack([weight[0], weight[1]]), weight[torch.tensor([1, 2])], weight[0] + 0]
    results += [copy.deepcopy(weight.data), copy.copy(weight.data).clone()]
    for result in results:
        assert type(result) is Tensor
        result.detach().zero_()
    torch.testing.assert_close(weight.detach(), dense(weight).detach())


def test_a_view_of_it_reads_like_any_tensor(weight: AdaptedWeight) -> None:
    view, want = weight.data, dense(weight).detach()
    assert repr(view) == repr(want)
    assert torch.equal(view, want)
    assert not view.requires_grad
    assert view.is_leaf
    assert view.data_ptr() == view.view(-1).data_ptr()
    buffer = io.BytesIO()
    torch.save({"w": view, "row": view[0]}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded["w"]) is type(loaded["row"]) is Tensor
    assert torch.equal(loaded["w"], want)
    torch.ones(5, 7).copy_(view).add_(view)  # read, not written
    F.linear(view, weight).sum().backward()
    assert weight.updates[0].A.grad is not None


def test_a_view_of_it_can_be_a_leaf_and_a_parameter(weight: AdaptedWeight) -> None:
    leaf = weight.detach().requires_grad_()
    F.linear(torch.ones(7), leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.ones(5, 7))
    leaf.grad = None
    for requires_grad in (True, False):
        parameter = nn.Parameter(weight.data, requires_grad)
        assert type(parameter) is nn.Parameter
        assert parameter.requires_grad is requires_grad
        with torch.no_grad():
            parameter.zero_()
    before = weight.base + 0.5 * (weight.updates[0].B @ weight.updates[0].A)
    torch.testing.assert_close(adapt(weight.base, weight.updates[0]).detach(), before.detach())


def test_gradients_flow_through_views_of_it(weight: AdaptedWeight) -> None:
    A, B = weight.updates[0].A, weight.updates[0].B
    found = torch.autograd.grad(weight[0].view(-1).sin().sum() + weight.view(-1)[3], (A, B))
    W = dense(weight)
    expected = torch.autograd.grad(W[0].view(-1).sin().sum() + W.view(-1)[3], (A, B))
    torch.testing.assert_close(found, expected)


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
