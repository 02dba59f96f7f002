"""sd-scripts' files under the first Stable Diffusion's names, on diffusers' names and the other way
round. What is which is asked of diffusers' own conversion (`tools/sd-names.json`, written by
`write_tool_fixtures.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_param as lp
from lora_param.errors import MismatchError

NAMES: dict[str, dict[str, str]] = json.loads(
    (Path(__file__).parent / "tools" / "sd-names.json").read_text()
)
PREFIX = {"sdxl": "model.diffusion_model.", "sd15": "model.diffusion_model."}
PREFIX["open_clip"] = "conditioner.embedders.1.model."
LORA = {"sdxl": "lora_unet_", "sd15": "lora_unet_", "open_clip": "lora_te2_"}


def flat(name: str) -> str:
    return name.replace(".", "_")


def without_part(name: str) -> str:
    return name.partition(".")[2]


def kohya(path: Path, names: list[str], shape: tuple[int, int] = (3, 2)) -> dict[str, Tensor]:
    """A file of these lora names, each with an update of its own; the updates."""
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name in names:
        down, up = torch.randn(1, shape[1]), torch.randn(shape[0], 1)
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
        deltas[name] = 2 * up @ down
    save_file(tensors, path)
    return deltas


def base(path: Path, names: list[str], shape: tuple[int, int] = (3, 2)) -> Path:
    save_file({f"{n}.weight": torch.zeros(shape) for n in names}, path)
    return path


@pytest.mark.parametrize("model", ["sdxl", "sd15", "open_clip"])
@pytest.mark.parametrize("named", ["first", "diffusers"])
@pytest.mark.parametrize("on", ["first", "diffusers", "diffusers alone"])
def test_every_module_is_found_under_the_other_names(
    model: str, named: str, on: str, tmp_path: Path
) -> None:
    pairs = NAMES[model]
    lora = {
        own: LORA[model] + flat(first if named == "first" else without_part(own))
        for first, own in pairs.items()
    }
    place = {
        own: f"{PREFIX[model]}{first}" if on == "first" else own for first, own in pairs.items()
    }
    if on == "diffusers alone":  # the model, without the pipeline around it
        place = {own: without_part(own) for own in pairs.values()}
    deltas = kohya(tmp_path / "a.safetensors", list(lora.values()))
    where = base(tmp_path / "base.safetensors", list(place.values()))
    lp.bake_checkpoint(where, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert len(out) == len(pairs)
    for own, name in place.items():
        torch.testing.assert_close(out[f"{name}.weight"], deltas[lora[own]], rtol=0, atol=1e-6)


HF = "text_encoder_2.text_model.encoder.layers.3.self_attn"
OPEN_CLIP = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_weight"


def test_q_k_and_v_are_rows_of_open_clips_in_proj(tmp_path: Path) -> None:
    names = {p: f"lora_te2_{flat(without_part(HF))}_{p}_proj" for p in "qkv"}
    deltas = kohya(tmp_path / "a.safetensors", [names["q"], names["v"]])
    save_file({OPEN_CLIP: torch.zeros(9, 2)}, tmp_path / "base.safetensors")
    lp.bake_checkpoint(
        tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    )
    out = load_file(tmp_path / "out.safetensors")[OPEN_CLIP]
    wanted = torch.cat([deltas[names["q"]], torch.zeros(3, 2), deltas[names["v"]]])
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


def test_open_clips_in_proj_is_split_into_q_k_and_v(tmp_path: Path) -> None:
    name = "lora_te2_transformer_resblocks_3_attn_in_proj"
    delta = kohya(tmp_path / "a.safetensors", [name], (9, 2))[name]
    where = base(tmp_path / "base.safetensors", [f"{HF}.{p}_proj" for p in "qkv"])
    lp.bake_checkpoint(where, tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    found = torch.cat([out[f"{HF}.{p}_proj.weight"] for p in "qkv"])
    torch.testing.assert_close(found, delta, rtol=0, atol=1e-6)


def test_what_two_weights_may_be_is_refused_by_name(tmp_path: Path) -> None:
    kohya(tmp_path / "a.safetensors", ["lora_unet_input_blocks_1_0_in_layers_2"])
    both = ["down_blocks.0.resnets.0.conv1", "unet.down_blocks.0.resnets.0.conv1"]
    where = base(tmp_path / "base.safetensors", both)
    with pytest.raises(MismatchError, match=r"could be any of down_blocks.*, unet\.down_blocks"):
        lp.stats(where, tmp_path / "a.safetensors")


def test_one_that_is_nowhere_is_named(tmp_path: Path) -> None:
    first, own = next(iter(NAMES["sdxl"].items()))
    kohya(tmp_path / "a.safetensors", [f"lora_unet_{flat(first)}", "lora_unet_input_blocks_99_0_x"])
    with pytest.raises(MismatchError, match="lora_unet_input_blocks_99_0_x"):
        lp.stats(base(tmp_path / "base.safetensors", [own]), tmp_path / "a.safetensors")
