"""What a conversion would lose in silence is refused, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import gpt2, mixtral
from torch import nn

import lora_param as lp
from lora_param.errors import BrokenFileError, NoFormError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in lp.parameters(model):
            p.normal_()
    return model


@pytest.mark.parametrize("to", ["kohya", "diffusers", "minlora", "torchtune"])
def test_lossy_never_leaves_out_everything(to: str, tmp_path: Path) -> None:
    """GPT-2's layers are transposed linear ones, which these formats have no form for."""
    lp.save(randomized(lp.apply(gpt2(), ["c_attn"], rank=2)), tmp_path / "a", format="peft")
    out = tmp_path / "out.safetensors"
    with pytest.raises(NoFormError, match="has a form for none"):
        lp.convert(tmp_path / "a", to, out, base=gpt2(), lossy=True)
    assert not out.exists()


def test_peft_is_not_written_under_the_names_of_a_file(tmp_path: Path) -> None:
    """A live Mixtral has stacks where its file has experts: PEFT looks for the former."""
    mixtral().save_pretrained(tmp_path / "base")
    model = randomized(lp.apply(mixtral(), ["experts.down_proj[*]"], rank=2))
    lp.save(model, tmp_path / "a", format="peft")
    with pytest.raises(NoFormError, match="PEFT would not find: give the live model"):
        lp.convert(tmp_path / "a", "peft", tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()
    lp.convert(tmp_path / "a", "peft", tmp_path / "out", base=mixtral())
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "a" / weights).read_bytes()


@pytest.mark.parametrize("value", ["8", True, float("nan")], ids=str)
def test_check_refuses_a_config_whose_alpha_is_no_number(value: object, tmp_path: Path) -> None:
    lp.save(lp.apply(nn.Sequential(nn.Linear(4, 4)), ["0"], rank=2), tmp_path / "a", format="peft")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": value}))
    with pytest.raises(BrokenFileError, match=r"its lora_alpha is .*, which is no number"):
        lp.check(tmp_path / "a")


def test_check_refuses_a_file_without_tensors(tmp_path: Path) -> None:
    lp.save(lp.apply(nn.Sequential(nn.Linear(4, 4)), ["0"], rank=2), tmp_path / "a", format="peft")
    save_file({}, tmp_path / "a" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(BrokenFileError, match="holds no tensor"):
        lp.check(tmp_path / "a")
