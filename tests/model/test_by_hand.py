"""`LoRA` registered by torch's own function, weight by weight, equals what `apply` registers."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from catalogue import CASES, Case, randomize
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import register_parametrization

import lora_param as lp
from lora_param.errors import (
    ComputedWeightError,
    DuplicateTargetError,
    MismatchError,
    OptionError,
    SliceError,
    UnknownOptionError,
    UnsuitableWeightError,
)

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def by_hand(layer: nn.Module, tensor: str = "weight", **options: object) -> nn.Module:
    """One weight of a layer, with factors that are not zero."""
    lora = lp.LoRA(getattr(layer, tensor).shape, **{"rank": 2, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for p in lora.parameters():
            p.normal_(0, 0.5)
    return register_parametrization(layer, tensor, lora)


def registered(case: Case) -> nn.Module:
    """The case's model, adapted by hand as `apply` adapts it, down to its factors."""
    model, other = case.build().requires_grad_(False), case.adapted()
    for adapter in case.adapters:
        record = lp.get_adapter(other, adapter)
        for key, target in record.targets.items():
            options = {
                name: getattr(target.settings, name)
                for name in ("rank", "alpha", "scaling", "dropout", "init", "variant", "form")
            }
            path, _, tensor = target.target.name.rpartition(".")
            W = getattr(model.get_submodule(path), tensor)
            part = str(target.target.region)
            lora = lp.LoRA(W, part=part, adapter=adapter, **options)
            for name in (target.target.name, *target.also):
                path, _, tensor = name.rpartition(".")
                owner = model.get_submodule(path)
                if not any(p is lora for p in owner.modules()):  # a module of two names
                    register_parametrization(owner, tensor, lora)
            with torch.no_grad():
                for name, t in record.factors(key).items():
                    getattr(lora, name).copy_(t)
    return model


# torch's function writes to the tensor that it registers on, which a packed one does not allow
PLAIN = [case for case in CASES if not case.name.startswith("packed-base")]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_by_hand_equals_apply(case: Case, tmp_path: Path) -> None:
    data, model, other = case.data(), registered(case), case.adapted()
    for m in (model, other):
        m.train(not case.dropout)
    assert torch.equal(model(*data), other(*data))  # before anything of ours has seen it
    for m in (model, other):
        m(*data).square().sum().backward()
    names = [lp.get_adapter(m, a).targets for m in (model, other) for a in case.adapters]
    assert names[: len(case.adapters)] == names[len(case.adapters) :]
    gradients = [[p.grad for p in lp.parameters(m)] for m in (model, other)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert lp.stats(model).to_dict() == lp.stats(other).to_dict()
    model.eval(), other.eval()
    expected = model(*data)
    with lp.disabled(model), lp.disabled(other):
        assert torch.equal(model(*data), other(*data))
    for adapter in case.adapters:
        one, two = (lp.save(m, tmp_path / "a.safetensors", adapter) for m in (model, other))
        assert one.read_bytes() == two.read_bytes()
    for state in (lp.base_state_dict, lp.merged_state_dict):
        found, wanted = state(model), state(other)
        assert set(found) == set(wanted)
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert torch.equal(twin(*data), expected)
        randomize(twin, 0.7)
    assert torch.equal(model(*data), expected)
    assert not any(model.load_state_dict(case.build().state_dict()))
    assert torch.equal(model(*data), expected)
    lp.remove(twins[0])
    assert [type(m) for m in twins[0].modules()] == [type(m) for m in case.build().modules()]
    for m in (model, other):
        lp.bake(m).requires_grad_(False)  # attention chooses its kernel by this
    assert torch.equal(model(*data), other(*data))
    assert [type(m) for m in model.modules()] == [type(m) for m in case.build().modules()]


def test_a_fresh_one_has_the_factors_that_apply_draws() -> None:
    layer = linear()
    lora = lp.LoRA(layer.weight.shape, rank=2, generator=torch.Generator().manual_seed(1))
    register_parametrization(layer, "weight", lora)
    other = lp.apply(linear(), ["weight"], rank=2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(X), linear()(X))
    for mine, theirs in zip(lp.parameters(layer), lp.parameters(other), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.requires_grad
    assert layer.parametrizations.weight.original.requires_grad, "freezing is the caller's"


def test_torch_takes_it_off_again() -> None:
    for seen in (False, True):
        for leave in (False, True):
            layer = by_hand(linear())
            before = layer(X) if leave else linear()(X)
            if seen:
                lp.stats(layer)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave)
            assert type(layer) is nn.Linear
            torch.testing.assert_close(layer(X), before)
            assert not any(isinstance(m, lp.LoRA) for m in layer.modules())


def test_two_in_one_chain() -> None:
    layer = by_hand(by_hand(linear(), adapter="a"), adapter="b")
    a, b = (p.lora_B @ p.lora_A for p in layer.parametrizations.weight)
    W = layer.parametrizations.weight.original
    torch.testing.assert_close(layer(X), nn.functional.linear(X, W + 8 * a + 8 * b, layer.bias))
    assert [row.adapter for row in lp.stats(layer).rows] == ["a", "b"]
    lp.disable(layer, adapter="a")
    torch.testing.assert_close(layer(X), nn.functional.linear(X, W + 8 * b, layer.bias))
    lp.enable(layer)
    before = layer(X)
    torch.testing.assert_close(lp.bake(layer, "a")(X), before)
    torch.testing.assert_close(lp.bake(layer)(X), before)


def test_two_of_one_adapter_on_one_weight_are_told_apart_before_they_are_saved() -> None:
    layer = by_hand(by_hand(linear()))
    with pytest.raises(DuplicateTargetError, match=r"two .* 'default' .* weight.*adapter="):
        lp.get_adapter(layer)
    parts = by_hand(by_hand(linear(), part="[0:2]"), part="[2:4]")
    assert list(lp.get_adapter(parts).targets) == ["weight[0:2]", "weight[2:4]"]


def test_by_hand_joins_what_apply_and_torch_have_registered() -> None:
    model = by_hand(lp.apply(linear(), ["weight"], rank=2, adapter="a"), adapter="b")
    assert [row.adapter for row in lp.stats(model).rows] == ["a", "b"]
    assert torch.equal(lp.remove(copy.deepcopy(model))(X), linear()(X))
    model = by_hand(parametrizations.weight_norm(linear()))
    before = model(X)
    torch.testing.assert_close(lp.bake(model, chain=True)(X), before)


def test_a_weight_registered_later_on_the_same_module_is_seen_too() -> None:
    cell = nn.LSTMCell(6, 4)
    before = cell(X)
    by_hand(cell, "weight_ih")
    lp.stats(cell)
    by_hand(cell, "weight_hh")
    assert len(lp.stats(cell).rows) == 2
    expected = cell(X)
    torch.testing.assert_close(pickle.loads(pickle.dumps(cell))(X), expected)
    with torch.no_grad(), lp.cached(cell):
        assert cell.weight_hh is cell.weight_hh
    torch.testing.assert_close(lp.remove(cell)(X), before)
    assert type(cell) is nn.LSTMCell


def test_cached_keeps_what_was_registered_by_hand() -> None:
    layer = by_hand(linear())
    before = layer(X)
    with torch.no_grad(), lp.cached(layer):
        assert layer.weight is layer.weight
        torch.testing.assert_close(layer(X), before)


@pytest.mark.parametrize("seen", [False, True])
def test_it_compiles_to_one_graph(seen: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(by_hand(linear()), nn.ReLU())
    if seen:
        lp.stats(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), model(X))
    lp.disable(model)
    torch.testing.assert_close(compiled(X), nn.functional.relu(linear()(X)))


def test_it_trains_by_itself_and_its_state_dict_loads() -> None:
    layer = by_hand(linear())
    layer.parametrizations.weight.original.requires_grad_(False)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    optimizer = torch.optim.SGD(lp.parameters(layer), lr=0.1)
    before = layer(X)
    before.square().sum().backward()
    optimizer.step()
    assert not torch.equal(layer(X), before)
    layer.load_state_dict(state)
    assert torch.equal(layer(X), before)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = by_hand(linear())
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(X), before)


def test_assigning_the_weight_is_refused() -> None:
    layer = by_hand(linear())
    with pytest.raises(ComputedWeightError, match="would be lost"):
        layer.weight = torch.zeros(4, 6)


@pytest.mark.parametrize("below", [None, "double"])
def test_a_lora_for_another_shape_is_refused_when_it_is_registered(below: str | None) -> None:
    layer = linear()
    if below:
        by_hand(layer, adapter="a")
    with pytest.raises(MismatchError, match=r"a LoRA for \(4, 1\), a weight of \(4, 6\)"):
        register_parametrization(layer, "weight", lp.LoRA((4, 1), rank=1))
    assert parametrize.is_parametrized(layer) is bool(below)


def test_what_starts_from_the_weight_asks_for_it() -> None:
    W = linear().weight
    for options, name in [({"init": "pissa"}, "pissa"), ({"variant": "dora"}, "dora")]:
        with pytest.raises(OptionError, match=rf"the weight itself, since {name} starts from"):
            lp.LoRA(W.shape, rank=2, **options)
        layer = linear()
        register_parametrization(layer, "weight", lp.LoRA(layer.weight, rank=2, **options))
        torch.testing.assert_close(layer(X), linear()(X))


def test_shapes_settings_and_devices() -> None:
    assert lp.LoRA((2, 16)).settings.rank == 2, "capped like those of apply"
    assert lp.LoRA((2, 16)).scale == 2.0
    assert lp.LoRA((3, 8, 4), part="[*]", rank=2).lora_A.shape == (3, 2, 4)
    assert lp.LoRA((6, 4), part="[1/3]", rank=2).lora_B.shape == (2, 2)
    assert lp.LoRA(torch.zeros(4, 4, dtype=torch.float64), rank=2).lora_A.dtype == torch.float64
    assert lp.LoRA(torch.zeros(4, 4, dtype=torch.bfloat16), rank=2).lora_A.dtype == torch.float32
    assert lp.LoRA((4, 4), device="meta").lora_A.is_meta
    with torch.device("meta"):
        assert lp.LoRA((4, 4)).lora_A.is_meta
    assert lp.LoRA((4, 4), dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16
    for wrong in [{"rank": 0}, {"variant": "odd"}, {"adapter": ""}]:
        with pytest.raises(OptionError):
            lp.LoRA((4, 4), **wrong)
    with pytest.raises(UnknownOptionError, match="rnak"):
        lp.LoRA((4, 4), rnak=2)  # type: ignore[call-arg]
    with pytest.raises(UnsuitableWeightError, match="1-dimensional"):
        lp.LoRA((4,))
    with pytest.raises(SliceError):
        lp.LoRA((4, 4), part="[0/3]")


def test_a_module_of_somebody_elses_mechanism_is_left_alone() -> None:
    class Own(nn.Linear):
        """Computes its weight from a parametrization of its own."""

        def __init__(self) -> None:
            super().__init__(6, 4)
            self.parametrizations = nn.ModuleDict()

    model = Own()
    assert lp.plan(model, ["weight"]).targets
    assert isinstance(model(X), Tensor)


@pytest.mark.parametrize("part", ["", "[*]"])
def test_lokr_made_for_a_shape_is_what_apply_makes(part: str) -> None:
    net = nn.Module()
    net.w = nn.Parameter(torch.randn(4, 16, 9))
    lp.apply(net, [f"w{part}"], rank=2, variant="lokr")
    own = lp.LoRA((4, 16, 9), part=part, rank=2, variant="lokr")
    (applied,) = lp.get_adapter(net).targets.values()
    assert own.settings == applied.settings
    assert ("left" in own.settings.form) == (part == "")
