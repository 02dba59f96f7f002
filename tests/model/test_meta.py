"""Models without data: on the meta device, and offloaded by accelerate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from catalogue import BY_NAME, CASES, Case
from torch import nn

import lora_param as lp

DENSE = [case for case in CASES if "packed-base" not in case.name]


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_a_meta_model_has_shapes(case: Case) -> None:
    expected = case.adapted()(*case.data())
    with torch.device("meta"):
        model = case.make().to(case.dtype)
    case.apply(model)
    data = tuple(d.to("meta") for d in case.data())
    for train in (True, False):
        with torch.set_grad_enabled(train), torch.device("meta"):
            found = model(*data)
        assert found.is_meta
        assert found.shape == expected.shape
        assert found.dtype == expected.dtype


NAMES = """mlp embedding conv2d packed tied experts
mlp-dora conv2d-dora-two embedding-miss mlp-pissa mlp-bf16"""


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("name", NAMES.split())
def test_offloading_changes_nothing(name: str, how: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    case = BY_NAME[name]
    data, model = case.data(), case.adapted().eval()
    with torch.no_grad():
        expected = model(*data)
        options = {"offload_dir": str(tmp_path)} if how == "disk_offload" else {}
        getattr(accelerate, how)(model, execution_device=torch.device("cpu"), **options)
        assert any(p.is_meta for p in model.parameters())
        for _ in range(2):
            assert torch.equal(model(*data), expected)
        with lp.disabled(model):
            assert torch.equal(model(*data), case.build().eval()(*data))


def test_an_offloaded_model_of_linear_layers_trains() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    lp.apply(net, "all-linear", rank=2)
    x = torch.randn(3, 4)
    expected = net(x)
    accelerate.cpu_offload(net, execution_device=torch.device("cpu"))
    found = net(x)
    assert torch.equal(found, expected)
