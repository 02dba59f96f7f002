"""What W is as numbers is asked of its `Storage`, by everything; the laws run on packed weights."""

from __future__ import annotations

import warnings

import packed
import pytest
import torch
from catalogue import CASES, Case, randomize
from packed import Int8Flat, PackedNet

import lora_param as lp

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
