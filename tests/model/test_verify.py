"""`verify` passes what trains as LoRA should, fails what does not, and leaves no trace."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from catalogue import CASES, Case
from rich.console import Console
from torch import Tensor, nn

import lora_param as lp
from lora_param.errors import (
    ModelError,
    NoAdapterError,
    NoMatchError,
    OptionError,
    VerificationError,
)


class Net(nn.Module):
    """A little of everything that a training step changes: BatchNorm, dropout, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.norm = nn.BatchNorm1d(24)
        self.dropout = nn.Dropout(0.2)
        self.second = nn.Linear(24, 24)
        self.unused = nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)
        self.calls = 0
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.mean()  # another object at each call
        return self.head(self.dropout(self.second(self.norm(self.first(x)).relu()).relu()))


def net(*targets: str, train: bool = False, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return lp.apply(Net(), list(targets or ("first", "second")), rank=1, **kwargs).train(train)


def loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(16, 24, generator=generator)
    return F.cross_entropy(model(x), torch.arange(16) % 3)


def failed(found: lp.Verification) -> list[str]:
    return [check.name for check in found.failures]


ANY = {"max_percent": 100.0, "besides": "last"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_passes_what_is_healthy(case: Case) -> None:
    model, data = case.apply(case.build()), case.data()

    def distance(model: nn.Module) -> Tensor:
        outputs = model(*data)
        return (
            (outputs - torch.arange(outputs.numel()).reshape(outputs.shape).cos()).square().mean()
        )

    found = lp.verify(model, distance, max_percent=1000)
    assert found.passed, str(found)
    assert len(found.checks) == 6
    assert found.losses[-1] < found.losses[0]
    found.raise_for_failure()


def test_a_trained_head_is_allowed_by_name() -> None:
    model = net()
    model.head.requires_grad_(True)
    assert failed(lp.verify(model, loss, **ANY)) == ["frozen"]
    assert set(lp.verify(model, loss, **ANY)["frozen"].failed) == {"head.weight", "head.bias"}
    assert lp.verify(model, loss, max_percent=100, besides=["last", "head.*"]).passed


def test_a_head_that_was_meant_to_train_and_is_frozen_is_named() -> None:
    found = lp.verify(net(), loss, max_percent=100, besides=["last", "head.*"])
    assert failed(found) == ["frozen"]
    assert list(found["frozen"].failed) == ["head.*"]


def test_a_zero_head_trains_along() -> None:
    model = net()
    model.head.requires_grad_(True)
    nn.init.zeros_(model.head.weight)
    assert lp.verify(model, loss, max_percent=100, besides=["last", "head.*"]).passed
    assert not model.head.weight.any()


def test_a_share_that_is_too_large() -> None:
    found = lp.verify(net(), loss, besides="last", max_percent=4)
    assert failed(found) == ["share"]
    factors = 2 * (24 + 24)
    base = sum(p.numel() for p in Net().parameters())
    assert found.percent == pytest.approx(100 * factors / base)
    assert f"{factors} of {base:,}" in found["share"].found


def test_base_weights_that_train() -> None:
    model = net(freeze=False)
    model.norm.requires_grad_(False)
    found = lp.verify(model, loss, besides="last", max_percent=200)
    assert failed(found) == ["frozen"]
    names = {f"{n}.{p}" for n in ("first", "second", "unused", "head") for p in ("weight", "bias")}
    assert set(found["frozen"].failed) == names


def test_a_target_that_forward_does_not_use() -> None:
    found = lp.verify(net("first", "unused"), loss, **ANY)
    assert failed(found) == ["gradients"]
    assert found["gradients"].failed == {
        "unused.weight.lora_A": "no gradient",
        "unused.weight.lora_B": "no gradient",
    }


def test_a_target_that_is_disabled() -> None:
    model = net()
    lp.disable(model, targets="second")
    found = lp.verify(model, loss, **ANY)
    assert failed(found) == ["gradients"]
    assert set(found["gradients"].failed.values()) == {"disabled"}
    assert set(found["gradients"].failed) == {"second.weight.lora_A", "second.weight.lora_B"}


def test_a_factor_that_is_frozen() -> None:
    model = net()
    model.first.parametrizations.weight[0].lora_A.requires_grad_(False)
    found = lp.verify(model, loss, **ANY)
    assert failed(found) == ["gradients"]
    assert found["gradients"].failed == {"first.weight.lora_A": "frozen"}


def test_a_gradient_that_is_not_finite() -> None:
    def broken(model: nn.Module) -> Tensor:
        return loss(model) + (model.first.weight[0, 0] - model.first.weight[0, 0].detach()).sqrt()

    found = lp.verify(net(), broken, **ANY)
    assert "NaN or infinity" in set(found["gradients"].failed.values())
    assert "gradients" in failed(found)


def test_nothing_trains_at_all() -> None:
    found = lp.verify(net().requires_grad_(False), loss, **ANY)
    assert failed(found) == ["gradients", "loss"]
    assert set(found["gradients"].failed.values()) == {"frozen"}


def test_a_loss_that_does_not_fall() -> None:
    found = lp.verify(net(), lambda m: loss(m), lr=30.0, **ANY)
    assert failed(found) == ["loss"]
    assert found.losses[-1] > found.losses[0]


def test_a_loss_that_is_not_the_same_twice() -> None:
    calls = iter(range(100))
    found = lp.verify(net(), lambda m: loss(m) - next(calls), **ANY)
    assert failed(found) == ["disabled"]
    assert found["disabled"].expected == "the same twice"


def test_a_loss_that_reads_the_factors_past_the_switch() -> None:
    def regularised(model: nn.Module) -> Tensor:
        return loss(model) + model.first.parametrizations.weight[0].lora_B.square().sum()

    assert failed(lp.verify(net(), regularised, **ANY)) == ["disabled"]


def test_a_base_that_changes() -> None:
    def writes(model: nn.Module) -> Tensor:
        if model.calls > 5:
            model.unused.weight.data.neg_()
            model.unused.bias.data.add_(1)
        return loss(model)

    model = net()
    before = model.unused.weight.clone()
    found = lp.verify(model, writes, **ANY)
    assert failed(found) == ["unchanged"]
    assert "unused.bias" in found["unchanged"].failed
    assert model.unused.weight.equal(before)


def test_the_statistics_of_batchnorm_change_unless_that_is_meant() -> None:
    found = lp.verify(net(train=True), loss, **ANY)
    assert failed(found) == ["unchanged"]
    buffers = {f"norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(found["unchanged"].failed) == buffers
    assert lp.verify(net(train=True), loss, max_percent=100, besides=["last", "norm.*"]).passed


def test_one_adapter_of_two() -> None:
    model = lp.apply(net(), ["second"], rank=1, adapter="b")
    found = lp.verify(model, loss, adapter="b", **ANY)
    assert found.passed, str(found)
    assert found["gradients"].found == "2 of 2 factors"


# --- nothing is left behind --------------------------------------------------------------------


def everything(model: nn.Module) -> dict[str, object]:
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state |= {
        f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    state |= {f"trains {n}": p.requires_grad for n, p in model.named_parameters()}
    state |= {f"mode {n}": m.training for n, m in model.named_modules()}
    state |= {f"object {n}": id(p) for n, p in model.named_parameters()}
    state |= {f"object {n}": id(b) for n, b in model.named_buffers()}
    state |= {f"gradient {n}": id(p.grad) for n, p in model.named_parameters()}
    state |= {"torch": torch.get_rng_state(), "numpy": np.random.get_state()[1].tolist()}
    return state | {"calls": model.calls, "python": random.getstate()}


def same(a: dict[str, object], b: dict[str, object]) -> bool:
    def equal(x: object, y: object) -> bool:
        return x.equal(y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def trained() -> nn.Module:
    """In training mode but for one module, its head not frozen, and gradients on everything."""
    model = net(train=True, dropout=0.3)
    model.second.eval()
    model.head.requires_grad_(True)
    loss(model).backward()
    return model


def draws(model: nn.Module) -> Tensor:
    return loss(model) + 0 * torch.rand(()) * random.random() * np.random.rand()


def test_everything_is_as_it_was() -> None:
    model = trained()
    before = everything(model)
    assert lp.verify(model, draws, max_percent=100, besides=["last", "norm.*", "head.*"]).passed
    assert same(everything(model), before)
    loss(model)
    assert not same(everything(model), before)  # the comparison would have seen it


@pytest.mark.parametrize("call", [0, 1, 2, 4, 12, 13])
def test_everything_is_as_it_was_after_an_exception(call: int) -> None:
    model, calls = trained(), iter(range(100))
    before = everything(model)

    def raises(model: nn.Module) -> Tensor:
        value = draws(model)
        if next(calls) == call:
            model.eval().requires_grad_(True)
            model.head.weight.data.zero_()
            lp.disable(model)
            raise ZeroDivisionError
        return value

    with pytest.raises(ZeroDivisionError):
        lp.verify(model, raises)
    assert same(everything(model), before)
    assert next(calls) == call + 1
    assert not lp.stats(model).disabled


def test_the_loss_is_called_with_gradients_even_where_there_are_none() -> None:
    model = net()
    with torch.no_grad():
        assert lp.verify(model, loss, **ANY).passed
    with torch.inference_mode():
        assert lp.verify(model, loss, **ANY).passed
    assert all(p.grad is None for p in model.parameters())


# --- what is said ------------------------------------------------------------------------------


def test_the_error_names_what_failed() -> None:
    found = lp.verify(net("first", "unused"), loss, besides="last", max_percent=1)
    with pytest.raises(VerificationError) as raised:
        found.raise_for_failure()
    assert raised.value.failures == ("share", "gradients")
    for part in ("2 of 6 checks failed", "at most 1 %", "2 of 4 factors", "unused.weight.lora_A"):
        assert part in str(raised.value)


def test_it_is_data_and_prints_itself() -> None:
    found = lp.verify(net("first", "unused"), loss, **ANY)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["passed"] is False
    assert [c["passed"] for c in data["checks"]] == [c.passed for c in found.checks]
    assert len(data["losses"]) == 11
    for width in (60, 80, 120):
        console = Console(file=io.StringIO(), width=width)
        with console.capture() as captured:
            console.print(found)
        text = captured.get()
        assert max(map(len, text.splitlines())) <= width
        assert "Net: 5 of 6 checks passed" in text
        assert "gradients: expected all factors" in text
        assert "unused.weight.lora_A  no gradient" in text
    assert "5 of 6 checks passed" in str(found)


def test_wrong_arguments_are_refused() -> None:
    model = net()
    for wrong in ({"steps": 1}, {"lr": 0.0}, {"lr": float("nan")}, {"max_percent": -1}):
        with pytest.raises(OptionError):
            lp.verify(model, loss, **wrong)
    with pytest.raises(OptionError, match="scalar"):
        lp.verify(model, lambda m: m(torch.ones(2, 24)))
    with pytest.raises(OptionError, match="a tensor"):
        lp.verify(model, lambda m: 1.0)  # type: ignore[arg-type, return-value]  # noqa: ARG005
    with pytest.raises(NoMatchError, match=r"Nearest: head"):
        lp.verify(model, loss, besides="haed")
    with pytest.raises(NoAdapterError):
        lp.verify(model, loss, adapter="other")
    with pytest.raises(NoAdapterError):
        lp.verify(Net(), loss)
    with pytest.raises(ModelError, match="meta"):
        lp.verify(net().to("meta"), loss)
