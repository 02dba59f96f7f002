"""Sums and lower ranks of adapters, held against ΔW itself and against PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import lora_param as lp
from lora_param.adapter import Adapter
from lora_param.arithmetic.combine import METHODS, Compressed, combine
from lora_param.arithmetic.resize import resize
from lora_param.errors import MismatchError, OptionError, OverlapError, VariantError


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 10)
        self.conv = nn.Conv2d(4, 6, 3)
        self.experts = nn.Parameter(torch.randn(3, 8, 6))


TARGETS = ["fc", "conv", "experts[*]"]


def made(seed: int, targets: list[str] = TARGETS, **options: object) -> Adapter:
    """An adapter with random factors, on one and the same base."""
    torch.manual_seed(0)
    model = Experts()
    options = {"rank": 3, "alpha": 6, **options}
    lp.apply(model, targets, **options)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for p in lp.parameters(model):
        nn.init.normal_(p)
    return lp.get_adapter(model)


def deltas(adapter: Adapter) -> Mapping[str, Tensor]:
    found = {}
    for key, t in adapter.targets.items():
        f = adapter.factors(key)
        product = f["lora_B"].double() @ f["lora_A"].double()
        if "initial_B" in f:
            product = product - f["initial_B"].double() @ f["initial_A"].double()
        found[key] = t.scale * t.strength * product * t.enabled
    return found


def test_one_with_weight_one_is_itself():
    a = made(1)
    assert combine([a], [1.0]).targets == a.targets
    for name, tensor in combine([a], [1.0]).tensors.items():
        assert torch.equal(tensor, a.tensors[name])


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -1.0), (2.0, 0.0)])
def test_cat_is_the_sum(weights):
    a, b = made(1), made(2, rank=2, scaling="rslora")
    total = combine([a, b], weights)
    for key, found in deltas(total).items():
        expected = weights[0] * deltas(a)[key] + weights[1] * deltas(b)[key]
        assert torch.allclose(found, expected, atol=1e-6, rtol=1e-6)
    assert all(t.settings.rank == 5 and t.scale == 1 for t in total.targets.values())


def test_other_targets_and_disabled_ones():
    a, b = made(1, ["fc"]), made(2, ["conv", "fc"])
    b.targets["fc.weight"] = replace(b.targets["fc.weight"], enabled=False)
    total = combine([a, b], [1.0, 1.0])
    assert set(total.targets) == {"fc.weight", "conv.weight"}
    assert torch.allclose(deltas(total)["fc.weight"], deltas(a)["fc.weight"], atol=1e-6)


def test_svd_loses_the_truncated_tail_and_says_so():
    a, b = made(1), made(2)
    told: list[Compressed] = []
    total = combine([a, b], [0.5, 0.5], method="svd", rank=2, report=told.append)
    exact = deltas(combine([a, b], [0.5, 0.5]))
    for row, (key, found) in zip(told, deltas(total).items(), strict=True):
        assert (row.target, row.before, row.rank) == (key, 6, 2)
        values = torch.linalg.svdvals(exact[key])
        tail = values[..., 2:].square().sum().sqrt() / values.square().sum().sqrt()
        lost = torch.linalg.vector_norm(found - exact[key]) / torch.linalg.vector_norm(exact[key])
        assert row.error == pytest.approx(float(lost), abs=1e-5)
        assert float(lost) == pytest.approx(float(tail), abs=1e-5)


def test_an_initial_pair_takes_part():
    a, b = made(1, ["fc"], init="pissa"), made(2, ["fc"])
    total = combine([a, b], [1.0, 1.0])
    expected = deltas(a)["fc.weight"] + deltas(b)["fc.weight"]
    assert torch.allclose(deltas(total)["fc.weight"], expected, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -0.5)])
def test_as_peft_combines(method, weights):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 10))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    model = peft.get_peft_model(net, config, "one")
    model.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"]))
    layer = model.base_model.model[0]
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    plain = {"one": made(1, ["fc"], alpha=6), "two": made(1, ["fc"], alpha=3)}
    for name, adapter in plain.items():
        for factor in ("lora_A", "lora_B"):
            value = getattr(layer, factor)[name].weight.detach().clone()
            adapter.tensors[f"fc.weight.{factor}"] = value  # type: ignore[index]
    density = 1.0 if method == "dare_linear" else 0.5  # its draws are its own
    options = {} if method == "linear" else {"density": density}
    if method == "dare_linear":
        with pytest.warns(UserWarning, match="no pruning"):
            model.add_weighted_adapter(["one", "two"], list(weights), "sum", method, **options)
    else:
        model.add_weighted_adapter(["one", "two"], list(weights), "sum", method, **options)
    ours = method.removesuffix("_linear")
    total = combine([plain["one"], plain["two"]], weights, method=ours, **options)
    expected = layer.get_delta_weight("sum").double()
    assert torch.allclose(deltas(total)["fc.weight"], expected, atol=1e-5)


def test_dare_is_right_on_average_and_repeatable():
    a = made(1, ["fc"])
    draws = [combine([a], [1.0], method="dare", seed=s) for s in range(300)]
    mean = torch.stack([deltas(d)["fc.weight"] for d in draws]).mean(0)
    exact = deltas(a)["fc.weight"]
    assert torch.linalg.norm(mean - exact) / torch.linalg.norm(exact) < 0.15
    again = combine([a], [1.0], method="dare", seed=0)
    assert torch.equal(again.tensors["fc.weight.lora_A"], draws[0].tensors["fc.weight.lora_A"])


def test_core_space_of_one_kept_whole_is_exact():
    a = made(1)
    total = combine([a], [1.0], method="core-space", density=1.0)
    for key, found in deltas(total).items():
        assert torch.allclose(found, deltas(a)[key], atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_an_adapter_that_loads(method, tmp_path):
    total = combine([made(1), made(2)], [0.5, 0.5], method=method)
    lp.write_adapter(total, tmp_path / "c.safetensors")
    torch.manual_seed(0)
    model = lp.load(Experts(), tmp_path / "c.safetensors")
    torch.manual_seed(0)
    base = Experts()
    expected = base.fc.weight + deltas(total)["fc.weight"].float()
    assert torch.allclose(model.fc.weight, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("adapters", "weights", "options", "error", "says"),
    [
        (lambda: [made(1)], [1.0, 2.0], {}, OptionError, "one for each of 1"),
        (list, [], {}, OptionError, "one for each of 0"),
        (lambda: [made(1)], [float("nan")], {}, OptionError, "finite"),
        (lambda: [made(1)], [1.0], {"method": "mean"}, OptionError, "cat, svd, linear"),
        (lambda: [made(1)], [0.5], {"method": "ties", "density": 0.0}, OptionError, "density"),
        (lambda: [made(1)], [0.5], {"density": 0.3}, OptionError, "none with cat; ties, dare"),
        (lambda: [made(1)], [0.5], {"method": "svd", "density": 0.5}, OptionError, "none with svd"),
        (lambda: [made(1)], [0.5], {"rank": 0}, OptionError, "rank is 0"),
        (lambda: [made(1), made(2, rank=2)], [1, 1], {"method": "ties"}, OptionError, "its ranks"),
        (lambda: [made(1, ["fc"], variant="dora")], [0.5], {}, VariantError, "fc.weight"),
        (lambda: [made(1, ["fc"]), made(2, ["fc[0:4]"])], [1, 1], {}, OverlapError, "fc.weight"),
    ],
)
def test_what_cannot_be_combined(adapters, weights, options, error, says):
    with pytest.raises(error, match=says):
        combine(adapters(), weights, **options)


def test_another_base_is_refused():
    a, b = made(1, ["fc"]), made(2, ["fc"])
    b.base["fc.weight"] = replace(b.base["fc.weight"], hash="0" * 16)
    with pytest.raises(MismatchError, match=r"fc\.weight: values"):
        combine([a, b], [1.0, 1.0])


@pytest.mark.parametrize("keep", [{"rank": 2}, {"energy": 0.8}, {"error": 0.3}])
def test_resize_is_the_best_there_is(keep):
    a = made(1)
    told: list[Compressed] = []
    small = resize(a, **keep, report=told.append)
    for row in told:
        exact, found = deltas(a)[row.target], deltas(small)[row.target]
        values = torch.linalg.svdvals(exact)
        best = values[..., row.rank :].square().sum().sqrt() / values.square().sum().sqrt()
        lost = torch.linalg.vector_norm(found - exact) / torch.linalg.vector_norm(exact)
        assert float(lost) == pytest.approx(float(best), abs=1e-5)
        assert row.error == pytest.approx(float(best), abs=1e-5)
        if "error" in keep:
            assert float(lost) <= 0.3 + 1e-6
        if "energy" in keep:
            assert float(lost) ** 2 <= 0.2 + 1e-6


def test_resize_keeps_what_is_disabled_and_takes_in_the_strength():
    a = made(1)
    a.targets["fc.weight"] = replace(a.targets["fc.weight"], enabled=False, strength=0.5)
    small = resize(a, rank=3)
    t = small.targets["fc.weight"]
    assert (t.enabled, t.strength, t.scale) == (False, 1.0, 1.0)
    f, g = small.factors("fc.weight"), a.factors("fc.weight")
    assert torch.allclose(f["lora_B"] @ f["lora_A"], g["lora_B"] @ g["lora_A"], atol=1e-5)


def test_resize_of_dora_is_refused():
    with pytest.raises(VariantError, match=r"fc\.weight of .* is dora"):
        resize(made(1, ["fc"], variant="dora"), rank=1)
