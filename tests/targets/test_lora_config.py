"""`lp.apply(model, lora_config)` does what `get_peft_model(model, lora_config)` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import gpt2, llama, mixtral
from torch import nn

import lora_param as lp
from lora_param.errors import LoraConfigError, OptionError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def peft_settings(model: nn.Module, config: Any) -> dict[str, tuple[int, float]]:
    """Module or parameter → rank and scale, of a model that PEFT has wrapped."""
    found = {}
    wrapped = peft.get_peft_model(model, config)
    for name, module in wrapped.base_model.model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        bare = name.replace(".base_layer", "")
        if hasattr(module, "parameter_name"):
            bare = f"{bare}.{module.parameter_name}"
        if not (module.lora_A or module.lora_embedding_A):
            continue
        found[bare] = (module.r["default"], module.scaling["default"])
    return found


def our_settings(model: nn.Module, config: Any) -> dict[str, tuple[int, float]]:
    lp.apply(model, config)
    return {
        t.target.name.removesuffix(".weight"): (t.settings.rank, t.scale)
        for t in lp.get_adapter(model).targets.values()
    }


CONFIGS = {
    "two projections": (llama, {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "an expression": (llama, {"r": 2, "target_modules": r".*layers\.[02]\..*(k|o)_proj"}),
    "all-linear": (llama, {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"}),
    "patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 2, "layers.0.self_attn.q_proj": 3},
            "alpha_pattern": {"q_proj": 32},
        },
    ),
    "rsLoRA": (llama, {"r": 4, "use_rslora": True, "target_modules": ["q_proj"]}),
    "layers": (llama, {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "one layer by pattern": (
        llama,
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "layers_to_transform": 1,
            "layers_pattern": "layers",
        },
    ),
    "excluded": (
        llama,
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": ["0.self_attn.q_proj"]},
    ),
    "Conv1D and an embedding": (gpt2, {"r": 4, "target_modules": ["c_attn", "wpe"]}),
    "stacks": (
        mixtral,
        {
            "r": 2,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        },
    ),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_weights_ranks_and_scales(name):
    make, fields = CONFIGS[name]
    expected = peft_settings(make(), peft.LoraConfig(**fields))
    assert expected
    assert our_settings(make(), peft.LoraConfig(**fields)) == expected
    assert our_settings(make(), {"peft_type": "LORA", **fields}) == expected


def test_dropout_dora_and_initialisation():
    model = lp.apply(
        llama(),
        peft.LoraConfig(r=2, lora_dropout=0.1, use_dora=True, target_modules=["q_proj"]),
    )
    s = next(iter(lp.get_adapter(model).targets.values())).settings
    assert (s.dropout, s.variant, s.init, s.alpha) == (0.1, "dora", "kaiming", 8.0)
    config = peft.LoraConfig(r=4, init_lora_weights="gaussian", target_modules=["q_proj"])
    model = lp.apply(llama(), config)
    A = next(iter(lp.get_adapter(model).tensors.values()))
    assert 0.15 < float(A.std()) < 0.35


def test_the_model_is_served_by_peft_afterwards(tmp_path):
    model = lp.apply(llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for p in lp.parameters(model):
        nn.init.normal_(p, std=0.1)
    lp.save(model, tmp_path / "adapter", format="peft")
    served = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    x = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.allclose(model(x).logits, served(x).logits, atol=1e-5)


def test_a_plan_of_a_config():
    plan = lp.plan(llama(), {"r": 2, "target_modules": ["q_proj"]})
    assert len(plan.targets) == 2


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"target_modules": ["q_proj", "qq_proj"]}, "qq_proj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"], "bias": "all"}, "bias of the LoraConfig is 'all'"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "eva"}, "init_lora_weights"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "trainable_token"),
        ({"target_modules": ["q_proj"], "something_new": 3}, "something_new"),
        ({"target_parameters": ["nothing"]}, "target_parameters"),
        ({}, "target_modules"),
        ({"peft_type": "LOHA"}, "peft_type"),
    ],
)
def test_what_it_cannot_do_is_said_and_nothing_has_changed(fields, says):
    model = llama()
    with pytest.raises(LoraConfigError, match=says):
        lp.apply(model, fields)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("options", [{"rank": 2}, {"exclude": ["q_proj"]}])
def test_a_config_and_options_beside_it(options):
    with pytest.raises(OptionError, match="what the LoraConfig says"):
        lp.apply(llama(), {"target_modules": ["q_proj"]}, **options)
