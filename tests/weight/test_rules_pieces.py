"""The matrices of a stack of experts, read one by one."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalogue import randomize
from rules_samples import counting_builds
from torch import Tensor, nn

import lora_param as lp
from lora_param.errors import ComputedWeightError
from lora_param.weight import pieces as built_pieces
from lora_param.weight.adapted import AdaptedWeight

VARIANTS = pytest.mark.parametrize("variant", ["lora", "dora", "miss"])
READERS: dict[str, Callable[[Tensor], Iterator[Tensor]]] = {
    "int": lambda w: (w[i] for i in range(len(w))),
    "negative": lambda w: (w[i - len(w)] for i in range(len(w))),
    "tensor": lambda w: (w[torch.tensor(i)] for i in range(len(w))),
    "select": lambda w: (w.select(0, i) for i in range(len(w))),
    "unbind": lambda w: iter(w.unbind()),
    "iter": iter,
    "with a slice": lambda w: (w[i, :] for i in range(len(w))),
}


def _stack(variant: str = "lora", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(4, 6, 5))
    return randomize(lp.apply(model, ["w[*]"], rank=2, variant=variant, **options))


def _product(weights: Iterator[Tensor], x: Tensor) -> Tensor:
    return torch.stack([F.linear(x, w) for w in weights])


@VARIANTS
@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("small", [True, False])
def test_experts_one_by_one_are_those_of_a_plain_stack(
    monkeypatch: pytest.MonkeyPatch, small: bool, read: str, variant: str
) -> None:
    if not small:
        monkeypatch.setattr(built_pieces, "_READ", 0)
    model, x = _stack(variant), torch.randn(3, 5)
    grads = []
    for w in (model.w, model.w.clone()):
        y = _product(READERS[read](w), x)
        y.square().sum().backward()
        grads.append((y.detach(), [p.grad.clone() for p in lp.parameters(model)]))
        model.zero_grad()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(_product(READERS[read](model.w), x), grads[1][0])


def test_a_small_stack_is_built_once_and_a_large_one_never(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _stack()
    weight = model.w
    assert weight[0] is weight[-4]
    monkeypatch.setattr(built_pieces, "_READ", 0)
    with counting_builds() as asked:
        for matrix in _stack().w:
            assert isinstance(matrix, AdaptedWeight)
            F.linear(torch.randn(3, 5), matrix)
    assert not asked


def test_a_stack_is_built_once_enough_of_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _stack().w
    monkeypatch.setattr(built_pieces, "_READ", weight.numel() // 2)
    assert isinstance(weight[0], AdaptedWeight)
    assert not isinstance(weight[0], AdaptedWeight)


def test_a_fresh_stack_has_the_bits_of_its_base() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(4, 6, 5))
    base = model.w.detach().clone()
    lp.apply(model, ["w[*]"], rank=2)
    for a, b in zip(model.w, base, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grad", [True, False])
def test_what_was_read_follows_the_factors(grad: bool) -> None:
    model = _stack()
    weight = model.w
    with torch.set_grad_enabled(grad):
        before = weight[1].clone()
        with torch.no_grad():
            for p in lp.parameters(model):
                p.add_(0.5)
        assert not torch.equal(weight[1], before)
        torch.testing.assert_close(weight[1], model.w.clone()[1])
    with torch.set_grad_enabled(not grad):
        assert weight[1].requires_grad is not grad


def test_low_precision_and_dropout_stay_factored() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(4, 6, 5).bfloat16())
    assert isinstance(lp.apply(model, ["w[*]"], rank=2).w[0], AdaptedWeight)
    assert isinstance(_stack(dropout=0.5).w[0], AdaptedWeight)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.ones(6, 5)),
    "init": nn.init.zeros_,
    "[]=": lambda w: w.__setitem__(0, 1.0),
    "+=": lambda w: w.__iadd__(1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_matrix_cannot_be_written_to(write: str) -> None:
    model = _stack()
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ComputedWeightError, match="writes into"):
            WRITES[write](model.w[0])


def test_a_matrix_is_copied_and_saved_as_a_plain_tensor() -> None:
    with torch.no_grad():
        matrix = _stack().w[0]
    file = io.BytesIO()
    torch.save(matrix, file)
    file.seek(0)
    for twin in (copy.deepcopy(matrix), torch.load(file)):
        assert type(twin) is Tensor
        assert torch.equal(twin, matrix)
