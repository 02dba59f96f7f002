"""Living with other parametrizations, other classes, and torch's own functions."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import lora_param as lp
from lora_param.errors import (
    ComputedWeightError,
    ModelError,
    OptionError,
    UnsuitableWeightError,
    WrappedModelError,
)


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    def right_inverse(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


def filled(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in lp.parameters(model):
            p.normal_(0, 0.5)
    return model


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.mark.parametrize(
    "norm",
    [parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["weight", "spectral"],
)
def test_lora_on_top_of_another_parametrization(norm: object) -> None:
    model = norm(linear()).eval()  # type: ignore[operator]
    cls, x = type(model), torch.randn(3, 6)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    lp.apply(model, ["weight"], rank=2)
    assert torch.equal(model(x), before)
    filled(model)
    lora = model.parametrizations.weight[-1]
    expected = before + lora.scale * (x @ lora.lora_A.T) @ lora.lora_B.T
    torch.testing.assert_close(model(x), expected)
    assert list(lp.base_state_dict(model)) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in lp.base_state_dict(model).items())
    with pytest.raises(ModelError, match="another parametrization"):
        lp.bake(model)
    lp.remove(model)
    assert type(model) is cls
    assert list(model.state_dict()) == list(state)
    assert torch.equal(model(x), before)


def test_another_tensor_parametrized_by_torch() -> None:
    model = linear()
    parametrize.register_parametrization(model, "bias", Double())
    x = torch.randn(3, 6)
    before, state = model(x), list(model.state_dict())
    filled(lp.apply(model, ["weight"], rank=2))
    twin = copy.deepcopy(model)
    lp.remove(twin)
    torch.testing.assert_close(twin(x), before)
    assert not torch.equal(model(x), before)
    assert parametrize.is_parametrized(twin, "bias")
    lp.remove(model)
    assert torch.equal(model(x), before)
    assert set(model.state_dict()) == set(state)
    plain = linear().state_dict()
    lp.apply(model, ["weight"], rank=2)
    model.load_state_dict(
        {"weight": plain["weight"], "parametrizations.bias.original": plain["bias"]}
    )
    assert torch.equal(model.parametrizations.weight.original, plain["weight"])
    lp.remove(model)
    assert not model._load_state_dict_pre_hooks


def test_torch_parametrizes_and_unparametrizes_beside_lora() -> None:
    model, x = linear(), torch.randn(3, 6)
    before = model(x)
    lp.apply(model, ["weight"], rank=2)
    parametrize.register_parametrization(model, "bias", Double())
    torch.testing.assert_close(model(x), before)
    twin = copy.deepcopy(model)
    lp.remove(twin)
    torch.testing.assert_close(twin(x), before)
    parametrize.remove_parametrizations(model, "bias")
    torch.testing.assert_close(model(x), before)
    parametrize.remove_parametrizations(model, "weight", leave_parametrized=False)
    assert type(model) is nn.Linear
    assert torch.equal(model(x), before)


def test_torch_bakes_it_too() -> None:
    model, x = filled(lp.apply(linear(), ["weight"], rank=2)), torch.randn(3, 6)
    expected = model(x)
    parametrize.remove_parametrizations(model, "weight")
    assert type(model) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_torchs_cached_never_gives_another_modules_weight() -> None:
    model, x = filled(lp.apply(linear(), ["weight"], rank=2)), torch.randn(3, 6)
    twin = filled(copy.deepcopy(model))
    expected = model(x), twin(x)
    with parametrize.cached():
        for _ in range(2):
            torch.testing.assert_close((model(x), twin(x)), expected)


def test_assigning_the_weight_is_refused() -> None:
    model = lp.apply(linear(), ["weight"], rank=2)
    with pytest.raises(ComputedWeightError, match="assigning 'weight'"):
        model.weight = nn.Parameter(torch.zeros(4, 6))


def test_deleting_the_weight_is_refused() -> None:
    model = lp.apply(linear(), ["weight"], rank=2)
    with pytest.raises(ComputedWeightError, match="deleting 'weight'"):
        del model.weight


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda _: lp.apply("model", ["0"]), "model is 'model'; accepted: a torch.nn.Module"),
        (lambda _: lp.apply(None), "model is None"),
        (lambda _: lp.plan(3), "model is 3"),
        (lambda _: lp.stats(3), "model is 3"),
        (lambda _: lp.set_scale("model", 1.0), "model is 'model'"),
        (lambda _: lp.cached("model").__enter__(), "model is 'model'"),
        (lambda m: lp.apply(m, 3), "targets is 3; accepted: a pattern"),
        (lambda m: lp.apply(m, [3]), "targets is 3; accepted: a pattern"),
        (lambda m: lp.apply(m, exclude=[3]), "exclude is 3; accepted: a pattern"),
        (lambda m: lp.disable(lp.apply(m), [3]), "targets is 3; accepted: a pattern"),
        (lambda m: lp.set_scale(lp.apply(m), "x"), "factor is 'x'; accepted: a finite number"),
        (lambda m: lp.set_scale(lp.apply(m), None), "factor is None"),
    ],
)
def test_values_of_another_kind(call, says) -> None:
    with pytest.raises(OptionError, match=says):
        call(linear())


def test_a_lazy_module_is_left_alone_until_it_has_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.LazyBatchNorm1d(), nn.LazyLinear(3))
    with pytest.raises(UnsuitableWeightError, match=r"2\.weight cannot be adapted: it is not yet"):
        lp.apply(model, ["2"], rank=1)
    lp.apply(model, rank=1)
    assert [r.target for r in lp.stats(model).rows] == ["0.weight"]
    model(torch.ones(2, 6)).sum().backward()
    assert model[2].weight.grad is None, "it was frozen like the rest"
    lp.remove(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_wrapped_model_is_refused() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapped = DistributedDataParallel(linear())
    with pytest.raises(WrappedModelError, match="Apply LoRA first"):
        lp.apply(wrapped, ["weight"])
    wrapped = DistributedDataParallel(lp.apply(linear(), ["weight"], rank=2))
    assert list(lp.get_adapter(wrapped).targets) == ["weight"]
    assert list(lp.base_state_dict(wrapped)) == ["weight", "bias"]


def test_compiled_names_carry_no_prefix() -> None:
    model = filled(lp.apply(nn.Sequential(linear()), ["0"], rank=2))
    compiled = torch.compile(model, backend="eager")
    assert list(lp.get_adapter(compiled).targets) == ["0.weight"]
    assert list(lp.merged_state_dict(compiled)) == ["0.weight", "0.bias"]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_meta_models_attach_and_load() -> None:
    with torch.device("meta"):
        model = nn.Linear(6, 4)
    lp.apply(model, ["weight"], rank=2)
    assert all(p.is_meta for p in lp.parameters(model))
    assert "trainable 20" in str(lp.stats(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_bases_keep_their_dtype(dtype: torch.dtype) -> None:
    model = filled(lp.apply(linear().to(dtype), ["weight"], rank=2))
    assert all(p.dtype == torch.float32 for p in lp.parameters(model))
    x = torch.randn(3, 6, dtype=dtype)
    assert model.weight.dtype == model(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert model.weight.dtype == dtype
        assert model.weight.clone().dtype == dtype
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lp.parameters(model))


def test_a_foreign_subclass_and_its_getstate_survive() -> None:
    class Custom(nn.Linear):
        def __getstate__(self) -> dict[str, object]:
            return {**self.__dict__, "marked": True}

    model = filled(lp.apply(Custom(6, 4), ["weight"], rank=2))
    twin = copy.deepcopy(model)
    assert isinstance(twin, Custom)
    assert twin.marked
    assert torch.equal(twin.weight.detach(), model.weight.detach())


class Tied(nn.Module):
    def __init__(self, *, head: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        if head:
            self.head = nn.Linear(6, 12, bias=False)
            self.head.weight = self.embed.weight


def test_of_tied_names_the_model_may_lack_some() -> None:
    torch.manual_seed(0)
    model = lp.apply(Tied(head=True), ["embed", "head"], rank=2)
    for p in lp.parameters(model):
        nn.init.normal_(p)
    record = lp.get_adapter(model)
    assert record.targets["embed.weight"].also == ("head.weight",)
    torch.manual_seed(0)
    alone = lp.attach(Tied(head=False), record)
    assert torch.equal(alone.embed.weight.clone(), model.embed.weight.clone())


def test_a_tie_that_the_adapter_does_not_know_holds_live_and_in_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    apart = Tied(head=True)
    apart.head.weight = nn.Parameter(apart.embed.weight.detach().clone())
    lp.apply(apart, ["embed"], rank=2)
    for p in lp.parameters(apart):
        nn.init.normal_(p)
    lp.save(apart, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    tied = Tied(head=True)
    torch.save(tied.state_dict(), tmp_path / "tied.pt")
    lp.bake_checkpoint(tmp_path / "tied.pt", tmp_path / "a.safetensors", tmp_path / "baked.pt")
    baked = torch.load(tmp_path / "baked.pt")
    live = lp.merged_state_dict(lp.load(tied, tmp_path / "a.safetensors"))
    for name, tensor in baked.items():
        assert torch.equal(live[name], tensor), name
    assert torch.equal(live["head.weight"], live["embed.weight"])
