from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lora_param as lp
from lora_param.weight import adapted

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Linear:
    torch.manual_seed(0)
    model = lp.apply(nn.Linear(6, 4), ["weight"], rank=2)
    with torch.no_grad():
        for p in lp.parameters(model):
            p.normal_()
    return model


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    merge = adapted.merge
    monkeypatch.setattr(adapted, "merge", lambda *a: seen.append(1) or merge(*a))
    return seen


def test_it_builds_once(model: nn.Linear, builds: list[int]) -> None:
    with torch.no_grad():
        expected = model(X)
        assert not builds
        with lp.cached(model):
            for _ in range(5):
                torch.testing.assert_close(model(X), expected)
            assert len(builds) == 1
            assert type(model.weight) is Tensor
        torch.testing.assert_close(model(X), expected)
        assert len(builds) == 1


CHANGES: dict[str, Callable[[nn.Linear], object]] = {
    "a factor": lambda m: m.parametrizations.weight[0].lora_A.add_(1),
    "the base": lambda m: m.parametrizations.weight.original.add_(1),
    "the scale": lambda m: lp.set_scale(m, 0.3),
    "disabled": lp.disable,
    "data swapped": lambda m: setattr(
        m.parametrizations.weight[0].lora_B, "data", torch.randn(4, 2)
    ),
    "a base is loaded": lambda m: m.load_state_dict(nn.Linear(6, 4).state_dict()),
    "a base is assigned": lambda m: m.load_state_dict(nn.Linear(6, 4).state_dict(), assign=True),
    "a second adapter": lambda m: lp.apply(m, ["weight"], rank=1, adapter="b"),
    "removed": lp.remove,
    "baked": lp.bake,
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_never_stale(model: nn.Linear, change: str) -> None:
    with torch.no_grad(), lp.cached(model):
        before = model(X)
        CHANGES[change](model)
        inside = model(X)
    with torch.no_grad():
        torch.testing.assert_close(inside, model(X))
    if change not in ("a second adapter", "baked"):
        assert not torch.equal(inside, before)


def test_an_optimizer_step_within_the_block(model: nn.Linear) -> None:
    optimizer = torch.optim.SGD(lp.parameters(model), lr=0.1)
    with lp.cached(model):
        for _ in range(3):
            with torch.no_grad():
                first = model(X)
            optimizer.zero_grad()
            model(X).square().mean().backward()
            assert all(p.grad is not None and p.grad.any() for p in lp.parameters(model))
            optimizer.step()
            with torch.no_grad():
                assert not torch.equal(model(X), first)


def test_copies_and_threads_have_their_own(model: nn.Linear) -> None:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.parametrizations.weight[0].lora_A.mul_(2)
        expected = model(X), twin(X)
        with lp.cached(model), lp.cached(twin):
            for _ in range(2):
                torch.testing.assert_close((model(X), twin(X)), expected)
    seen: list[type] = []

    def read() -> None:
        with torch.no_grad():
            seen.append(type(model.weight))

    with torch.no_grad(), lp.cached(model):
        assert type(model.weight) is Tensor
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert seen != [Tensor]


def test_inference_mode_does_not_leak(model: nn.Linear) -> None:
    with lp.cached(model):
        with torch.inference_mode():
            assert model.weight.is_inference()
        with torch.no_grad():
            assert not model.weight.is_inference()
        x = X.clone().requires_grad_()
        model.requires_grad_(False)
        model(x).sum().backward()
        assert x.grad is not None


def test_it_ends_on_exceptions(model: nn.Linear) -> None:
    with pytest.raises(ZeroDivisionError), lp.cached(model):
        raise ZeroDivisionError
    with torch.no_grad():
        assert type(model.weight) is not Tensor
