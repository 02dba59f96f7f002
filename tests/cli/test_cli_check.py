"""`lora-param check`: the verdict, its exit status, and nothing of torch."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_samples import Cli
from safetensors.numpy import save_file
from test_startup import audit

import lora_param as lp


def peft_adapter(path: Path, rank: int = 8, **config: object) -> Path:
    path.mkdir()
    name = "base_model.model.fc1"
    tensors = {
        f"{name}.lora_A.weight": np.ones((rank, 6), np.float32),
        f"{name}.lora_B.weight": np.ones((10, rank), np.float32),
    }
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"r": rank, "lora_alpha": 16, "target_modules": ["fc1"], "peft_version": "0.21.2"}
    (path / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return path


@pytest.mark.parametrize(
    ("config", "consumers", "status", "says"),
    [
        ({}, [], 0, "no fault found"),
        ({}, ["vllm"], 0, "accepted"),
        ({"use_rslora": True}, ["sglang"], 3, "2.83 times too weak"),
        ({"use_rslora": True}, ["sglang", "vllm"], 3, "convert a --to portable"),
        ({"rank": 64}, ["vllm"], 1, "--max-lora-rank 64"),
        ({"rank": 64, "use_rslora": True}, ["sglang", "vllm"], 1, "refused"),
    ],
)
def test_the_status_is_the_worst_answer(here, cli: Cli, config, consumers, status, says):
    peft_adapter(here / "a", **config)
    done = cli("check", "a", *(f"--for={c}" for c in consumers))
    assert (done.status, done.err) == (status, "")
    assert says in done.out


def test_json(here, cli: Cli):
    peft_adapter(here / "a", rank=32)
    done = cli("check", "a", "--for", "vllm", "--for", "peft==0.21", "--json")
    found = json.loads(done.out)
    assert found["verdict"] == "refused"
    assert found["consumers"] == {"itself": "accepted", "vllm": "refused", "peft==0.21": "accepted"}
    assert [f["consumer"] for f in found["findings"]] == ["vllm"]
    assert done.status == 1


def test_all(here, cli: Cli):
    peft_adapter(here / "a")
    found = json.loads(cli("check", "a", "--for", "all", "--json").out)
    assert {"vllm", "ollama", "comfyui"} <= set(found["consumers"])


def test_against_a_base(here, cli: Cli):
    peft_adapter(here / "a")
    save_file({"model.fc1.weight": np.ones((10, 6), np.float32)}, here / "same.safetensors")
    save_file({"model.fc2.weight": np.ones((10, 6), np.float32)}, here / "other.safetensors")
    assert cli("check", "a", "same.safetensors").status == 0
    done = cli("check", "a", "other.safetensors")
    assert done.status == 1
    assert "1 of 1 modules are not in the base" in done.out
    (here / "names.txt").write_text("*.fc2.weight = *.fc1.weight\n")
    assert cli("check", "a", "other.safetensors", "--names", "names.txt").status == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a", "--for", "nobody"], "consumer is 'nobody'; accepted: vllm"),
        (["nothing"], "nothing"),
        (["m.safetensors"], "without factors of any known convention"),
        (["a", "nothing.safetensors"], "nothing.safetensors"),
        (["a", "--names", "nothing.txt"], "cannot be read as rules between names"),
    ],
)
def test_wrong_input_is_one_sentence(here, cli: Cli, arguments, says):
    peft_adapter(here / "a")
    done = cli("check", *arguments)
    assert done.status not in (0, 3)
    assert says in done.err
    assert done.out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="quotes differ")
def test_a_path_with_blanks_is_quoted_in_the_command(here, cli: Cli):
    peft_adapter(here / "my adapter", use_rslora=True)
    assert "convert 'my adapter' --to portable" in cli("check", "my adapter", "--for=sglang").out


def test_neither_torch_nor_the_base_is_read(here):
    peft_adapter(here / "a")
    save_file({"fc1.weight": np.ones((10, 6), np.float32)}, here / "base.safetensors")
    heavy, shown = audit("check", "a", "base.safetensors")
    assert "torch" not in heavy
    assert "no fault found" in shown


def test_a_verdict_in_the_library(here):
    found = lp.check(peft_adapter(here / "a", rank=32), consumer=["vllm", "sglang"])
    assert (found.worst, found.answer("vllm"), found.answer("sglang")) == (
        "refused",
        "refused",
        "accepted",
    )
    assert "32 is above the default max_lora_rank" in str(found)
    assert repr(found).endswith("itself: accepted, vllm: refused, sglang: accepted>")
    shutil.rmtree(here / "a")


def test_rules_of_a_file_are_for_every_command_that_takes_an_adapter(here, cli: Cli):
    W = np.ones((10, 6), np.float32)
    save_file({"fc2.weight": W}, here / "other.safetensors")
    peft_adapter(here / "a")
    (here / "names.txt").write_text("*.fc2.weight = *.fc1.weight\n")
    for command in (
        ["stats", "other.safetensors", "a"],
        ["bake", "other.safetensors", "a", "-o", "baked.safetensors"],
        ["convert", "a", "--to", "native", "--base", "other.safetensors", "-o", "n.safetensors"],
    ):
        assert "fc1" in cli(*command).err
        done = cli(*command, "--names", "names.txt")
        assert (done.status, done.err) == (0, "")
    assert list(lp.read_adapter("n.safetensors").targets) == ["fc2.weight"]
