"""The laws of the design, each over the whole catalogue, against plain modules holding W + ΔW."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from catalogue import (
    CASES,
    Case,
    dense_state,
    randomize,
    reference_output,
    reference_weights,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_param as lp
from lora_param.model.sites import adapter_names

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def run(model: nn.Module, data: tuple[Tensor, ...]) -> Tensor:
    return model(*data)


def plain_state(case: Case) -> dict[str, Tensor]:
    return dense_state(case.build())


def same(found: Tensor, expected: Tensor, case: Case) -> None:
    """Bit for bit, where the reference computes as the library does."""
    if case.exact_weights:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected)


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_law_1_fresh_adapter_changes_nothing(case: Case, training: bool) -> None:
    data, model = case.data(), case.apply(case.build()).train(training)
    plain = frozen(case.build()).train(training)
    parameters = dict(plain.named_parameters(remove_duplicate=False))
    for target in lp.get_adapter(model).targets.values():
        if (W := parameters[target.target.name]).is_floating_point():
            W.requires_grad_()  # attention chooses its kernel by this
    if case.exact_when_fresh:
        assert torch.equal(run(model, data), run(plain, data))
    else:
        torch.testing.assert_close(run(model, data), run(plain, data), **case.tolerance)


@every_case
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_law_2_value_equals_a_plain_weight(case: Case, training: bool) -> None:
    data, model = case.data(), case.adapted().train(training and not case.dropout)
    with torch.no_grad():
        torch.testing.assert_close(
            run(model, data), reference_output(case, model, data), **case.tolerance
        )
    torch.testing.assert_close(
        run(model, data), reference_output(case, model, data), **case.tolerance
    )


@every_case
def test_law_2_gradients_equal_a_plain_weights(case: Case) -> None:
    data, model = case.data(), case.adapted().train(not case.dropout)
    data = tuple(d.requires_grad_() if d.is_floating_point() else d for d in data)
    run(model, data).square().sum().backward()
    grads = {k: p.grad for k, p in _live_factors(model).items()}
    input_grads = [d.grad for d in data if d.is_floating_point()]

    again = tuple(d.detach().clone().requires_grad_(d.requires_grad) for d in data)
    factors = {k: p.detach().clone().requires_grad_() for k, p in _live_factors(model).items()}
    reference_output(case, model, again, factors).square().sum().backward()
    for key, factor in factors.items():
        assert grads[key] is not None, key
        _gradients_agree(grads[key], factor.grad, case)
    for found, expected in zip(
        input_grads, [d.grad for d in again if d.is_floating_point()], strict=True
    ):
        _gradients_agree(found, expected, case)


def _gradients_agree(found: Tensor, expected: Tensor, case: Case) -> None:
    if case.dtype.itemsize < 4:  # elements cancel: against the size of the whole
        difference = (found.float() - expected.float()).norm()
        assert difference <= 0.15 * expected.float().norm()
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def _live_factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapter, target key and factor name → the live parameter, found by the record's storage."""
    live = {p.data_ptr(): p for p in lp.parameters(model)}
    return {
        f"{adapter}:{k}": live[t.data_ptr()]
        for adapter in adapter_names(model)
        for k, t in lp.get_adapter(model, adapter).tensors.items()
        if t.data_ptr() in live
    }


@every_case
def test_law_2_weight_reads_as_the_sum(case: Case) -> None:
    model, base = case.adapted().eval(), plain_state(case)
    for name, expected in reference_weights(model, base, adapters=case.adapters).items():
        owner, _, tensor = name.rpartition(".")
        weight = getattr(model.get_submodule(owner), tensor)
        assert isinstance(weight, torch.Tensor)
        assert weight.shape == base[name].shape
        assert weight.dtype == base[name].dtype
        assert weight.requires_grad
        same(weight.detach(), expected.to(base[name].dtype), case)


@every_case
def test_law_3_disabled_is_the_base_after_training(case: Case) -> None:
    data = case.data()
    expected = run(frozen(case.build()).train(not case.dropout), data)
    model = case.adapted()
    optimizer = torch.optim.Adam(lp.parameters(model), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        run(model, data).square().sum().backward()
        optimizer.step()
        lp.disable(model)
        lp.enable(model)
    model.train(not case.dropout)
    before = run(model, data)
    with lp.disabled(model):
        assert torch.equal(run(model, data), expected)
        with lp.disabled(model):
            assert torch.equal(run(model, data), expected)
        assert torch.equal(run(model, data), expected)
    assert torch.equal(run(model, data), before)
    assert not torch.equal(before, expected)


@every_case
def test_training_changes_the_factors_alone_and_lowers_the_loss(case: Case) -> None:
    data, model = case.data(), case.adapted()
    base = {k: v.clone() for k, v in lp.base_state_dict(model).items()}
    factors = [p.detach().clone() for p in lp.parameters(model)]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in lp.parameters(model)
    }
    optimizer = torch.optim.Adam(lp.parameters(model), lr=0.01)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = run(model, data).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(v, base[k]) for k, v in lp.base_state_dict(model).items())
    assert not any(torch.equal(p, f) for p, f in zip(lp.parameters(model), factors, strict=True))


@every_case
def test_law_4_live_bake_rounds_once(case: Case) -> None:
    model, base = case.adapted(), plain_state(case)
    references = reference_weights(model, base, adapters=case.adapters)
    expected = {n: w.to(base[n].dtype) for n, w in references.items()}
    merged = lp.merged_state_dict(model)
    identity = dict(case_parameters(model))
    baked = lp.bake(model).state_dict()
    assert list(baked) == list(base) == list(merged)
    for name, value in baked.items():
        same(value, expected.get(name, base[name]), case)
        assert torch.equal(value, merged[name]), name
    if "apart" not in case.name and "packed-base" not in case.name:  # which get a base of their own
        assert all(dict(model.named_parameters())[n] is p for n, p in identity.items())
    assert not any("Parametrized" in type(m).__name__ for m in model.modules())


def case_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Base parameters under their original names."""
    found = []
    for name, parameter in model.named_parameters():
        head, hit, tail = name.rpartition("parametrizations.")
        if hit and tail.endswith(".original"):
            found.append((f"{head}{tail.removesuffix('.original')}", parameter))
        elif not hit:
            found.append((name, parameter))
    return found


@every_case
def test_law_4_file_bake_gives_the_same_bits(case: Case, tmp_path: Path) -> None:
    model = case.adapted()
    plain = case.build()
    tied = "tied" in case.name or "shared" in case.name
    if tied:
        torch.save(plain.state_dict(), tmp_path / "base.pt")
    else:
        save_file(dense_state(plain), tmp_path / "base.safetensors")
    suffix = "pt" if tied else "safetensors"
    out = tmp_path / f"baked.{suffix}"
    lp.bake_checkpoint(tmp_path / f"base.{suffix}", save_all(case, model, tmp_path), out)
    baked = torch.load(out, weights_only=True) if tied else load_file(out)
    live = lp.bake(model).state_dict()
    assert set(baked) == set(live)
    assert all(torch.equal(baked[k], live[k]) for k in live)


@every_case
def test_law_5_remove_restores(case: Case) -> None:
    model = case.build()
    parameters = list(model.named_parameters())
    next(iter(model.parameters())).requires_grad_(False)
    grads = {n: p.requires_grad for n, p in parameters}
    classes = [type(m) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    names = [n for n, _ in model.named_modules()]
    randomize(case.apply(model))
    lp.remove(model)
    assert [type(m) for m in model.modules()] == classes
    assert [n for n, _ in model.named_modules()] == names
    again = list(model.named_parameters())
    assert [n for n, _ in again] == [n for n, _ in parameters]
    assert all(a is b for (_, a), (_, b) in zip(again, parameters, strict=True))
    assert {n: p.requires_grad for n, p in again} == grads
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    case.apply(model)  # and it can be applied again
    assert lp.parameters(model)


def save_all(case: Case, model: nn.Module, directory: Path) -> list[Path]:
    """A file for each adapter."""
    return [lp.save(model, directory / f"{name}.safetensors", name) for name in case.adapters]


def load_all(case: Case, model: nn.Module, directory: Path) -> nn.Module:
    for name in case.adapters:
        lp.load(model, directory / f"{name}.safetensors", name)
    return model


@every_case
def test_law_6_save_and_load_is_the_identity(case: Case, tmp_path: Path) -> None:
    data, model = case.data(), case.adapted().eval()
    lp.set_scale(model, 0.5)
    files = save_all(case, model, tmp_path)
    fresh = load_all(case, case.build(), tmp_path).eval()
    assert torch.equal(run(fresh, data), run(model, data))
    into = load_all(case, case.apply(case.build()), tmp_path).eval()
    assert torch.equal(run(into, data), run(model, data))
    for loaded in (fresh, into):
        for name in case.adapters:
            assert lp.get_adapter(loaded, name).targets == lp.get_adapter(model, name).targets
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
    again = tmp_path / "again"
    again.mkdir()
    for file, second in zip(files, save_all(case, fresh, again), strict=True):
        assert second.read_bytes() == file.read_bytes()


@every_case
def test_copies_and_pickles_stand_on_their_own(case: Case) -> None:
    data, model = case.data(), case.adapted().train(not case.dropout)
    run(model, data).square().sum().backward()
    model.zero_grad()
    expected, base = run(model, data), run(frozen(case.build()), data)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(run(twin, data), expected)
        randomize(twin, 0.7)
        assert torch.equal(run(model, data), expected)
        lp.remove(twin)
        torch.testing.assert_close(run(twin, data), base)
        assert torch.equal(run(model, data), expected)


@every_case
def test_a_base_state_dict_loads_under_its_original_names(case: Case) -> None:
    data, model = case.data(), case.adapted()
    other = case.build()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    factors = [p.detach().clone() for p in lp.parameters(model)]
    for assign in (False, True):
        assert not any(model.load_state_dict(other.state_dict(), assign=assign))
        state = lp.base_state_dict(model)
        assert list(state) == list(other.state_dict())
        assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
        assert all(torch.equal(a, b) for a, b in zip(lp.parameters(model), factors, strict=True))
        with lp.disabled(model):
            torch.testing.assert_close(run(model, data), run(other, data))


@every_case
def test_two_adapters_add_up(case: Case) -> None:
    data = case.data()
    model = case.adapted()
    case.apply(model, adapter="second")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in lp.parameters(model, "second"):
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    base = plain_state(case)
    first = reference_weights(model, base, adapters=case.adapters)
    second = reference_weights(model, base, adapters=("second",))
    merged = lp.merged_state_dict(model)
    for name, W in base.items():
        expected = W + (first.get(name, W) - W) + (second.get(name, W) - W)
        torch.testing.assert_close(merged[name], expected.to(W.dtype))
    lp.remove(model, "second")
    assert torch.equal(run(model.eval(), data), run(case.adapted().eval(), data))
