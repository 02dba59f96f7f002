"""What W is as numbers is asked of its `Storage`, by everything; the laws run on packed weights."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import packed
import pytest
import torch
from catalogue import CASES, Case, randomize
from packed import Int8Flat, Int8Rows, PackedNet

import lora_param as lp

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])

PACKED = [case for case in CASES if "packed-base" in case.name]


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_an_adapted_packed_weight_is_read_by_its_storage_alone(case: Case) -> None:
    model, data = case.adapted(), case.data()
    packed.asked.clear()
    model(*data).square().sum().backward()
    with torch.no_grad():
        model.eval()(*data)
    assert not packed.asked


def test_every_verb_takes_a_base_that_reads_as_bytes() -> None:
    model = PackedNet(Int8Flat)
    assert lp.plan(model, ["fc"], rank=2, alpha=4).targets[0].target.name == "fc.weight"
    shapes = {w.name: w.shape for w in lp.stats(model).weights}
    assert shapes["table.weight"] == (11, 6)
    lp.apply(model, ["fc", "bare", "table"], rank=2, alpha=4, init="pissa")
    randomize(model)
    assert [r.shape for r in lp.stats(model).rows] == [(5, 4), (11, 6), (5, 6)]
    ids = torch.tensor([[1, 2, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(ids)
    with torch.no_grad(), lp.cached(model):
        torch.testing.assert_close(model(ids), expected)
    report = lp.verify(model, lambda m: m(ids).square().mean())
    assert {c.name for c in report.failures} <= {"share"}
    assert "int8" not in lp.stats(model).to_html()
    merged = lp.merged_state_dict(model)
    lp.bake(model)
    assert {n: tuple(p.shape) for n, p in model.named_parameters() if p.dim() > 1} == {
        "bare": (5, 4),
        "table.weight": (11, 6),
        "fc.weight": (5, 6),
    }
    assert all(torch.equal(v, merged[n]) for n, v in model.state_dict().items())


def net(kind: type[Int8Rows]) -> PackedNet:
    torch.manual_seed(0)
    return PackedNet(kind)


def adapted(kind: type[Int8Rows], variant: str, std: float = 0.3) -> PackedNet:
    model = lp.apply(net(kind), ["table", "fc", "bare"], rank=2, alpha=4, variant=variant)
    randomize(model, std)
    return model


def pickled(model: PackedNet, _: Path) -> PackedNet:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model: PackedNet, _: Path) -> PackedNet:
    variant = lp.get_adapter(model).targets["fc.weight"].settings.variant
    other = adapted(type(lp.base_state_dict(model)["bare"]), variant, std=0.1)
    other.load_state_dict(model.state_dict())
    return other


def saved(model: PackedNet, folder: Path) -> PackedNet:
    lp.save(model, folder / "a.safetensors")
    return lp.load(net(type(lp.base_state_dict(model)["bare"])), folder / "a.safetensors")


def recast(model: PackedNet, _: Path) -> PackedNet:
    model.load_state_dict(lp.base_state_dict(model))
    return model


@pytest.mark.parametrize("variant", ["lora", "dora", "miss"])
@pytest.mark.parametrize("kind", [Int8Rows, Int8Flat])
@pytest.mark.parametrize("way", [lambda m, _: copy.deepcopy(m), pickled, loaded, saved, recast])
def test_a_packed_base_is_copied_saved_and_loaded_like_a_plain_one(
    way: Callable[[PackedNet, Path], PackedNet],
    kind: type[Int8Rows],
    variant: str,
    tmp_path: Path,
) -> None:
    model = adapted(kind, variant)
    expected = model(IDS)
    torch.testing.assert_close(way(model, tmp_path)(IDS), expected, rtol=0, atol=0)
    plain = lp.bake(model)(IDS)
    torch.testing.assert_close(expected, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_packed_base_is_cast_like_a_plain_one(dtype: torch.dtype) -> None:
    model = adapted(Int8Rows, "lora")
    plain = lp.bake(copy.deepcopy(model)).to(dtype)
    y = model.to(dtype)(IDS)
    assert model.fc.weight.dtype is y.dtype is dtype
    tolerance = 8 * torch.finfo(dtype).eps if dtype is not torch.float64 else 1e-6
    torch.testing.assert_close(y, plain(IDS), rtol=tolerance, atol=tolerance)
    lp.bake(model)
    assert model.fc.weight.dtype is dtype


@pytest.mark.parametrize("kind", [Int8Rows, Int8Flat])
def test_a_packed_base_compiles_as_one_graph(kind: type[Int8Rows]) -> None:
    model = adapted(kind, "lora")
    expected = model(IDS)
    torch._dynamo.reset()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert all(p.grad is not None for p in lp.parameters(model))
