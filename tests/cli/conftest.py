"""The command line run in this process, and small files to run it on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from cli_samples import Cli, Done, fill, small_weights
from safetensors.torch import save_file

import lora_param as lp
from lora_param.cli.commands import app
from lora_param.cli.terminal import run


@pytest.fixture
def cli(
    here: Path,  # noqa: ARG001  the commands run there
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Cli:
    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lora-param", *map(str, arguments)])
        capsys.readouterr()
        status = run(app)
        shown = capsys.readouterr()
        return Done(status, shown.out, shown.err)

    return call


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with `m.safetensors`, `m.pt` and `a.safetensors`, trained, for them."""
    monkeypatch.chdir(tmp_path)
    save_file(small_weights(), "m.safetensors", {"format": "pt"})
    torch.save(small_weights(), "m.pt")
    lp.apply_checkpoint("m.safetensors", ["fc1", "fc10"], "a.safetensors", rank=2, seed=0)
    fill(Path("a.safetensors"))
    return tmp_path
