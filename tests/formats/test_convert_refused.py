"""What a conversion would lose in silence is refused; `check` says what `load` and `bake` would."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import gpt2, mixtral
from torch import nn

import lora_param as lp
from lora_param.errors import BrokenFileError, FileError, NoFormError

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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"peft_type": "Lora"}, "a PEFT adapter of Lora"),
    ],
    ids=str,
)
def test_check_refuses_what_load_refuses(
    changes: dict[str, object], says: str, tmp_path: Path
) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    lp.save(randomized(lp.apply(net, ["0"], rank=2)), tmp_path / "a", format="peft")
    assert lp.check(tmp_path / "a").answer("itself") == "accepted"
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(FileError, match=says):
        lp.load(nn.Sequential(nn.Linear(4, 4)), tmp_path / "a")
    found = lp.check(tmp_path / "a")
    assert found.answer("itself") == "refused"
    assert any(says in f.says for f in found.findings)


def test_check_takes_what_fits_by_the_rules_between_names(tmp_path: Path) -> None:
    """PEFT's own adapter of a live Mixtral, on the file of single experts."""
    mixtral().save_pretrained(tmp_path / "base")
    model = randomized(lp.apply(mixtral(), ["experts.down_proj[*]", "q_proj"], rank=2))
    lp.save(model, tmp_path / "a", format="peft")
    found = lp.check(tmp_path / "a", tmp_path / "base", "peft")
    assert (found.answer("itself"), found.answer("peft")) == ("accepted", "accepted")
    gpt2().save_pretrained(tmp_path / "other")
    assert lp.check(tmp_path / "a", tmp_path / "other").answer("itself") == "refused"
