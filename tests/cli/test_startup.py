"""What answers without torch: audited, not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lora_param as lp

AUDIT = """
import json, sys
try:
    from lora_param.cli.commands import app
    from lora_param.cli.terminal import run
    sys.argv[0] = "lora-param"
    status = run(app)
finally:
    heavy = [m for m in ("torch", "numpy", "transformers", "sympy") if m in sys.modules]
    print(json.dumps({"heavy": heavy}), file=sys.stderr)
sys.exit(status)
"""


def audit(*arguments: str) -> tuple[list[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", AUDIT, *arguments], capture_output=True, text=True, check=True
    )
    heavy: list[str] = json.loads(done.stderr.splitlines()[-1])["heavy"]
    return heavy, done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("startup")
    base, adapter = folder / "base.safetensors", folder / "adapter.safetensors"
    save_file({"fc.weight": torch.randn(8, 6)}, base)
    lp.apply_checkpoint(base, ["fc"], adapter, rank=2)
    return {"base": str(base), "adapter": str(adapter), "page": str(folder / "page.html")}


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, lora_param; print([m for m in ('torch','rich','typer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        None,
        "apply",
        "stats",
        "enable",
        "disable",
        "bake",
        "check",
        "extract",
        "combine",
        "resize",
        "diff",
        "demo",
    ],
)
def test_help_needs_neither_torch_nor_numpy(command: str | None) -> None:
    heavy, shown = audit(*([command] if command else []), "--help")
    assert heavy == []
    assert "Usage" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["stats", "base"],
        ["stats", "adapter"],
        ["stats", "base", "adapter"],
        ["stats", "base", "adapter", "--html", "page"],
        ["disable", "adapter"],
        ["enable", "adapter"],
    ],
    ids=" ".join,
)
def test_safetensors_need_no_torch(arguments: list[str], files: dict[str, str]) -> None:
    heavy, shown = audit(*(files.get(a, a) for a in arguments))
    assert "torch" not in heavy
    assert shown


def test_python_dash_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lora_param", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"lora-param {lp.__version__}"
    assert Path(lp.__file__).exists()
