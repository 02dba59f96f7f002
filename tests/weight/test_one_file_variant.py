"""A variant is one file and one line in the registry: a copy of the package with a toy one.

Everything else is found by these two: the laws, creation on files, the bake of files, the tables
and the command line's help. No other file of the copy is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lora_param

TESTS = Path(__file__).parents[1]
REGISTRY = "VARIANTS: Mapping[str, Mapping[str, str]] = {\n"
LINE = '    "toy": {"lora_down": "rank in", "lora_up": "out rank", "gain": "rank"},\n'
VARIANT = '''
"""ΔW = strength·scale·(up @ diag(gain) @ down): none of its tensors has LoRA's names."""

import torch

from lora_param.weight.variants.base import Variant


class _Toy(Variant):
    uses_W = False

    def fresh(self, make):
        factors = make.factors()
        gain = torch.ones(make.shapes["gain"], dtype=make.dtype, device=make.device)
        return {"lora_down": factors["lora_A"], "lora_up": factors["lora_B"], "gain": gain}

    def pair(self, tensors, scale, strength):
        up = tensors["lora_up"] * tensors["gain"].unsqueeze(-2)
        return tensors["lora_down"], up, scale * strength


VARIANT = _Toy()
'''
LAWS = '''
from dataclasses import replace

import catalogue

CHOSEN = """linear linear-rows linear-4d-input mlp embedding conv2d conv-transpose mha encoder lstm
experts bare-stack packed-parts packed-base tied-together"""
known = catalogue.reference_delta


def reference_delta(tensors, scale, W, *rest):
    if "gain" not in tensors:
        return known(tensors, scale, W, *rest)
    return scale * ((tensors["lora_up"] * tensors["gain"].unsqueeze(-2)) @ tensors["lora_down"])


class ToyCase(catalogue.Case):
    exact_weights = False  # the gain is multiplied in another order


catalogue.reference_delta = reference_delta
catalogue.CASES = [
    ToyCase(**{**vars(c), "name": f"{c.name}-toy", "variant": "toy"})
    for c in catalogue.PLAIN
    if c.name in CHOSEN.split()
]
assert len(catalogue.CASES) == len(CHOSEN.split())
'''


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the package with one more file and one more line."""
    root = tmp_path_factory.mktemp("toy")
    package = root / "lora_param"
    shutil.copytree(Path(lora_param.__file__).parent, package)
    (package / "weight" / "variants" / "toy.py").write_text(VARIANT)
    registry = package / "targets" / "settings.py"
    text = registry.read_text()
    assert REGISTRY in text
    registry.write_text(text.replace(REGISTRY, REGISTRY + LINE))
    (root / "toy_laws.py").write_text(LAWS)
    yield root
    shutil.rmtree(root)


def run(root: Path, *args: str) -> str:
    path = os.pathsep.join((str(root), str(TESTS)))
    done = subprocess.run(
        [sys.executable, *args],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "NO_COLOR": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_every_law_holds_for_it(copied: Path) -> None:
    laws = ("-p", "toy_laws", "-p", "no:cacheprovider", str(TESTS / "test_laws.py"))
    out = run(copied, "-m", "pytest", "-q", "-x", "-W", "error", "--rootdir", str(copied), *laws)
    assert "-toy" not in out
    assert " passed" in out
    assert "failed" not in out


def test_the_command_line_names_it_makes_it_and_bakes_it(copied: Path) -> None:
    cli = ("-m", "lora_param")
    assert "toy" in run(copied, *cli, "apply", "--help")
    model = "python:demo_model:make"
    (copied / "demo_model.py").write_text(
        "import torch\n\ndef make():\n    torch.manual_seed(0)\n    return torch.nn.Linear(6, 4)\n"
    )
    made = run(copied, *cli, "apply", model, "-r", "2", "--variant", "toy", "-o", "toy.safetensors")
    assert "toy" in made
    told = run(copied, *cli, "stats", "toy.safetensors")
    assert "toy" in told
    assert "22" in told  # 2·6 + 4·2 + 2 trained
    run(copied, *cli, "stats", model, "toy.safetensors", "--html", "toy.html")
    assert "toy" in (copied / "toy.html").read_text()


def test_arithmetic_and_by_hand(copied: Path) -> None:
    (copied / "by_hand.py").write_text(
        "import torch\n"
        "import lora_param as lp\n"
        "from torch.nn.utils.parametrize import register_parametrization\n"
        "layer = torch.nn.Linear(6, 4)\n"
        "W = layer.weight.detach().clone()\n"
        "lora = lp.LoRA(layer.weight.shape, rank=2, alpha=4, variant='toy')\n"
        "register_parametrization(layer, 'weight', lora)\n"
        "torch.nn.init.normal_(lora.lora_up)\n"
        "delta = 2 * (lora.lora_up @ lora.lora_down).detach()\n"
        "assert lora.update().delta(W, torch.float32).allclose(delta)\n"
        "adapter = lp.get_adapter(layer)\n"
        "low = lp.resize(adapter, rank=1)\n"
        "both = lp.combine([adapter, adapter], [0.5, 0.5])\n"
        "again = torch.nn.Linear(6, 4)\n"
        "again.weight.data.copy_(W)\n"
        "again.bias.data.copy_(layer.bias)\n"
        "lp.attach(again, both)\n"
        "assert again.weight.allclose(W + delta, atol=1e-5)\n"
        "lp.bake(layer)\n"
        "assert layer.weight.allclose(W + delta, atol=1e-5)\n"
    )
    run(copied, "by_hand.py")
