"""diffusers' keys of both eras beside their formula; `test_tools.py` has what it saves itself.

W + alpha/rank·(up @ down), alpha being the rank where none is stored.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_param as lp
from lora_param.errors import BrokenFileError, NoFormError, UnsettledError

UNET, TEXT = "unet.down_blocks.0.attentions.0.transformer_blocks.0", "text_encoder.text_model"
BASE = {
    f"{UNET}.attn1.to_q.weight": (6, 4),
    f"{UNET}.attn1.to_out.0.weight": (4, 6),
    f"{UNET}.ff.net.0.proj.weight": (8, 4),
    "unet.conv_in.weight": (5, 3, 3, 3),
    f"{TEXT}.encoder.layers.0.self_attn.q_proj.weight": (4, 4),
    f"{TEXT}.encoder.layers.0.mlp.fc1.weight": (8, 4),
}
FIRST = {
    f"{UNET}.attn1.processor.to_q_lora": f"{UNET}.attn1.to_q.weight",
    f"{UNET}.attn1.processor.to_out_lora": f"{UNET}.attn1.to_out.0.weight",
    f"{UNET}.ff.net.0.proj.lora": f"{UNET}.ff.net.0.proj.weight",
    "unet.conv_in.lora": "unet.conv_in.weight",
    f"{TEXT}.encoder.layers.0.self_attn.q_proj.lora_linear_layer": (
        f"{TEXT}.encoder.layers.0.self_attn.q_proj.weight"
    ),
    f"{TEXT}.encoder.layers.0.mlp.fc1.lora_linear_layer": (
        f"{TEXT}.encoder.layers.0.mlp.fc1.weight"
    ),
}


def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file({n: torch.randn(s) for n, s in BASE.items()}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def pair(shape: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    down = torch.randn(rank, *shape[1:]) * 0.3
    return down, torch.randn(shape[0], rank, *(1 for _ in shape[2:])) * 0.3


@pytest.mark.parametrize("era", ["first", "PEFT's"])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_each_ending_is_its_layers(era: str, alpha: float | None, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for rank, (key, name) in enumerate(FIRST.items(), 1):
        down, up = pair(BASE[name], rank)
        stem = name.removesuffix(".weight")
        if era == "first":
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
        else:
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        product = (up.flatten(1) @ down.flatten(1)).reshape(BASE[name])
        deltas[name] = product * (1.0 if alpha is None else alpha / rank)
    save_file(tensors, tmp_path / "a.safetensors")
    where = base(tmp_path)
    lp.bake_checkpoint(where, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    before, after = load_file(where), load_file(tmp_path / "out.safetensors")
    for name, delta in deltas.items():
        torch.testing.assert_close(after[name], before[name] + delta, rtol=0, atol=1e-6)
    lp.convert(tmp_path / "a.safetensors", "diffusers", tmp_path / "b.safetensors")
    lp.bake_checkpoint(where, tmp_path / "b.safetensors", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    for name, tensor in after.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-6)


def written(path: Path, changed: dict[str, Tensor] | None = None, **metadata: object) -> Path:
    down, up = pair((6, 4), 2)
    stem = f"{UNET}.attn1.to_q"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up} | (changed or {})
    told = {"lora_adapter_metadata": json.dumps(metadata)} if metadata else {}
    save_file(tensors, path, {"format": "pt", **told})
    return path


@pytest.mark.parametrize(
    ("changed", "metadata", "told"),
    [
        ({f"{UNET}.attn1.processor.to_k_lora.down.weight": torch.ones(2, 4)}, {}, "conventions"),
        ({"base_model.model.x.lora_A.weight": torch.ones(2, 4)}, {}, "base_model.model.x.lora_A"),
        ({f"{UNET}.attn1.to_k.lora_A.weight": torch.ones(2, 4)}, {}, "to_k has .* alone"),
        ({f"{UNET}.attn1.to_q.lora_A.weight": torch.ones(3, 4)}, {}, "do not fit"),
        ({}, {"unet.r": 4, "unet.lora_alpha": 4}, "rank 2, and 4 in its lora_adapter_metadata"),
        ({}, {"unet.r": 2, "unet.lora_alpha": 4, "unet.use_dora": True}, "use_dora"),
        (
            {f"{UNET}.attn1.to_q.alpha": torch.tensor(3.0)},
            {"unet.r": 2, "unet.lora_alpha": 4},
            "alpha of .* is 3, and 4",
        ),
    ],
)
def test_what_does_not_go_together_is_named(
    changed: dict[str, Tensor], metadata: dict[str, object], told: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "a.safetensors", changed, **metadata)
    with pytest.raises(BrokenFileError, match=told):
        lp.read_adapter(path)


def test_the_metadata_says_the_scale(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", **{"unet.r": 2, "unet.lora_alpha": 5})
    (target,) = lp.read_adapter(path).targets.values()
    assert target.scale == 2.5


def test_a_part_without_a_pipeline_is_told_by_its_names(tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors")
    weights = {n.removeprefix("unet."): t for n, t in load_file(base(tmp_path)).items()}
    save_file(weights, tmp_path / "unet.safetensors")
    lp.convert(path, "native", tmp_path / "n.safetensors", base=tmp_path / "unet.safetensors")
    record = lp.read_adapter(tmp_path / "n.safetensors")
    assert not any(t.target.name.startswith("unet.") for t in record.targets.values())
    out = tmp_path / "again.safetensors"
    lp.convert(tmp_path / "n.safetensors", "diffusers", out, base=tmp_path / "unet.safetensors")
    assert set(load_file(out)) == set(load_file(path))
    save_file({"fc.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")
    lp.apply_checkpoint(tmp_path / "other.safetensors", ["fc"], tmp_path / "o.safetensors", rank=2)
    with pytest.raises(NoFormError, match=r"fc\.weight.*no part of a pipeline"):
        lp.convert(
            tmp_path / "o.safetensors",
            "diffusers",
            tmp_path / "p.safetensors",
            base=tmp_path / "other.safetensors",
        )


def test_without_the_kind_of_layer_the_base_is_asked_for(tmp_path: Path) -> None:
    lp.apply_checkpoint(base(tmp_path), ["to_q"], tmp_path / "n.safetensors", rank=2)
    with pytest.raises(UnsettledError, match="base="):
        lp.convert(tmp_path / "n.safetensors", "diffusers", tmp_path / "d.safetensors")
