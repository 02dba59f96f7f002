"""Every format by `convert --to`, and other tools' adapters wherever one is taken (issue 10)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import Cli, fill
from safetensors.torch import load_file

import lora_param as lp
from lora_param.formats import FORMATS

TOOLS = Path(__file__).parents[1] / "formats" / "tools"
ENDS = {"peft": "", "portable": "", "mlx": "", "gguf": ".gguf", "loralib": ".pt", "minlora": ".pt"}


def done(cli: Cli, *args: object) -> Any:
    """What a command prints, which succeeds; with --json as data."""
    found = cli(*args)
    assert found.status == 0, found
    return json.loads(found.out) if "--json" in args else " ".join(found.out.split())


@pytest.fixture
def llama(here: Path) -> Path:  # noqa: ARG001  the current directory
    """`llama/`, a model of transformers, and `n.safetensors`, a trained adapter for it."""
    shutil.copytree(TOOLS / "torchtune" / "hf", "llama")
    targets = ["q_proj:rank=2,alpha=3", "k_proj:rank=2,alpha=3", "v_proj:rank=3,alpha=5"]
    lp.apply_checkpoint("llama", [*targets, "down_proj:rank=1,alpha=2"], "n.safetensors")
    fill(Path("n.safetensors"))
    return Path("llama")


@pytest.mark.parametrize("to", [n for n in FORMATS if n != "diffusers"])
@pytest.mark.usefixtures("llama")
def test_each_format_keeps_the_update(to: str, cli: Cli) -> None:
    out = f"out{ENDS.get(to, '.safetensors')}"
    said = done(cli, "convert", "n.safetensors", "--to", to, "-o", out, "--base", "llama", "--json")
    alpha = [m[1] for n in said["notes"] if (m := re.search(r"with alpha ([\d.]+)", n))]
    told = ["--alpha", alpha[0]] if alpha else []
    assert bool(told) == ("alpha" in FORMATS[to].takes)
    told += ["--layout", "out-in"] if to == "loralib" else []  # q_proj is square
    report = done(cli, "bake", "llama", out, "-o", "one", *told, "--json")
    assert len(report["baked"]) == 8
    done(cli, "bake", "llama", "n.safetensors", "-o", "other")
    one, other = (load_file(Path(d, "model.safetensors")) for d in ("one", "other"))
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=0, atol=1e-6, msg=name)
    rows = done(cli, "stats", "llama", out, *told, "--json")["rows"]
    assert len(rows) == 8
    assert done(cli, "check", out, "llama")


@pytest.mark.parametrize("to", ["loralib", "minlora", "torchtune", "mlx", "gguf", "diffusers"])
@pytest.mark.usefixtures("llama")
def test_what_a_format_has_no_form_for_needs_lossy(to: str, cli: Cli) -> None:
    lp.apply_checkpoint("llama", ["v_proj", "o_proj:variant=dora"], "d.safetensors", rank=2)
    fill(Path("d.safetensors"))
    out = f"out{ENDS.get(to, '.safetensors')}"
    args = ("convert", "d.safetensors", "--to", to, "-o", out, "--base", "llama")
    if to == "torchtune":  # which has DoRA for each layer
        assert done(cli, *args)
        return
    found = cli(*args)
    assert found.status == 1
    assert not Path(out).exists()
    if to in ("diffusers", "mlx"):
        why = {"diffusers": "no part of a pipeline", "mlx": "DoRA on some targets and not on"}
        assert why[to] in found.err
        return
    assert "o_proj.weight" in found.err
    assert "--lossy" in found.err
    rows = done(cli, *args, "--lossy", "--json")["lossy"]
    assert {r["target"].split(".")[-2] for r in rows} == {"o_proj"}
    assert all(0 < r["error"] < 1 for r in rows)


def test_alpha_and_enabled_blocks_are_options(cli: Cli, here: Path) -> None:
    shutil.copy(TOOLS / "loralib" / "lora.pt", here)
    base = TOOLS / "loralib" / "base.safetensors"
    found = cli("stats", "lora.pt")
    assert found.status == 1
    assert "--alpha" in found.err
    assert len(done(cli, "stats", "lora.pt", "--alpha", "3", "--json")["rows"]) == 11
    convert = ("convert", "lora.pt", "--to", "native", "-o", "n.safetensors", "--base", base)
    found = cli(*convert, "--alpha", "3")
    assert found.status == 1
    assert "--enable-lora 1,0,1" in found.err
    found = cli(*convert, "--alpha", "3", "--enable-lora", "1,maybe")
    assert found.status == 1
    assert "0 or 1 for each block" in found.err
    done(cli, *convert, "--alpha", "3", "--enable-lora", "1,0,1")
    done(cli, "bake", base, "n.safetensors", "-o", "out.safetensors")
    wanted = load_file(TOOLS / "loralib" / "merged.safetensors")
    for name, tensor in load_file("out.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6, msg=name)
    found = cli("disable", "lora.pt")
    assert found.status == 1
    assert "the format loralib" in found.err


def test_alpha_for_a_file_that_says_it_is_refused(cli: Cli) -> None:
    found = cli("stats", "a.safetensors", "--alpha", "3")
    assert found.status == 1
    assert "native has no use for it" in found.err


@pytest.mark.parametrize("more", [(), ("--lossy",)])
def test_a_format_that_is_none_is_an_error_that_lists_them(cli: Cli, more: tuple[str, ...]) -> None:
    found = cli("convert", "a.safetensors", "--to", "another", "-o", "b.safetensors", *more)
    assert found.status == 1
    assert all(name in found.err for name in FORMATS)
