"""`torch.nn.utils.parametrize.cached` on adapted models, and comparisons of adapted weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from catalogue import CASES, Case, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import lora_param as lp
from lora_param.weight import adapted

VARIANTS = pytest.mark.parametrize("variant", ["lora", "dora", "miss"])
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    merge = adapted.merge
    monkeypatch.setattr(adapted, "merge", lambda *a: seen.append(1) or merge(*a))
    return seen


def _layer(variant: str = "lora", dropout: float = 0.0) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    return randomize(lp.apply(layer, ["weight"], rank=2, variant=variant, dropout=dropout))


@VARIANTS
@pytest.mark.parametrize("grad", [True, False])
def test_a_weight_is_computed_once_within_the_block(
    grad: bool, variant: str, builds: list[int]
) -> None:
    layer = _layer(variant)
    with torch.set_grad_enabled(grad), parametrize.cached():
        first = layer.weight
        assert layer.weight is first
        with parametrize.cached():
            layer(X)
        assert layer.weight is first
        assert type(first) is Tensor
        assert first.requires_grad is grad
    assert len(builds) == 1
    assert layer.weight is not first
    assert not parametrize._cache


FULL = [case for case in CASES if case.dtype.itemsize >= 4]  # lower ones round W + ΔW


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.name)
def test_outputs_and_gradients_are_those_outside(case: Case) -> None:
    data, model = case.data(), case.adapted().eval()
    expected = model(*data)
    expected.square().sum().backward()
    grads = [p.grad.clone() for p in lp.parameters(model)]
    model.zero_grad()
    with parametrize.cached():
        with torch.no_grad():
            torch.testing.assert_close(model(*data), expected, **case.tolerance)
        found = model(*data)
        torch.testing.assert_close(found, expected, **case.tolerance)
        found.square().sum().backward()
    for p, grad in zip(lp.parameters(model), grads, strict=True):
        scale = float(grad.abs().max())
        torch.testing.assert_close(p.grad, grad, rtol=1e-2, atol=1e-5 + 1e-2 * scale)


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "a factor": lambda m: m.parametrizations.weight[0].lora_A.add_(1),
    "the base": lambda m: m.parametrizations.weight.original.add_(1),
    "the scale": lambda m: lp.set_scale(m, 0.3),
    "disabled": lp.disable,
    "a second adapter": lambda m: randomize(lp.apply(m, ["weight"], rank=1, adapter="b")),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_it_is_never_stale(change: str, grad: bool) -> None:
    layer = _layer()
    with torch.set_grad_enabled(grad), parametrize.cached():
        before = layer(X)
        with torch.no_grad():
            CHANGES[change](layer)
        inside = layer(X)
    with torch.no_grad():
        torch.testing.assert_close(inside, layer(X))
    assert not torch.equal(inside, before)


def test_training_steps_within_the_block() -> None:
    layer, twin = _layer(), _layer()
    for net, block in ((layer, parametrize.cached()), (twin, lp.cached(twin))):
        optimizer = torch.optim.SGD(lp.parameters(net), lr=0.01)
        with block:
            for _ in range(3):
                net(X).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    for a, b in zip(lp.parameters(layer), lp.parameters(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropout_still_acts() -> None:
    layer = _layer(dropout=0.5)
    with parametrize.cached():
        assert layer.weight is layer.weight
        assert not torch.equal(layer(X), layer(X))
        layer.eval()
        assert type(layer.weight) is Tensor


def test_copies_have_weights_of_their_own() -> None:
    layer = _layer()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.parametrizations.weight[0].lora_A.mul_(2)
        expected = layer(X), twin(X)
        with parametrize.cached():
            for _ in range(2):
                torch.testing.assert_close((layer(X), twin(X)), expected)


def test_a_chain_with_somebody_elses_parametrization() -> None:
    layer = weight_norm(nn.Linear(6, 4))
    randomize(lp.apply(layer, ["weight"], rank=2))
    expected = layer(X)
    with parametrize.cached():
        assert layer.weight is layer.weight
        torch.testing.assert_close(layer(X), expected)


# --- comparisons --------------------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize("grad", [True, False])
def test_comparing_an_adapted_weight_with_a_parameter(grad: bool, variant: str) -> None:
    layer = _layer(variant)
    same = nn.Parameter(layer.weight.clone().detach())
    other = nn.Parameter(same.detach() + 1)
    with torch.set_grad_enabled(grad):
        for a, b in ((layer.weight, same), (same, layer.weight), (layer.weight, layer.weight)):
            torch.testing.assert_close(a, b)
            torch.testing.assert_close([a], [b], rtol=0, atol=0)
            assert torch.allclose(a, b)
            assert torch.equal(a, b)
            assert torch.isclose(a, b).all()
            assert bool((a == b).all())
        for a, b in ((layer.weight, other), (other, layer.weight)):
            assert not torch.allclose(a, b)
            assert not torch.equal(a, b)
            with pytest.raises(AssertionError, match="not close"):
                torch.testing.assert_close(a, b)


def test_weights_that_kernels_are_given_compare_too() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    randomize(lp.apply(layer, ["linear1"], rank=2))
    same = nn.Parameter(layer.linear1.weight.clone().detach())
    with torch.no_grad():
        torch.testing.assert_close(layer.linear1.weight, same)
        torch.testing.assert_close(same, layer.linear1.weight)
        assert torch.equal(layer.linear1.weight, same)
        assert torch.equal(same, layer.linear1.weight)
