"""Adapters on bases of another layout: live stacks and files of single experts, fused and split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import mixtral
from torch import nn

import lora_param as lp
from lora_param.errors import FingerprintError, MismatchError

transformers = pytest.importorskip("transformers")


def randomized(model: nn.Module) -> nn.Module:
    torch.manual_seed(7)
    for p in lp.parameters(model):
        nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    mixtral().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


TARGETS = ["gate_up_proj[*]", "down_proj[*]", "q_proj", "mlp.gate"]


def test_a_live_adapter_is_baked_into_the_file_of_single_experts(base, tmp_path):
    model = randomized(lp.apply(mixtral(), TARGETS, rank=3, alpha=6))
    lp.save(model, tmp_path / "a.safetensors")
    report = lp.bake_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "baked")
    # what transformers gives: load, bake live, save
    lp.bake(model)
    model.save_pretrained(tmp_path / "live")
    live = load_file(tmp_path / "live" / "model.safetensors")
    baked = load_file(tmp_path / "baked" / "model.safetensors")
    plain = load_file(base / "model.safetensors")
    assert baked.keys() == live.keys()
    for name, tensor in live.items():
        assert torch.equal(baked[name], tensor), name
    experts = [n for n in plain if ".experts." in n]
    assert len(experts) == 2 * 3 * 3
    for name in experts:  # every one was reached
        assert not torch.equal(baked[name], plain[name]), name
    assert len(report.baked) == 18 + 2 + 2
    assert any("split by" in note for note in report.notes)


def test_an_adapter_made_on_the_file_fits_the_live_model(base, tmp_path):
    lp.apply_checkpoint(base, ["w1", "w2", "w3", "v_proj"], tmp_path / "a.safetensors", rank=2)
    record = lp.read_adapter(tmp_path / "a.safetensors")
    torch.manual_seed(1)
    tensors = {n: torch.randn(t.shape) * 0.3 for n, t in record.tensors.items()}
    record.tensors = tensors
    lp.write_adapter(record, tmp_path / "a.safetensors")
    model = lp.load(mixtral(), tmp_path / "a.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj[*]" in lp.get_adapter(model).targets
    lp.bake_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "baked")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    x = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(model(x).logits, merged(x).logits, atol=1e-5)
    lp.load(model, tmp_path / "a.safetensors")  # over the one that is there
    with lp.disabled(model), torch.no_grad():
        assert torch.equal(model(x).logits, mixtral()(x).logits)


def test_stats_on_another_layout_say_how_the_targets_were_found(base, tmp_path):
    model = randomized(lp.apply(mixtral(), TARGETS, rank=3, alpha=6))
    lp.save(model, tmp_path / "a.safetensors")
    stats = lp.stats(base, tmp_path / "a.safetensors")
    assert len(stats.rows) == 22
    assert not stats.dead
    assert any("*.block_sparse_moe.experts.#.w2.weight" in note for note in stats.notes)


def test_of_a_tensor_of_its_own_the_fingerprint_still_holds(base, tmp_path):
    model = randomized(lp.apply(mixtral(seed=1), ["mlp.gate"], rank=2))
    lp.save(model, tmp_path / "a.safetensors")
    with pytest.raises(FingerprintError, match=r"block_sparse_moe\.gate"):
        lp.bake_checkpoint(base, tmp_path / "a.safetensors", tmp_path / "baked")


@pytest.mark.parametrize("era", ["live", "disk"])
def test_a_peft_adapter_of_stacks_fits_the_file_of_single_experts(era, base, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    wrapped = peft.get_peft_model(mixtral(), config)
    torch.manual_seed(3)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.3)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = wrapped.merge_and_unload()
    if era == "live":
        model = lp.load(mixtral(), tmp_path / "adapter")
        x = torch.arange(12)[None]
        with torch.no_grad():
            assert torch.allclose(model(x).logits, merged(x).logits, atol=1e-5)
        return
    merged.save_pretrained(tmp_path / "merged")
    lp.bake_checkpoint(base, tmp_path / "adapter", tmp_path / "baked")
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    baked = load_file(tmp_path / "baked" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.allclose(baked[name], tensor, atol=1e-6), name


def test_a_peft_adapter_of_split_projections_fits_a_fused_base(tmp_path):
    peft = pytest.importorskip("peft")

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, n, bias=False) for n in (8, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x)

    torch.manual_seed(0)
    net = Net()
    parts = [net.attn.q_proj, net.attn.k_proj, net.attn.v_proj]
    fused = torch.cat([m.weight.detach().clone() for m in parts])
    save_file({"attn.qkv_proj.weight": fused}, tmp_path / "fused.safetensors")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    wrapped = peft.get_peft_model(net, config)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p)
    wrapped.save_pretrained(tmp_path / "adapter")
    lp.bake_checkpoint(
        tmp_path / "fused.safetensors", tmp_path / "adapter", tmp_path / "baked.safetensors"
    )
    baked = load_file(tmp_path / "baked.safetensors")["attn.qkv_proj.weight"]
    merged = wrapped.merge_and_unload()
    parts = [merged.attn.q_proj, merged.attn.k_proj, merged.attn.v_proj]
    assert torch.allclose(baked, torch.cat([m.weight for m in parts]), atol=1e-6)
    assert torch.equal(baked[8:12], fused[8:12])


def test_rules_of_a_file(tmp_path):
    W = torch.randn(6, 4)
    save_file({"enc.query.weight": W}, tmp_path / "base.safetensors")
    lp.apply_checkpoint(
        tmp_path / "base.safetensors", ["query"], tmp_path / "a.safetensors", rank=2
    )
    save_file({"enc.q.weight": W}, tmp_path / "other.safetensors")
    with pytest.raises(MismatchError, match=r"enc\.query\.weight"):
        lp.stats(tmp_path / "other.safetensors", tmp_path / "a.safetensors")
    rules = tmp_path / "names.txt"
    rules.write_text("*.query.weight = *.q.weight\n")
    record = lp.read_adapter(tmp_path / "a.safetensors", names=rules)
    stats = lp.stats(tmp_path / "other.safetensors", record)
    assert [row.target for row in stats.rows] == ["enc.q.weight"]


def test_the_config_tells_the_kind_of_model(base):
    from lora_param.checkpoint.open import open_checkpoint

    assert json.loads((base / "config.json").read_text())["model_type"] == "mixtral"
    with open_checkpoint(base) as checkpoint:
        assert checkpoint.model_type == "mixtral"
