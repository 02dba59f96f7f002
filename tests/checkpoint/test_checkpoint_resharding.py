"""--max-shard-size and --link: other files, the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_samples import expected, trained, weights
from test_checkpoint_shards import shard

import lora_param as lp
from lora_param.checkpoint.create import create_adapter
from lora_param.checkpoint.open import open_checkpoint
from lora_param.checkpoint.options import parse_size
from lora_param.errors import OptionError


@pytest.mark.parametrize("limit", [1, 100, 150, "1kB"])
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_weights_are_divided_anew(limit: int | str, dtype: str | None, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    shard(model)
    (model / "config.json").write_text('{"dtype": "float32"}')
    _, fresh = create_adapter(model, ["a.q"], rank=2, seed=0)
    adapter = trained(fresh)
    lp.bake_checkpoint(model, adapter, out, max_shard_size=limit, dtype=dtype, verify=True)
    wanted = torch.bfloat16 if dtype else None
    with open_checkpoint(out) as baked:
        assert set(baked) == set(weights())
        for name, W in weights().items():
            to = wanted if wanted and W.is_floating_point() else W.dtype
            want = expected(W, adapter, name, to) if name == "a.q.weight" else W.to(to)
            assert baked[name].dtype == to
            assert torch.equal(baked[name], want), name
        size = baked.nbytes
    files = sorted(p.name for p in out.glob("*.safetensors"))
    if limit == "1kB":
        assert files == ["model.safetensors"]
        assert not list(out.glob("*.index.json"))
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == size
        assert sorted(set(index["weight_map"].values())) == files
        for name in files:
            with open_checkpoint(out / name) as part:
                assert part.nbytes <= parse_size(limit) or len(part) == 1
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype_name(dtype)


def dtype_name(dtype: str | None) -> str:
    return "bfloat16" if dtype else "float32"


def test_sizes_are_read_and_what_has_no_shards_is_refused(base, adapter, tmp_path: Path) -> None:
    assert [parse_size(s) for s in (7, "7", "2kb", "1.5MiB", "5 GB")] == [
        7, 7, 2000, 1_572_864, 5_000_000_000,
    ]  # fmt: skip
    for size in (0, -1, "many", "5XB", ""):
        with pytest.raises(OptionError, match="5GB"):
            lp.bake_checkpoint(base, adapter, tmp_path / "o.safetensors", max_shard_size=size)
    with pytest.raises(OptionError, match="directory of safetensors"):
        lp.bake_checkpoint(base, adapter, tmp_path / "o.safetensors", max_shard_size="5GB")


@pytest.mark.parametrize("can", [True, False])
def test_untouched_files_are_links_where_asked_for(can: bool, tmp_path: Path, monkeypatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    files = shard(model)
    _, fresh = create_adapter(model, ["a.q"], rank=2, seed=0)
    if not can:

        def refuse(*_: object) -> None:
            raise OSError

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    lp.bake_checkpoint(model, trained(fresh), tmp_path / "linked", link=True, verify=True)
    lp.bake_checkpoint(model, trained(fresh), tmp_path / "plain")
    same = {
        out: [(tmp_path / out / f).samefile(model / f) for f in files]
        for out in ("linked", "plain")
    }
    assert same == {"linked": [False, can], "plain": [False, False]}
    for name in files:
        assert (tmp_path / "linked" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
