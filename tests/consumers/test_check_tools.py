"""`check` of the adapters that other tools wrote (see `tests/formats/write_tool_fixtures.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora_param as lp

TOOLS = Path(__file__).parents[1] / "formats" / "tools"
FILES = {
    "loralib": ("lora.pt", "loralib"),
    "torchtune": ("adapter_model.pt", "torchtune"),
    "torchtune-dora": ("adapter_model.pt", "torchtune"),
    "mlx": ("", "mlx-lm"),
    "mlx-dora": ("adapters.safetensors", "mlx-lm"),
    "mlx-experts": ("", "mlx-lm"),
}


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong_with_it_and_a_server_wants_another_format(name: str) -> None:
    file, tool = FILES[name]
    path = TOOLS / name / file
    found = lp.check(path)
    assert found.worst == "accepted", found.to_dict()
    found = lp.check(path, consumer=["vllm", "diffusers"])
    text = str(found.to_dict())
    assert found.worst == "refused"
    assert f"an adapter of {tool}" in text
    assert f"lora-param convert {path} --to peft" in text


@pytest.mark.parametrize("name", ["mlx", "mlx-experts", "torchtune"])
def test_every_module_is_found_in_its_base(name: str) -> None:
    path = TOOLS / name / FILES[name][0]
    found = lp.check(path, TOOLS / name / "base.safetensors")
    assert found.worst == "accepted", found.to_dict()
    other = lp.check(path, TOOLS / "loralib" / "base.safetensors")
    assert other.worst == "refused"


def test_torchtunes_names_are_found_in_transformers() -> None:
    path = TOOLS / "torchtune" / "adapter_model.pt"
    found = lp.check(path, TOOLS / "torchtune" / "hf")
    assert found.worst == "accepted", found.to_dict()


@pytest.mark.parametrize("name", ["diffusers", "diffusers-first", "diffusers-rslora"])
def test_diffusers_takes_its_own(name: str) -> None:
    path = TOOLS / name / "pytorch_lora_weights.safetensors"
    assert lp.check(path, consumer=["diffusers"]).worst == "accepted"
    assert lp.check(path, consumer=["vllm"]).worst == "refused"


@pytest.mark.parametrize("on", ["first", "diffusers"])
def test_sd_scripts_names_are_found_under_the_others(on: str, tmp_path: Path) -> None:
    pairs = json.loads((TOOLS / "sd-names.json").read_text())["sdxl"]
    tensors = {}
    for first in pairs:
        lora = f"lora_unet_{first.replace('.', '_')}"
        tensors |= {f"{lora}.lora_down.weight": torch.ones(1, 2)}
        tensors |= {f"{lora}.lora_up.weight": torch.ones(3, 1)}
    save_file(tensors, tmp_path / "a.safetensors")
    names = pairs.values() if on == "diffusers" else [f"model.diffusion_model.{n}" for n in pairs]
    save_file({f"{n}.weight": torch.ones(3, 2) for n in names}, tmp_path / "base.safetensors")
    found = lp.check(tmp_path / "a.safetensors", tmp_path / "base.safetensors")
    assert found.worst == "accepted", found.to_dict()
