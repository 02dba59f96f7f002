"""Baking a live model where more than one thing stands on a weight: the output stays, or a word."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lora_param as lp
from lora_param.errors import ChainError, DependentUpdateError, FingerprintError

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def filled(model: nn.Module, adapter: str | None = None, std: float = 0.5) -> nn.Module:
    with torch.no_grad():
        for p in lp.parameters(model, adapter):
            p.normal_(0, std)
    return model


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


def two(first: str, second: str, targets: tuple[str, str] = ("weight", "weight")) -> nn.Module:
    """Adapters a and b, of these variants."""
    model = linear()
    for adapter, variant, target in zip("ab", (first, second), targets, strict=True):
        lp.apply(model, [target], rank=2, variant=variant, adapter=adapter)
        filled(model, adapter)
    return model


# --- several adapters -------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["lora", "miss", "dora"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_two_doras_on_one_weight_are_not_baked_apart(variant: str, strength: float) -> None:
    model = two(variant, "dora")
    lp.set_scale(model, strength)
    before, state = model(X), {k: v.clone() for k, v in model.state_dict().items()}
    said = (
        "weight: baking a alone would change what 'b' adds, and so the model's output: an update "
        "of variant dora depends on the weight that it is added to"
    )
    with pytest.raises(DependentUpdateError, match=re.escape(said)):
        lp.bake(model, "a")
    lp.disable(model, adapter="b")  # switched on again it would add something else
    with pytest.raises(DependentUpdateError):
        lp.bake(model, "a")
    lp.enable(model, adapter="b")
    assert torch.equal(model(X), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    lp.bake(model)
    torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize(
    ("first", "second", "targets"),
    [
        ("lora", "lora", ("weight", "weight")),
        ("dora", "lora", ("weight", "weight")),
        ("dora", "miss", ("weight", "weight")),
        ("miss", "miss", ("weight", "weight")),
        ("dora", "dora", ("weight[0:2]", "weight[2:4]")),
    ],
)
def test_the_output_after_baking_one_adapter_is_the_output_before(
    first: str, second: str, targets: tuple[str, str]
) -> None:
    model = two(first, second, targets)
    before = model(X)
    with lp.disabled(model, adapter="a"):
        without = model(X)
    lp.bake(model, "a")
    torch.testing.assert_close(model(X), before)
    assert not torch.equal(before, without)
    assert {row.adapter for row in lp.stats(model).rows} == {"b"}
    lp.bake(model)
    torch.testing.assert_close(model(X), before)


def test_an_adapter_that_adds_nothing_is_baked_beside_a_dora() -> None:
    model = two("dora", "dora")
    lp.disable(model, adapter="a")
    before = model(X)
    lp.bake(model, "a")
    assert torch.equal(model(X), before)


# --- other parametrizations -------------------------------------------------------------------


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def _weight_norm() -> nn.Module:
    return parametrizations.weight_norm(linear())


def _spectral_norm() -> nn.Module:
    model = parametrizations.spectral_norm(linear())
    model(X)
    return model.eval()


def _double() -> nn.Module:
    return parametrize.register_parametrization(linear(), "weight", Double())


CHAINS = {"weight_norm": _weight_norm, "spectral_norm": _spectral_norm, "double": _double}
every_chain = pytest.mark.parametrize("chain", CHAINS)


@every_chain
def test_a_trained_adapter_loads_on_its_own_parametrized_base(chain: str, tmp_path: Path) -> None:
    model = filled(lp.apply(CHAINS[chain](), ["weight"], rank=2))
    before = model(X)
    path = lp.save(model, tmp_path / "a.safetensors")
    fresh = lp.load(CHAINS[chain](), path)
    assert torch.equal(fresh(X), before)
    assert torch.equal(lp.load(filled(fresh), path)(X), before)
    assert lp.get_adapter(fresh).base == lp.get_adapter(model).base
    other = CHAINS[chain]()
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "original" in n).mul_(1.5)
    with pytest.raises(FingerprintError, match=r"weight \(values\)"):
        lp.load(other, path)


@every_chain
def test_toggles_and_strengths_work_on_a_parametrized_base(chain: str) -> None:
    model, base = filled(lp.apply(CHAINS[chain](), ["weight"], rank=2)), CHAINS[chain]()(X)
    with lp.disabled(model, ["weight"]):
        torch.testing.assert_close(model(X), base)
    lp.set_scale(model, 0.0, ["weight"])
    torch.testing.assert_close(model(X), base)
    assert lp.stats(model).rows[0].weight_norm is not None


@every_chain
@pytest.mark.parametrize("adapters", [("a",), ("a", "b")])
@pytest.mark.parametrize("training", [True, False])
def test_a_whole_chain_is_baked_when_asked_for(
    chain: str, adapters: tuple[str, ...], training: bool
) -> None:
    model = CHAINS[chain]()
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    assert set(wanted.values()) == {True}
    for adapter in adapters:
        filled(lp.apply(model, ["weight"], rank=2, adapter=adapter), adapter)
    before, keys = model.eval()(X), list(model.state_dict())
    model.train(training)
    for call in (lp.bake, lp.merged_state_dict):
        with pytest.raises(ChainError, match=r"another parametrization .*chain=True"):
            call(model)
    assert list(model.state_dict()) == keys
    merged = lp.merged_state_dict(model, chain=True)
    plain = linear()
    assert set(merged) == set(plain.state_dict())
    assert not plain.load_state_dict(merged).missing_keys
    assert torch.equal(plain(X), lp.bake(model, chain=True)(X))
    torch.testing.assert_close(model(X), before)
    assert type(model) is nn.Linear
    assert model.training is training
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(plain.state_dict())
    assert filled(lp.apply(model, ["weight"], rank=2))(X).isfinite().all()


def test_a_chain_is_baked_whole_or_not_at_all() -> None:
    model = filled(lp.apply(_weight_norm(), ["weight"], rank=2, adapter="a"))
    filled(lp.apply(model, ["weight"], rank=2, adapter="b"), "b")
    before = model(X)
    with pytest.raises(ChainError, match=r"with them b, which was to stay: bake all adapters"):
        lp.bake(model, "a", chain=True)
    assert torch.equal(model(X), before)


def test_a_chain_with_lora_in_its_middle_is_baked_too() -> None:
    model = filled(lp.apply(linear(), ["weight"], rank=2, adapter="a"))
    parametrize.register_parametrization(model, "weight", Double())
    lp.apply(model, ["weight"], rank=2, adapter="b")
    filled(model, "b")
    before, twin = model(X), copy.deepcopy(model)
    torch.testing.assert_close(lp.bake(model, chain=True)(X), before)
    assert type(model) is nn.Linear
    torch.testing.assert_close(twin(X), before)
    assert list(lp.merged_state_dict(twin, chain=True)) == ["weight", "bias"]


def test_other_chains_of_the_model_stay() -> None:
    model = nn.Sequential(_weight_norm(), nn.ReLU(), nn.Linear(4, 3))
    keys = list(model.state_dict())
    filled(lp.apply(model, ["2"], rank=2))
    before = model(X)
    assert list(lp.merged_state_dict(model, chain=True)) == keys
    torch.testing.assert_close(lp.bake(model, chain=True)(X), before)
    assert parametrize.is_parametrized(model[0], "weight")
