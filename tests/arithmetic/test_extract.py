"""The difference of two checkpoints, and comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lora_param as lp
from lora_param.arithmetic.diff import diff
from lora_param.arithmetic.extract import extract
from lora_param.errors import (
    FingerprintError,
    MismatchError,
    NoDifferenceError,
    NonFiniteError,
    OptionError,
)


def base() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "model.embed_tokens.weight": torch.randn(50, 16),
        "model.layers.0.q_proj.weight": torch.randn(24, 16),
        "model.layers.0.k_proj.weight": torch.randn(24, 16),
        "model.layers.0.norm.weight": torch.randn(16),
        "model.layers.0.experts.down_proj": torch.randn(3, 10, 8),
        "conv.weight": torch.randn(6, 4, 3),
        "steps": torch.tensor(3),
    }


def planted(name: str, rank: int) -> Tensor:
    shape = base()[name].shape
    torch.manual_seed(len(name))
    if len(shape) == 3 and not name.endswith("weight"):
        return torch.randn(shape[0], shape[1], rank) @ torch.randn(shape[0], rank, shape[2])
    flat = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1:].numel())
    return flat.view(shape) * 0.1


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    tuned = base()
    for name in ("model.layers.0.q_proj.weight", "model.layers.0.experts.down_proj", "conv.weight"):
        tuned[name] = tuned[name] + planted(name, 2)
    tuned["model.layers.0.norm.weight"] = tuned["model.layers.0.norm.weight"] * 2
    save_file(base(), tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


@pytest.mark.parametrize("exact", [False, True])
def test_a_planted_difference_returns(files, exact):
    found = extract(*files, rank=2, exact=exact)
    assert {r.target for r in found.rows} == {
        "model.layers.0.q_proj.weight",
        "model.layers.0.experts.down_proj[*]",
        "conv.weight",
    }
    for row in found.rows:
        t = found.adapter.targets[row.target]
        f = found.adapter.factors(row.target)
        delta = (f["lora_B"] @ f["lora_A"]).view(row.shape)
        expected = planted(t.target.name, 2)
        assert torch.linalg.norm(delta - expected) / torch.linalg.norm(expected) < 1e-5
        assert row.energy == pytest.approx(1, abs=1e-6)
    moved = {m.name: m for m in found.moved}
    assert list(moved) == ["model.layers.0.norm.weight"]
    assert moved["model.layers.0.norm.weight"].reason == "1-dimensional"
    assert moved["model.layers.0.norm.weight"].relative_norm == pytest.approx(1.0)
    assert found.unchanged == 2


def test_the_adapter_leads_from_one_to_the_other(files, tmp_path):
    found = extract(*files, energy=0.9999999)
    assert {r.rank for r in found.rows} == {2}
    lp.write_adapter(found.adapter, tmp_path / "a.safetensors")
    lp.bake_checkpoint(files[0], tmp_path / "a.safetensors", tmp_path / "baked.safetensors")
    rows = diff(tmp_path / "baked.safetensors", files[1]).rows
    assert all(r.ratio is not None and r.ratio < 1e-5 for r in rows if "norm" not in r.name)


def test_targets_choose(files):
    found = extract(*files, targets=["q_proj"], rank=1)
    assert [r.target for r in found.rows] == ["model.layers.0.q_proj.weight"]
    assert {m.reason for m in found.moved} == {"not asked for", "1-dimensional"}


def test_other_shapes_prefixes_and_names(files, tmp_path):
    from safetensors.torch import load_file

    tuned = load_file(files[1])
    tuned["model.embed_tokens.weight"] = torch.randn(52, 16)
    tuned["new.weight"] = torch.randn(2, 2)
    del tuned["model.layers.0.k_proj.weight"]
    tuned = {n.replace("model.l", "language_model.l"): t for n, t in tuned.items()}
    save_file(tuned, tmp_path / "other.safetensors")
    found = extract(files[0], tmp_path / "other.safetensors", rank=2)
    assert len(found.rows) == 3
    reasons = {m.name: m.reason for m in found.moved}
    assert reasons["model.embed_tokens.weight"] == "(50, 16) became (52, 16)"
    assert reasons["model.layers.0.k_proj.weight"].endswith("base.safetensors alone")
    assert reasons["new.weight"].endswith("other.safetensors alone")


def test_bfloat16_is_compared_in_fp32(tmp_path):
    W = base()["model.layers.0.q_proj.weight"].bfloat16()
    V = (W.float() + planted("model.layers.0.q_proj.weight", 1)).bfloat16()
    save_file({"q_proj.weight": W}, tmp_path / "a.safetensors")
    save_file({"q_proj.weight": V}, tmp_path / "b.safetensors")
    found = extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", rank=1)
    f = found.adapter.factors("q_proj.weight")
    assert f["lora_A"].dtype == torch.float32
    assert 0.9 < found.energy < 1


@pytest.mark.parametrize(
    ("change", "options", "error", "says"),
    [
        ({}, {"rank": 1, "energy": 0.5}, OptionError, "rank and energy"),
        ({}, {}, NoDifferenceError, "no matrix of"),
        ({"model.layers.0.norm.weight": torch.zeros(16)}, {}, NoDifferenceError, "norm"),
        ({"conv.weight": torch.full((6, 4, 3), float("nan"))}, {}, NonFiniteError, "conv"),
    ],
)
def test_what_cannot_be_extracted(change, options, error, says, files, tmp_path):
    save_file({**base(), **change}, tmp_path / "x.safetensors")
    with pytest.raises(error, match=says):
        extract(files[0], tmp_path / "x.safetensors", **options)


def test_nothing_in_common(files, tmp_path):
    save_file({"x": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(MismatchError, match="In the adapter alone: x"):
        extract(files[0], tmp_path / "x.safetensors")


# --- diff --------------------------------------------------------------------------------------


def test_the_same_checkpoint(files):
    found = diff(files[0], files[0])
    assert found.same
    assert (found.compared, found.kind) == (7, "checkpoints")


def test_two_checkpoints(files):
    rows = {r.name: r for r in diff(files[1], files[0]).rows}
    assert set(rows) == {
        "model.layers.0.q_proj.weight",
        "model.layers.0.experts.down_proj",
        "conv.weight",
        "model.layers.0.norm.weight",
    }
    q = rows["model.layers.0.q_proj.weight"]
    delta = planted(q.name, 2)
    assert (q.rank, q.changed, q.total) == (2, 24 * 16, 24 * 16)
    assert q.norm == pytest.approx(float(torch.linalg.norm(delta)), rel=1e-5)
    assert rows["model.layers.0.norm.weight"].ratio == pytest.approx(1.0)
    assert rows["model.layers.0.norm.weight"].rank is None


def test_is_this_file_really_base_plus_adapter(files, tmp_path):
    adapter, merged = tmp_path / "a.safetensors", tmp_path / "merged.safetensors"
    lp.write_adapter(extract(*files, rank=1).adapter, adapter)
    lp.bake_checkpoint(files[0], adapter, merged)
    found = diff(merged, files[0], adapter)
    assert found.same
    assert found.kind == "baked"
    wrong = diff(files[0], files[0], adapter)
    assert {r.name for r in wrong.rows} == {
        t.target.name for t in lp.read_adapter(adapter).targets.values()
    }
    with pytest.raises(FingerprintError):
        diff(merged, files[1], adapter)


def test_a_file_merged_in_another_dtype_is_compared_in_that_dtype_and_it_says_so(files, tmp_path):
    adapter, merged = tmp_path / "a.safetensors", tmp_path / "merged.safetensors"
    lp.write_adapter(extract(*files, rank=1).adapter, adapter)
    lp.bake_checkpoint(files[0], adapter, merged, dtype="bfloat16")
    found = diff(merged, files[0], adapter)
    assert found.same
    (note,) = found.notes
    assert "6 weights, float32 in the base, are bfloat16 in what was merged" in note
    assert note in " ".join(str(found).split())
    lp.bake_checkpoint(files[0], [(adapter, 0.5)], merged, dtype="bfloat16", force=True)
    wrong = diff(merged, files[0], adapter)
    changed = {t.target.name for t in lp.read_adapter(adapter).targets.values()}
    assert {r.name for r in wrong.rows} == changed
    assert all(r.what == "values" for r in wrong.rows)


def test_two_adapters(files, tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    lp.write_adapter(extract(*files, rank=2).adapter, a)
    lp.write_adapter(extract(*files, targets=["q_proj", "conv"], rank=1).adapter, b)
    assert diff(a, a).same
    rows = {r.name: r for r in diff(a, b).rows}
    assert rows["model.layers.0.experts.down_proj[*]"].what.endswith("a.safetensors alone")
    q = rows["model.layers.0.q_proj.weight"]
    assert q.what == "rank 2 and 1"
    assert q.overlap == pytest.approx(1.0, abs=1e-4)  # b's direction is the first of a's
    assert 0 < (q.ratio or 0) < 1


def test_an_adapter_and_a_checkpoint(files, tmp_path):
    lp.write_adapter(extract(*files, rank=1).adapter, tmp_path / "a.safetensors")
    with pytest.raises(OptionError, match="MERGED BASE ADAPTER"):
        diff(files[0], tmp_path / "a.safetensors")
