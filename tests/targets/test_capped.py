"""A rank above min(out, in) is capped there, at the scale that was asked for, and said."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_param as lp
from lora_param.report.terminal import plain_text, plan_view
from lora_param.targets.plan import make_plan
from lora_param.targets.settings import Settings

SHAPES = {
    "q.weight": (16, 16),
    "gate.weight": (1, 16),
    "head.weight": (2, 16),
    "conv.weight": (3, 2, 1, 1),
    "experts": (4, 5, 16),
    "packed": (18, 16),
}
PATTERNS = ["q", "gate", "head", "conv", "experts[*]", "packed[0/3]"]


@pytest.mark.parametrize("alpha", [16.0, 0.1, 1 / 3])
@pytest.mark.parametrize("scaling", ["standard", "rslora", "constant"])
def test_a_rank_above_a_matrix_is_capped_at_the_scale_asked_for(scaling: str, alpha: float) -> None:
    asked = Settings(rank=7, alpha=alpha, scaling=scaling)
    plan = make_plan(SHAPES, PATTERNS, settings=asked)
    ranks = {str(t.target): t.settings.rank for t in plan.targets}
    assert ranks == {
        "q.weight": 7,
        "gate.weight": 1,
        "head.weight": 2,
        "conv.weight": 2,
        "experts[*]": 5,
        "packed[0:6]": 6,
    }
    assert {t.settings.scale for t in plan.targets} == {asked.scale}, "exactly"
    assert [t.asked for t in plan.targets] == [None, 7, 7, 7, 7, 7]
    assert plan.targets[0].settings == asked


def test_a_capped_rank_is_said_in_the_plan_and_the_table() -> None:
    plan = make_plan(SHAPES, ["q", "gate", "head:rank=3"])
    data = json.loads(json.dumps(plan.to_dict()))
    assert [(t["rank"], t["asked"], t["scale"]) for t in data["targets"]] == [
        (8, None, 2.0),
        (1, 8, 2.0),
        (2, 3, 16 / 3),
    ]
    table = plain_text(plan_view(plan), 100).splitlines()
    assert any("gate" in line and "rank 8 asked" in line for line in table)
    assert any("head" in line and "rank 3 asked" in line for line in table)
    assert not any("q.weight" in line and "asked" in line for line in table)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 16)
        self.head = nn.Linear(16, 2)
        self.gate = nn.Linear(16, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x).relu()
        return self.head(h) * self.gate(h).sigmoid()


@pytest.mark.parametrize("options", [{}, {"variant": "dora"}, {"init": "pissa"}])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_a_model_with_a_small_head_is_adapted_and_saved(
    scaling: str, options: dict[str, str], tmp_path: Path
) -> None:
    x = torch.randn(5, 6)
    model = lp.apply(Net(), rank=7, alpha=3, scaling=scaling, **options)
    want = Settings(7, 3.0, scaling).scale
    assert {t.settings.scale for t in lp.get_adapter(model).targets.values()} == {want}
    assert [row.rank for row in lp.stats(model).rows] == [6, 2, 1]
    torch.testing.assert_close(model(x), Net()(x), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(lp.parameters(model), lr=0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    path = tmp_path / "a.safetensors"
    lp.save(model, path)
    assert {t.settings.scale for t in lp.read_adapter(path).targets.values()} == {want}
    assert torch.equal(lp.load(Net(), path)(x), model(x))
    baked = lp.bake(copy.deepcopy(model))
    torch.testing.assert_close(baked(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("region", ["", "[*]", "[0:3]"])
def test_an_adapter_in_a_file_may_have_a_rank_above_its_matrix(region: str, tmp_path: Path) -> None:
    """Other tools write such: read, attached, trained, switched and baked like any other."""
    rank, stack = 9, (4,) if region == "[*]" else ()
    rows = 3 if region == "[0:3]" else 4 if not stack else 5
    shape = (4, 5, 6) if stack else (4, 6)
    torch.manual_seed(0)
    holder = nn.Module()
    holder.w = nn.Parameter(torch.randn(shape))
    small = lp.get_adapter(lp.apply(copy.deepcopy(holder), [f"w{region}"], rank=1))
    key = f"w{region}"
    A, B = torch.randn(*stack, rank, 6), torch.randn(*stack, rows, rank)
    target = small.targets[key]
    wide = lp.Adapter(
        {key: type(target)(target.target, Settings(rank, 18.0))},
        {f"{key}.lora_A": A, f"{key}.lora_B": B},
        small.base,
    )
    path = tmp_path / "wide.safetensors"
    lp.write_adapter(wide, path)
    assert lp.read_adapter(path).targets[key].settings.rank == rank
    torch.save(holder.state_dict(), tmp_path / "base.pt")
    lp.bake_checkpoint(tmp_path / "base.pt", path, tmp_path / "baked.pt")
    model = lp.load(copy.deepcopy(holder), path)
    want = holder.w.detach().clone()
    want[:rows] += 0 if stack else 2 * (B @ A)
    want = want + 2 * (B @ A) if stack else want
    torch.testing.assert_close(model.w.to_dense() if model.w.is_sparse else model.w + 0, want)
    merged = lp.merged_state_dict(model)["w"]
    torch.testing.assert_close(merged, want)
    assert torch.equal(torch.load(tmp_path / "baked.pt")["w"], merged)
    assert math.isfinite(lp.stats(model).rows[0].effective_rank or math.nan)
    if not stack:
        x = torch.randn(7, 6)
        torch.testing.assert_close(nn.functional.linear(x, model.w), x @ want.T)
        nn.functional.linear(x, model.w).sum().backward()
        assert all(p.grad is not None for p in lp.parameters(model))
