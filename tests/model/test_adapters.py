from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lora_param as lp
from lora_param.errors import (
    AdapterExistsError,
    FingerprintError,
    MismatchError,
    NoAdapterError,
    NoMatchError,
    NonFiniteError,
    OptionError,
    UnsuitableWeightError,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def filled(model: nn.Module, std: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for p in lp.parameters(model):
            p.normal_(0, std)
    return model


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def test_apply_is_all_or_nothing() -> None:
    model = net()
    for targets, error in [
        (["0", "nothing"], NoMatchError),
        (["0", "2:rank=0"], OptionError),
        (["0", "0.bias"], UnsuitableWeightError),
        (["0", "2:init=odd"], OptionError),
        (["0", "2:variant=odd"], OptionError),
    ]:
        with pytest.raises(error):
            lp.apply(model, targets, rank=2)
        assert type(model[0]) is nn.Linear
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank", 0),
        ("rank", 2.5),
        ("alpha", 0.0),
        ("dropout", 1.0),
        ("scaling", "odd"),
        ("init", "odd"),
        ("variant", "odd"),
        ("adapter", ""),
        ("tied", "odd"),
    ],
)
def test_options_are_named_with_what_they_accept(option: str, value: object) -> None:
    with pytest.raises(OptionError, match=rf"{option} is {value!r}; accepted: "):
        lp.apply(net(), ["0"], **{"rank": 2, option: value})  # type: ignore[arg-type]


def test_inplace_false_leaves_the_model() -> None:
    model = net()
    copy = lp.apply(model, ["0"], rank=2, inplace=False)
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    assert len(lp.parameters(copy)) == 2


def test_freeze_false_leaves_the_base_training() -> None:
    model = lp.apply(net(), ["0"], rank=2, freeze=False)
    assert all(p.requires_grad for p in model.parameters())
    assert lp.stats(model).unfrozen == sum(p.numel() for p in net().parameters())


def test_several_adapters_switch_apart() -> None:
    model = filled(lp.apply(net(), ["0"], rank=2, adapter="a"))
    base = net()(X)
    with_a = model(X)
    lp.apply(model, ["0", "2"], rank=2, adapter="b")
    with torch.no_grad():
        for p in lp.parameters(model, "b"):
            p.normal_(0, 0.3)
    with pytest.raises(AdapterExistsError, match="'b'"):
        lp.apply(model, ["0"], adapter="b")
    lp.disable(model, adapter="b")
    assert torch.equal(model(X), with_a)
    lp.disable(model, adapter="a")
    torch.testing.assert_close(model(X), base)
    lp.enable(model, ["2"], adapter="b")
    with lp.disabled(model):
        torch.testing.assert_close(model(X), base)
    assert [r.enabled for r in lp.stats(model).rows] == [False, False, True]
    with pytest.raises(NoAdapterError, match="no adapter named 'c' on this model; it has a, b"):
        lp.enable(model, adapter="c")
    with pytest.raises(NoMatchError):
        lp.enable(model, targets=["1"])
    lp.bake(model, "a")
    assert {r.adapter for r in lp.stats(model).rows} == {"b"}
    assert not model[0].parametrizations.weight.original.requires_grad
    lp.remove(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(NoAdapterError, match="it has none"):
        lp.remove(model)


def test_strength_replaces_and_does_not_accumulate() -> None:
    model = filled(lp.apply(nn.Sequential(nn.Linear(6, 4)), ["0"], rank=2))
    base = lp.base_state_dict(model)["0.weight"]
    full = model[0].weight.detach() - base
    for factor in (0.5, 0.5, -2.0, 0.0, 1.0):
        lp.set_scale(model, factor)
        torch.testing.assert_close(model[0].weight.detach() - base, factor * full)
    with pytest.raises(OptionError, match="finite"):
        lp.set_scale(model, float("nan"))


def test_disabled_restores_on_exceptions_and_keeps_what_was_off() -> None:
    model = lp.apply(net(), ["0", "2"], rank=2)
    lp.disable(model, targets=["2"])
    with pytest.raises(ZeroDivisionError), lp.disabled(model):
        raise ZeroDivisionError
    assert [r.enabled for r in lp.stats(model).rows] == [True, False]


def test_a_thousand_toggles_leave_every_bit() -> None:
    model = filled(lp.apply(net(), ["0", "2"], rank=2))
    before, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(1000):
        lp.disable(model)
        lp.enable(model)
    assert torch.equal(model(X), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("where", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_no_number_stops_the_bake(where: str, value: float) -> None:
    model = filled(lp.apply(net(), ["0", "2"], rank=2))
    with torch.no_grad():
        getattr(model[2].parametrizations.weight[0], where)[0, 0] = value
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=rf"2\.weight\.{where}"):
        lp.bake(model)
    after = model.state_dict()
    assert list(after) == list(state)
    for key, value in state.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, equal_nan=True)


def test_an_overflow_stops_the_bake() -> None:
    model = lp.apply(nn.Sequential(nn.Linear(6, 4).half()), ["0"], rank=1)
    with torch.no_grad():
        for p in lp.parameters(model):
            p.fill_(300.0)
    with pytest.raises(NonFiniteError, match=r"0\.weight merged to torch.float16"):
        lp.bake(model)


def test_loading_lists_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lp.save(filled(lp.apply(net(), ["0"], rank=2)), path)
    other = lp.apply(net(), ["2"], rank=2)
    with pytest.raises(MismatchError, match=r"In the adapter alone: 0\.weight.*2\.weight"):
        lp.load(other, path)
    both = lp.apply(net(), ["0", "2"], rank=2)
    with pytest.raises(MismatchError, match=r"1 of 2 targets fit.*In the base alone: 2\.weight"):
        lp.load(both, path)
    with pytest.warns(UserWarning, match="1 targets loaded; 0 of the file's and 1 of the model's"):
        lp.load(both, path, strict=False)
    assert both[0].parametrizations.weight[0].lora_B.any()
    wrong = lp.apply(net(), ["0"], rank=3)
    with pytest.raises(MismatchError, match=r"0 of 1 .*rank 2 in the file, 3 here, of 0\.weight"):
        lp.load(wrong, path)
    with pytest.raises(MismatchError, match=r"0\.weight is \(9, 6\)"):
        lp.load(nn.Sequential(nn.Linear(6, 9)), path)


def test_another_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lp.save(filled(lp.apply(net(), ["0"], rank=2)), path)
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(FingerprintError, match=r"0\.weight \(values\)"):
        lp.load(other, path)
    lp.load(other, path, check_fingerprint=False)
    with pytest.raises(FingerprintError, match="dtype bfloat16, not float32"):
        lp.load(net().bfloat16(), path)


def test_loading_under_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    lp.save(filled(lp.apply(net(), ["0"], rank=2)), path)
    model = lp.load(net(), path, adapter="mine")
    assert lp.get_adapter(model, "mine").name == "mine"
    lp.load(model, path, adapter="yours")
    assert [r.adapter for r in lp.stats(model).rows] == ["mine", "yours"]


def test_parameters_and_groups() -> None:
    model = lp.apply(net(), ["0", "2"], rank=2)
    assert [tuple(p.shape) for p in lp.parameters(model)] == [(2, 6), (8, 2), (2, 8), (4, 2)]
    groups = lp.param_groups(model, 1e-3, ratio=4)
    assert [(len(g["params"]), g["lr"]) for g in groups] == [(2, 1e-3), (2, 4e-3)]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in lp.parameters(model)}
    torch.optim.AdamW(groups)
    lp.apply(model, ["2"], rank=2, variant="miss", adapter="miss")
    slow, fast = (g["params"] for g in lp.param_groups(model, 1e-3, adapter="miss"))
    assert (slow, fast) == ([], lp.parameters(model, "miss")), "M is B, and A a constant"
    with pytest.raises(NoAdapterError):
        lp.parameters(net())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_inits_from_the_weight_leave_the_base_and_travel(init: str, tmp_path: Path) -> None:
    model = lp.apply(net(), ["0", "2"], rank=2, init=init)
    torch.testing.assert_close(model(X), net()(X))
    optimizer = torch.optim.SGD(lp.parameters(model), lr=0.1)
    model(X).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in lp.parameters(model))
    optimizer.step()
    trained = model(X)
    with lp.disabled(model):
        assert torch.equal(model(X), net()(X))
    lp.save(model, tmp_path / "a.safetensors")
    loaded = lp.load(net(), tmp_path / "a.safetensors")
    assert torch.equal(loaded(X), trained)
    lp.bake(loaded)
    torch.testing.assert_close(loaded(X), trained)


def test_stats_count_a_tied_tensor_once() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False)})
    model["head"].weight = model["emb"].weight
    lp.apply(model, ["emb", "head"], rank=2)
    found = lp.stats(model)
    assert (found.base, found.trainable, len(found.rows)) == (36, 26, 1)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 26
