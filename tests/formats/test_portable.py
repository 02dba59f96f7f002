"""`portable`: one rank and alpha, plain A and B, and PEFT computes the same from it (issue 10)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import CASES, base_of, load_peft, outputs
from safetensors.torch import load_file

import lora_param as lp
from lora_param.cli.commands import app
from lora_param.cli.terminal import run
from lora_param.errors import NoFormError, OptionError


def trained(model: Any) -> Any:
    with torch.no_grad():
        for i, p in enumerate(lp.parameters(model)):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
    return model


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
    return found


@pytest.mark.parametrize(
    ("name", "targets", "options"),
    [
        ("llama", ["q_proj:rank=3,alpha=7", "down_proj:rank=1", "v_proj"], {}),
        ("llama", ["q_proj", "v_proj:rank=4"], {"scaling": "rslora"}),
        ("llama", ["q_proj[0:4]", "q_proj[8:16]:rank=1"], {}),
        ("llama", ["o_proj"], {"init": "pissa"}),
        ("llama", ["up_proj"], {"variant": "miss"}),
        ("gpt2", ["c_attn", "mlp.c_proj:rank=4"], {}),
    ],
)
def test_ranks_and_scales_become_one_and_outputs_stay(
    name: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    case = CASES[name]
    model = trained(lp.apply(base_of(case), targets, **{"rank": 2, **options}))
    wanted = outputs(model, case)
    lp.save(model, tmp_path / "a.safetensors")
    lp.convert(tmp_path / "a.safetensors", "portable", tmp_path / "out", base=base_of(case))
    config = config_of(tmp_path / "out")
    assert not any(config[n] for n in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora"))
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert not any("." in leaf for leaf in config["target_modules"])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {k.rsplit(".", 2)[1] for k in tensors} == {"lora_A", "lora_B"}
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {config["r"]}
    served, _ = load_peft(case, tmp_path / "out")
    torch.testing.assert_close(outputs(served, case), wanted, rtol=0, atol=5e-6)


def test_of_one_rank_and_scale_the_factors_are_the_same_bits(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = trained(lp.apply(base_of(case), ["q_proj", "v_proj"], rank=4, alpha=8))
    lp.save(model, tmp_path / "peft", format="peft")
    lp.convert(tmp_path / "peft", "portable", tmp_path / "out")  # needs no base
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "out"))
    assert set(before) == set(after)
    assert all(torch.equal(before[k], t) for k, t in after.items())
    assert config_of(tmp_path / "out")["lora_alpha"] == 8


@pytest.mark.parametrize(
    ("name", "targets", "options", "why"),
    [
        ("llama", ["q_proj", "up_proj:variant=dora"], {}, "up_proj.weight, of variant dora"),
        ("llama", ["q_proj", "embed_tokens"], {}, "embed_tokens.weight, of a layer of kind embed"),
        ("mixtral", ["q_proj", "experts.down_proj[*]"], {}, "is no layer's weight"),
        ("convs", ["c1", "head"], {}, "of a layer of kind conv"),
    ],
)
def test_what_servers_have_no_form_for_needs_lossy(
    name: str, targets: list[str], options: dict[str, Any], why: str, tmp_path: Path
) -> None:
    case = CASES[name]
    model = trained(lp.apply(base_of(case), targets, **{"rank": 2, **options}))
    lp.save(model, tmp_path / "a.safetensors")
    with pytest.raises(NoFormError, match=f"{why}.*lossy=True"):
        lp.convert(tmp_path / "a.safetensors", "portable", tmp_path / "out", base=base_of(case))
    assert not (tmp_path / "out").exists()
    rows: list[Any] = []
    record = lp.convert(
        tmp_path / "a.safetensors",
        "portable",
        tmp_path / "out",
        base=base_of(case),
        lossy=True,
        report=rows.append,
    )
    lost = {r.target: r for r in rows}
    source = lp.read_adapter(tmp_path / "a.safetensors")
    assert set(lost) | set(record.targets) == set(source.targets)
    base, full = base_of(case).state_dict(), lp.merged_state_dict(model)
    left = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, row in lost.items():
        if row.rank == 0:
            assert row.error == 1
            continue
        delta = full[key] - base[key]
        stem = f"base_model.model.{key.removesuffix('.weight')}"
        near = left[f"{stem}.lora_B.weight"] @ left[f"{stem}.lora_A.weight"]
        near *= config_of(tmp_path / "out")["lora_alpha"] / config_of(tmp_path / "out")["r"]
        assert float((delta - near).norm() / delta.norm()) == pytest.approx(row.error, rel=1e-3)
        assert 0 < row.error < 1


def test_a_rank_for_all_prints_what_it_loses(tmp_path: Path) -> None:
    case = CASES["llama"]
    model = trained(lp.apply(base_of(case), ["q_proj:rank=4", "v_proj:rank=2"], alpha=4))
    lp.save(model, tmp_path / "peft", format="peft")
    with pytest.raises(OptionError, match="lossy=True"):
        lp.convert(tmp_path / "peft", "portable", tmp_path / "out", base=base_of(case), rank=2)
    rows: list[Any] = []
    lp.convert(
        tmp_path / "peft",
        "portable",
        tmp_path / "out",
        base=base_of(case),
        lossy=True,
        rank=2,
        report=rows.append,
    )
    assert config_of(tmp_path / "out")["r"] == 2
    assert {r.target.split(".")[-2] for r in rows} == {"q_proj"}
    assert all(0 < r.error < 1 for r in rows)


def test_on_the_command_line_the_loss_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(arguments: list[str]) -> int:
        monkeypatch.setattr("sys.argv", ["lora-param", *arguments])
        return run(app)

    case = CASES["llama"]
    torch.save(dict(base_of(case).state_dict()), tmp_path / "base.pt")
    model = trained(lp.apply(base_of(case), ["q_proj:variant=dora", "v_proj"], rank=2))
    lp.save(model, tmp_path / "a.safetensors")
    files = [str(tmp_path / n) for n in ("a.safetensors", "out", "base.pt")]
    command = ["convert", files[0], "--to", "portable", "-o", files[1], "--base", files[2]]
    assert call(command) == 1
    assert "--lossy" in " ".join(capsys.readouterr().err.split())
    assert call([*command, "--lossy", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["lossy"]
    assert {row["target"].split(".")[-2] for row in rows} == {"q_proj"}
    assert call([*command, "--lossy", "--force"]) == 0
    assert "2 → 2" in capsys.readouterr().out


def test_a_rank_above_what_servers_take_by_default_is_noted(tmp_path: Path) -> None:
    case = CASES["llama"]
    for rank, told in [(16, ""), (17, "rank 17.*--max-lora-rank 32")]:
        model = trained(lp.apply(base_of(case), ["q_proj[0:8]:rank=1", "up_proj"], rank=16))
        if rank == 17:
            model = trained(
                lp.apply(base_of(case), ["up_proj[0:8]:rank=1", "up_proj[8:24]"], rank=16)
            )
        record = lp.convert(lp.get_adapter(model), "portable", tmp_path / f"{rank}")
        assert config_of(tmp_path / f"{rank}")["r"] == rank
        said = [n for n in record.notes if "--max-lora-rank" in n]
        assert len(said) == bool(told)
        assert all(re.search(told, n) for n in said)
