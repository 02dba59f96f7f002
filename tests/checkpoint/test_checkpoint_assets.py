"""Real pretrained weights, end to end: create, fill, write, bake, compare each bit."""

import filecmp

import pytest
import torch
from assets import EFFICIENTNET, MINILM, RESEMBLYZER, SCEPTR, find_asset, need
from checkpoint_samples import expected, trained
from safetensors.torch import load_file

from lora_param.api_files import bake_checkpoint
from lora_param.checkpoint.create import create_adapter
from lora_param.formats import read_adapter, toggle_file, write_adapter

pytestmark = pytest.mark.assets


def made(base, patterns, tmp_path, **options):
    plan, fresh = create_adapter(base, patterns, seed=0, **options)
    path = tmp_path / "adapter.safetensors"
    write_adapter(trained(fresh, size=0.05), path)
    return plan, path


def compare(before, after, adapter):
    changed = {t.target.name for t in adapter.targets.values()}
    assert before.keys() == after.keys()
    for name, W in before.items():
        want = W
        for key, t in adapter.targets.items():
            if t.target.name == name:
                want = expected(want, adapter, key)
        assert torch.equal(after[name], want), name
        assert torch.equal(after[name], W) == (name not in changed), name


def test_minilm(tmp_path):
    base = find_asset(*MINILM)
    plan, path = made(base, ["query", "value"], tmp_path, rank=8)
    assert len(plan.targets) == 12
    assert plan.trainable == 73_728
    assert f"{plan.percent:.2f}" == "0.32"
    out = tmp_path / "baked"
    report = bake_checkpoint(base, path, out, verify=True)
    adapter = read_adapter(path)
    compare(load_file(base / "model.safetensors"), load_file(out / "model.safetensors"), adapter)
    files = [p.relative_to(base) for p in base.rglob("*") if p.is_file()]
    assert sorted(map(str, files)) == list(report.files)
    differing = [str(f) for f in files if not filecmp.cmp(base / f, out / f, shallow=False)]
    assert differing == ["model.safetensors"]
    assert (out / "model.safetensors").stat().st_size == (base / "model.safetensors").stat().st_size
    assert len(toggle_file(path, False)) == 12
    bake_checkpoint(base, path, out, force=True)
    assert all(filecmp.cmp(base / f, out / f, shallow=False) for f in files)


def test_minilm_loads_in_transformers(tmp_path):
    need("transformers")
    import transformers

    base = find_asset(*MINILM)
    _, path = made(base, ["query", "value"], tmp_path)
    bake_checkpoint(base, path, tmp_path / "baked")
    model = transformers.AutoModel.from_pretrained(tmp_path / "baked")
    baked = load_file(tmp_path / "baked" / "model.safetensors")
    name = "encoder.layer.3.attention.self.query.weight"
    assert torch.equal(model.state_dict()[name], baked[name])


def test_resemblyzer(tmp_path):
    base = find_asset(*RESEMBLYZER)
    _, path = made(base, ["lstm.weight_ih_l{0..2}", "lstm.weight_hh_l0[1/4]"], tmp_path)
    out = tmp_path / "baked.pt"
    report = bake_checkpoint(base, path, out, verify=True)
    assert report.key == "model_state"
    before = torch.load(base, map_location="cpu", weights_only=True)
    after = torch.load(out, weights_only=True)
    compare(before["model_state"], after["model_state"], read_adapter(path))
    assert after.keys() == before.keys()
    assert after["step"] == before["step"]
    ours, theirs = after["optimizer_state"], before["optimizer_state"]
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        assert torch.equal(ours["state"][i]["exp_avg"], state["exp_avg"])
    assert out.stat().st_size < 1.01 * base.stat().st_size


def test_efficientnet(tmp_path):
    base = find_asset(*EFFICIENTNET)
    _, path = made(base, ["_fc", "**._project_conv.weight", "_conv_stem"], tmp_path, rank=4)
    bake_checkpoint(base, path, tmp_path / "baked.pth", verify=True)
    before = torch.load(base, weights_only=True)
    compare(before, torch.load(tmp_path / "baked.pth", weights_only=True), read_adapter(path))


def test_sceptr(tmp_path):
    base = find_asset(*SCEPTR)
    _, path = made(base, ["in_proj_weight[0/3]", "in_proj_weight[2/3]"], tmp_path, rank=4)
    bake_checkpoint(base, {str(path): 1.0}, tmp_path / "baked.pt", verify=True)
    before = torch.load(base, weights_only=True)
    compare(before, torch.load(tmp_path / "baked.pt", weights_only=True), read_adapter(path))
