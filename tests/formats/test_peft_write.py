"""What is written for PEFT it loads with every key used, and saves again bit for bit (issue 10)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import CASES, Case, base_of, load_peft, outputs, quiet, saved
from safetensors.torch import load_file
from torch import nn

import lora_param as lp
from lora_param.errors import NoFormError, OutputError, UnsettledError

WEIGHTS = "adapter_model.safetensors"


def check_in_peft(case: Case, directory: Path, wanted: torch.Tensor, tmp_path: Path) -> Any:
    """PEFT uses every key, computes the same, and saves the same bytes."""
    model, told = load_peft(case, directory)
    assert not [t for t in told if "missing" in t or "unexpected" in t]
    keys = set(load_file(directory / WEIGHTS))
    torch.testing.assert_close(outputs(model, case), wanted, rtol=0, atol=5e-6)
    with quiet():
        model.save_pretrained(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / WEIGHTS)
    if case.name == "llama-embedding":  # beside lm_head as a target PEFT always saves its W
        assert {k for k in again if not k.endswith("base_layer.weight")} == keys
    else:
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (directory / WEIGHTS).read_bytes()
    return model


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_peft_to_here_to_peft(case: Case, tmp_path: Path) -> None:
    _, wanted = saved(case, tmp_path / "peft")
    model = lp.load(base_of(case), tmp_path / "peft")
    lp.save(model, tmp_path / "ours", format="peft")
    check_in_peft(case, tmp_path / "ours", wanted, tmp_path)
    lp.save(model, tmp_path / "native.safetensors")  # and through our own file
    lp.convert(tmp_path / "native.safetensors", "peft", tmp_path / "b", base=base_of(case))
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()
    back = lp.load(base_of(case), tmp_path / "native.safetensors")
    assert torch.equal(outputs(back, case), outputs(model, case))


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, p in enumerate(lp.parameters(model)):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return model


@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("llama", ["q_proj", "down_proj:rank=3,alpha=7"], {}),
        ("llama", ["self_attn.*_proj"], {"scaling": "rslora", "rank": 3}),
        ("llama", ["q_proj[0:4]", "q_proj[8:16]:rank=1", "v_proj[:,2:9]"], {}),
        ("llama", ["q_proj", "embed_tokens"], {"scaling": "constant", "alpha": 0.7}),
        ("llama", ["o_proj"], {"init": "pissa"}),
        ("llama", ["up_proj", "down_proj"], {"variant": "dora"}),
        ("llama", ["up_proj"], {"variant": "miss"}),
        ("gpt2", ["c_attn", "attn.c_proj"], {}),
        ("gpt2", ["c_attn"], {"variant": "dora_columns"}),
        ("mixtral", ["q_proj", "gate_up_proj[*]:rank=3", "experts.down_proj[*]"], {}),
        ("convs", ["c1", "c2", "c3", "head"], {}),
        ("convs", ["c1", "c2"], {"variant": "dora"}),
        ("attention", ["attn.in_proj_weight[0/3]", "attn.in_proj_weight[2/3]"], {}),
        ("attention", ["attn.out_proj", "out"], {}),
        ("stacks-6x6", ["experts.up[*]", "experts.down[*]", "proj"], {}),
        ("stacks-6x8-transposed", ["experts.down[*]"], {}),
        ("square", ["emb", "square", "wide"], {}),
    ],
)
def test_ours_is_loaded_by_peft(
    name: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    case = CASES[name]
    targets = [t if "*_" not in t else "**.self_attn.*.weight" for t in targets]
    model = trained(lp.apply(base_of(case), targets, **{"rank": 2, **options}))
    wanted = outputs(model, case)
    assert (wanted - outputs(base_of(case), case)).abs().max() > 1e-3
    lp.save(model, tmp_path / "ours", format="peft")
    check_in_peft(case, tmp_path / "ours", wanted, tmp_path)
    again = lp.load(base_of(case), tmp_path / "ours")
    torch.testing.assert_close(outputs(again, case), wanted, rtol=0, atol=2e-6)


def test_a_base_in_a_file_tells_layers_by_their_biases(tmp_path: Path) -> None:
    case = CASES["gpt2"]
    torch.save(dict(base_of(case).state_dict()), tmp_path / "base.pt")
    lp.apply_checkpoint(tmp_path / "base.pt", ["c_attn", "wpe"], tmp_path / "a.safetensors", seed=0)
    with pytest.raises(UnsettledError, match=r"c_attn.*base="):
        lp.convert(tmp_path / "a.safetensors", "peft", tmp_path / "out")
    lp.convert(tmp_path / "a.safetensors", "peft", tmp_path / "out", base=tmp_path / "base.pt")
    check_in_peft(case, tmp_path / "out", outputs(base_of(case), case), tmp_path)
    lp.apply_checkpoint(tmp_path / "base.pt", ["attn.c_proj"], tmp_path / "b.safetensors")
    with pytest.raises(UnsettledError, match=r"attn.c_proj.weight.*base=model"):  # square
        lp.convert(tmp_path / "b.safetensors", "peft", tmp_path / "c", base=tmp_path / "base.pt")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("name", "targets", "options", "why"),
    [
        ("gpt2", ["c_attn"], {"variant": "dora"}, "the other side"),
        ("stacks-6x6", ["experts.up"], {}, "a stack as one matrix"),
        ("stacks-6x6", ["experts.up[*]"], {"variant": "dora"}, "DoRA, which PEFT does not have"),
        ("llama", ["q_proj[0:4]"], {"variant": "dora"}, "DoRA of a part"),
        ("square", ["square", "wide:variant=dora"], {}, "DoRA on some targets"),
        ("square", ["square", "wide:dropout=0.1"], {}, "different dropout"),
        ("stacks-6x6", ["experts.up[*]"], {"dropout": 0.1}, "no dropout with target_parameters"),
    ],
)
def test_what_peft_has_no_form_for_is_refused_by_name(
    name: str, targets: list[str], options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    if any(":variant" in t or ":dropout" in t for t in targets):
        model = base_of(CASES[name])
        for adapter, text in zip("ab", targets, strict=True):
            pattern, _, setting = text.partition(":")
            key, _, value = setting.partition("=")
            extra = {} if not key else {key: float(value) if key == "dropout" else value}
            lp.apply(model, [pattern], adapter=adapter, **extra)
        record = lp.get_adapter(model, "a")
        other = lp.get_adapter(model, "b")
        record.targets |= other.targets
        record.tensors = {**record.tensors, **other.tensors}
        record.base |= other.base
    else:
        record = lp.get_adapter(lp.apply(base_of(CASES[name]), targets, **options))
    with pytest.raises(NoFormError, match=why):
        lp.write_adapter(record, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


def test_one_set_of_factors_for_both_names_of_a_tie_is_refused(tmp_path: Path) -> None:
    model = lp.apply(base_of(CASES["llama-tied-embedding"]), ["embed_tokens"], tied="together")
    with pytest.raises(NoFormError, match=r"shared with lm_head.weight"):
        lp.save(model, tmp_path / "out", format="peft")


def test_a_disabled_target_and_a_strength_of_dora_are_refused(tmp_path: Path) -> None:
    model = lp.apply(base_of(CASES["square"]), ["square"], variant="dora")
    lp.set_scale(model, 0.5)
    with pytest.raises(NoFormError, match=r"square.weight, DoRA at strength 0.5"):
        lp.save(model, tmp_path / "out", format="peft")
    lp.set_scale(model, 1.0)
    lp.disable(model)
    with pytest.raises(NoFormError, match=r"square.weight, disabled"):
        lp.save(model, tmp_path / "out", format="peft")


def test_the_strength_of_lora_becomes_its_alpha(tmp_path: Path) -> None:
    case = CASES["square"]
    model = trained(lp.apply(base_of(case), ["square"], rank=2, alpha=3))
    lp.set_scale(model, -0.5)
    lp.save(model, tmp_path / "out", format="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, -1.5)
    check_in_peft(case, tmp_path / "out", outputs(model, case), tmp_path)


def test_only_an_adapters_directory_is_replaced(tmp_path: Path) -> None:
    case = CASES["square"]
    model = lp.apply(base_of(case), ["square"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(OutputError, match=r"tokenizer.json"):
        lp.save(model, tmp_path / "out", format="peft")
    (tmp_path / "out" / "tokenizer.json").unlink()
    lp.save(model, tmp_path / "out", format="peft")
    first = (tmp_path / "out" / WEIGHTS).read_bytes()
    lp.save(model, tmp_path / "out", format="peft")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == first
    with pytest.raises(OutputError, match="exists"):
        lp.convert(lp.get_adapter(model), "peft", tmp_path / "out")


def test_a_weight_of_the_model_itself_has_no_form(tmp_path: Path) -> None:
    model = lp.apply(nn.Linear(4, 5), ["weight"], rank=2)
    with pytest.raises(NoFormError, match="weight, a weight of the model itself"):
        lp.save(model, tmp_path / "peft", format="peft")
    assert not (tmp_path / "peft").exists()
