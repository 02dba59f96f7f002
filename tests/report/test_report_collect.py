"""‖W‖ of targets in files: read a block at a time, and equal to the norm of what they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora_param as lp
from lora_param.checkpoint.create import create_adapter
from lora_param.checkpoint.open import open_checkpoint
from lora_param.checkpoint.safetensors import SafetensorsCheckpoint
from lora_param.formats import write_adapter

TARGETS = ["q", "kv[1/2]", "kv[:,5:90]", "experts[*]", "conv"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_norms_are_those_of_the_dense_weights(
    dtype: torch.dtype, suffix: str, tmp_path: Path
) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (700, 600), "kv": (900, 400), "experts": (3, 300, 500), "conv": (20, 30, 3, 3)}
    weights = {n: torch.randn(s, generator=g).to(dtype) for n, s in shapes.items()}
    path = tmp_path / f"base{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    for target in TARGETS:
        _, adapter = create_adapter(path, [target], rank=2, seed=0)
        write_adapter(adapter, tmp_path / "a.safetensors", force=True)
        (row,) = lp.stats(path, tmp_path / "a.safetensors").rows
        (made,) = adapter.targets.values()
        W = weights[made.target.name][made.target.region.index].double()
        norm = pytest.approx(float(W.norm()), rel=1e-5)  # a block is summed in fp32
        assert row.weight_norm == norm, target


def test_plain_norms_need_no_weight_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "base.safetensors"
    save_file({"q": torch.randn(700, 600), "kv": torch.randn(800, 400)}, path)
    _, adapter = create_adapter(path, ["q", "kv[0/2]"], rank=2, seed=0)
    write_adapter(adapter, tmp_path / "a.safetensors")
    sizes = [b.size for b in open_checkpoint(path).flat_blocks("q", 5, 300_000)]
    assert sizes == [1 << 18, 300_000 - 5 - (1 << 18)]

    def whole(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(SafetensorsCheckpoint, "array", whole)
    assert all(row.weight_norm for row in lp.stats(path, tmp_path / "a.safetensors").rows)
