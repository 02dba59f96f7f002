"""A PEFT directory wherever an adapter is taken, on the command line (issue 10, section 1)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_samples import Cli, snapshot
from torch import nn

import lora_param as lp

FIXTURES = Path(__file__).parent.parent / "formats" / "peft-0.18.1"


@pytest.fixture
def peft(here: Path) -> nn.Module:  # noqa: ARG001  the current directory
    """`base.pt`, and `peft/` with an adapter on it; the adapted model."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    torch.save(net.state_dict(), "base.pt")
    lp.apply(net, ["0", "2"], rank=2)
    with torch.no_grad():
        for p in lp.parameters(net):
            p.copy_(torch.randn(p.shape))
    lp.save(net, "peft", format="peft")
    return net


def done(cli: Cli, *args: str) -> Any:
    """What a command prints, which succeeds; with --json as data."""
    found = cli(*args)
    assert found.status == 0, found
    return json.loads(found.out) if "--json" in args else " ".join(found.out.split())


def test_stats_bake_and_convert(peft: nn.Module, cli: Cli) -> None:
    alone = done(cli, "stats", "peft", "--json")
    assert [r["target"] for r in alone["rows"]] == ["0.weight", "2.weight"]
    assert any("checked when a base is given" in n for n in alone["notes"])
    assert "names and shapes alone were compared" in done(cli, "stats", "base.pt", "peft")
    report = done(cli, "bake", "base.pt", "peft", "-o", "out.pt", "--verify", "--json")
    assert report["baked"] == ["0.weight", "2.weight"]
    assert any("do not say what base" in n for n in report["notes"])
    merged = lp.merged_state_dict(peft)
    assert all(torch.equal(t, merged[n]) for n, t in torch.load("out.pt").items())
    done(cli, "convert", "peft", "--to", "native", "--base", "base.pt", "-o", "b.safetensors")
    done(cli, "disable", "b.safetensors", "-t", "2")
    done(cli, "enable", "b.safetensors")
    done(cli, "convert", "b.safetensors", "--to", "peft", "--base", "base.pt", "-o", "again")
    weights, again = (Path(d, "adapter_model.safetensors").read_bytes() for d in ("peft", "again"))
    assert weights == again


@pytest.mark.usefixtures("peft")
def test_errors_are_one_sentence_and_write_nothing(cli: Cli, here: Path) -> None:
    for args, told in (
        (("enable", "peft"), "cannot be switched"),
        (("disable", "peft"), "--to native"),
        (("convert", "peft", "--to", "native", "-o", "b.safetensors"), "--base MODEL"),
        (
            ("convert", "peft", "--to", "another", "-o", "b.safetensors"),
            "native, mlx, diffusers, peft",
        ),
        (("convert", "peft", "--to", "peft", "-o", "peft", "--base", "base.pt"), "--force"),
        (("convert", "a.safetensors", "--to", "peft", "-o", "b"), "--base python:"),
    ):
        before = snapshot(here)
        found = cli(*args)
        assert (found.status, found.out) == (1, "")
        assert told in found.err
        assert found.err.count("\n") == 1
        assert snapshot(here) == before


def test_a_stack_that_the_file_leaves_open_is_asked_for(cli: Cli, here: Path) -> None:
    shutil.copytree(FIXTURES / "stacks-6x6", here / "stacks")
    shapes = {"proj.weight": (6, 6), "experts.up": (3, 6, 6), "experts.down": (3, 6, 6)}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, "base.pt")
    found = cli("bake", "base.pt", "stacks", "-o", "out.pt")
    assert found.status == 1
    assert "experts.up, experts.down" in found.err
    assert "--layout" in found.err
    assert not Path("out.pt").exists()
