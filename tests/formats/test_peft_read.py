"""A PEFT adapter means here what it means to PEFT: the same ΔW, the same outputs.

Issue 10, section 1: written live by PEFT 0.21.2 over all of its layers, and by 0.18.1 (fixtures).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft_cases
import pytest
import torch
from peft_cases import CASES, Case, adapt, base_of, deltas, outputs, quiet, saved
from safetensors.torch import load_file, save_file
from tiny_models import gpt2
from torch import nn
from write_peft_fixtures import NAMES

import lora_param as lp
from lora_param.errors import MismatchError, UnsettledError

OLD = Path(__file__).parent / "peft-0.18.1"


def cases(*, but: Callable[[Case], bool] = lambda _: False) -> Any:
    chosen = [c for c in CASES.values() if not but(c)]
    return pytest.mark.parametrize("case", chosen, ids=[c.name for c in chosen])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Case → PEFT's model, the directory that it saved, its outputs; made once each."""
    made: dict[str, tuple[Any, Path, torch.Tensor]] = {}

    def of(case: Case) -> tuple[Any, Path, torch.Tensor]:
        if case.name not in made:
            directory = tmp_path_factory.mktemp(case.name)
            model, found = saved(case, directory)
            made[case.name] = model, directory, found
        return made[case.name]

    return of


def loaded(case: Case, directory: Path, **kwargs: Any) -> nn.Module:
    return lp.load(base_of(case), directory, **kwargs)


@cases()
def test_outputs_are_pefts(case: Case, written: Any) -> None:
    _, directory, wanted = written(case)
    model = loaded(case, directory)
    assert (outputs(base_of(case), case) - wanted).abs().max() > 0.01
    torch.testing.assert_close(outputs(model, case), wanted, rtol=0, atol=case.tolerance)
    lp.disable(model)
    assert torch.equal(outputs(model, case), outputs(base_of(case), case))


# get_delta_weight leaves out what DoRA and pissa do to W: the merge below has it
@cases(but=lambda c: c.config.get("use_dora") or "init_lora_weights" in c.config)
def test_delta_is_what_peft_says_it_is(case: Case, written: Any) -> None:
    peft_model, directory, _ = written(case)
    model = loaded(case, directory)
    merged, base = lp.merged_state_dict(model), lp.base_state_dict(model)
    found = deltas(peft_model)
    assert found
    for name, delta in found.items():
        if name == "attn.out_proj.weight":  # PEFT adds it twice, in its forward as in its merge
            delta = 2 * delta
        assert (merged[name] - base[name] - delta).abs().max() < 1e-6, name


# PEFT's merge of one side of a tie changes both, unlike its forward
@cases(but=lambda c: c.tied)
def test_the_baked_weights_are_pefts_merged_ones(
    case: Case, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory, _ = written(case)
    with quiet():
        wanted = adapt(case).merge_and_unload().state_dict()
    live = lp.bake(loaded(case, directory)).state_dict()
    base: Path | str = tmp_path / "base.pt"
    torch.save(dict(base_of(case).state_dict()), base)
    if case.name.startswith("stacks"):  # like shapes: the file does not tell them apart
        monkeypatch.setattr(peft_cases, "chosen", lambda: base_of(case), raising=False)
        base = "python:peft_cases:chosen"
    report = lp.bake_checkpoint(base, directory, tmp_path / "out.pt")
    assert any("do not say what base" in note for note in report.notes)
    baked = torch.load(tmp_path / "out.pt")
    for name, tensor in wanted.items():
        torch.testing.assert_close(live[name], tensor, rtol=0, atol=5e-6, msg=name)
        assert torch.equal(baked[name], live[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_adapters_of_peft_0_18_1_give_its_outputs(name: str) -> None:
    case, directory = CASES[name], OLD / name
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["peft_version"] == "0.18.1"
    wanted = load_file(directory / "outputs.safetensors")["outputs"]
    model = loaded(case, directory)
    torch.testing.assert_close(outputs(model, case), wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_two_eras_of_a_square_stack_are_told_apart_by_the_version(
    transposed: bool, written: Any, tmp_path: Path
) -> None:
    """Issue 10: told apart by `peft_version`, asked for where it stays open, never guessed."""
    case = CASES[f"stacks-6x6{'-transposed' * transposed}"]
    old = lp.read_adapter(OLD / case.name)
    new = lp.read_adapter(written(case)[1])
    for record in (old, new):
        assert set(lp.get_adapter(lp.attach(base_of(case), record)).targets) == {
            "proj.weight",
            "experts.up[*]",
            "experts.down[*]",
        }
    nameless = shutil.copytree(OLD / case.name, tmp_path / "nameless")
    config = json.loads((nameless / "adapter_config.json").read_text())
    del config["peft_version"]
    (nameless / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsettledError, match=r"layout='out-in' or 'in-out'"):
        loaded(case, nameless)
    wanted = load_file(OLD / case.name / "outputs.safetensors")["outputs"]
    model = loaded(case, nameless, layout="in-out")
    torch.testing.assert_close(outputs(model, case), wanted, rtol=0, atol=2e-6)


def test_a_square_stack_in_a_file_is_asked_for_and_the_older_era_is_not(tmp_path: Path) -> None:
    """A file does not say whether the module is transposed; before 0.19.1 PEFT did not ask it."""
    case = CASES["stacks-6x6-transposed"]
    config = {**case.config, "target_parameters": ["experts.up"]}
    base = tmp_path / "base.pt"
    torch.save(dict(base_of(case).state_dict()), base)
    _, wanted = saved(case, tmp_path / "new", **config)
    with pytest.raises(UnsettledError, match=r"(?s)experts.up.*layout='out-in'"):
        lp.bake_checkpoint(base, tmp_path / "new", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    old = shutil.copytree(tmp_path / "new", tmp_path / "old")
    text = (old / "adapter_config.json").read_text()
    (old / "adapter_config.json").write_text(text.replace('"0.21.2"', '"0.18.1"'))
    lp.bake_checkpoint(base, old, tmp_path / "by_version.pt")
    lp.bake_checkpoint(base, tmp_path / "new", tmp_path / "said.pt", layout="in-out")
    for name in ("by_version.pt", "said.pt"):
        model = base_of(case)
        model.load_state_dict(torch.load(tmp_path / name))
        assert (outputs(model, case) - wanted).abs().max() < 2e-6


def test_oblong_stacks_in_a_file_are_told_apart_by_the_era(tmp_path: Path) -> None:
    case = CASES["stacks-6x8"]
    base = tmp_path / "base.pt"
    torch.save(dict(base_of(case).state_dict()), base)
    lp.bake_checkpoint(base, OLD / case.name, tmp_path / "out.pt")
    model = base_of(case)
    model.load_state_dict(torch.load(tmp_path / "out.pt"))
    wanted = load_file(OLD / case.name / "outputs.safetensors")["outputs"]
    assert (outputs(model, case) - wanted).abs().max() < 2e-6


def test_bin_files_and_single_files_and_named_adapters_are_read(tmp_path: Path) -> None:
    case = CASES["square"]
    model, wanted = saved(case, tmp_path / "safe")
    with quiet():
        model.save_pretrained(str(tmp_path / "pickled"), safe_serialization=False)
        model.add_adapter("second", model.peft_config["default"])
        model.save_pretrained(str(tmp_path / "named"), selected_adapters=["second"])
    assert (tmp_path / "pickled" / "adapter_model.bin").is_file()
    for path in (
        tmp_path / "pickled",
        tmp_path / "pickled" / "adapter_model.bin",
        tmp_path / "safe" / "adapter_model.safetensors",
        tmp_path / "safe" / "adapter_config.json",
    ):
        assert (outputs(loaded(case, path), case) - wanted).abs().max() < 2e-6
    assert lp.read_adapter(tmp_path / "named").name == "second"


def test_a_square_weight_without_classes_follows_the_flag_where_all_else_agrees(
    tmp_path: Path,
) -> None:
    case = CASES["gpt2"]
    _, wanted = saved(case, tmp_path / "a")
    torch.save(base_of(case).state_dict(), tmp_path / "base.pt")
    lp.bake_checkpoint(tmp_path / "base.pt", tmp_path / "a", tmp_path / "out.pt")
    model = base_of(case)
    model.load_state_dict(torch.load(tmp_path / "out.pt"))
    assert (outputs(model, case) - wanted).abs().max() < 2e-6
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["fan_in_fan_out"] = False  # as PEFT leaves it where the last layer was a Linear
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsettledError, match=r"(?s)attn.c_proj.weight.*layout='out-in'"):
        lp.bake_checkpoint(tmp_path / "base.pt", tmp_path / "a", tmp_path / "b.pt")
    lp.bake_checkpoint(tmp_path / "base.pt", tmp_path / "a", tmp_path / "b.pt", layout="in-out")
    assert (tmp_path / "b.pt").exists()


@pytest.mark.parametrize("alpha", [0, -3])
def test_an_alpha_that_is_not_positive_keeps_its_sign(alpha: int, tmp_path: Path) -> None:
    case = CASES["square"]
    _, wanted = saved(case, tmp_path, lora_alpha=alpha)
    assert (outputs(loaded(case, tmp_path), case) - wanted).abs().max() < 2e-6


def test_a_pattern_that_saving_has_sorted_last_still_gives_the_rank(tmp_path: Path) -> None:
    """FORMATS.md §3.5: overlapping patterns pick another rank after PEFT has sorted them."""
    case = CASES["llama-rslora-patterns"]
    patterns = {"self_attn.q_proj": 5, "q_proj": 2}  # sorted: q_proj comes first
    _, wanted = saved(case, tmp_path, rank_pattern=patterns, alpha_pattern={})
    model = loaded(case, tmp_path)
    assert {t.settings.rank for t in lp.get_adapter(model).targets.values()} == {5, 3}
    assert (outputs(model, case) - wanted).abs().max() < 2e-6


def test_an_adapter_of_another_architecture_lists_both_sides(written: Any) -> None:
    _, directory, _ = written(CASES["llama"])
    with pytest.raises(MismatchError, match=r"(?s)0 of 14 targets fit.*self_attn") as caught:
        loaded(CASES["square"], directory)
    assert "the model" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "own"), [("gpt2", "transformer."), ("llama-tokens", "model."), ("mixtral", "model.")]
)
def test_a_checkpoint_under_another_prefix_is_found(
    name: str, own: str, written: Any, tmp_path: Path
) -> None:
    """PEFT names modules of the live model; a file often leaves its first segment out."""
    case = CASES[name]
    _, directory, _ = written(case)
    state = {n.removeprefix(own): t for n, t in base_of(case).state_dict().items()}
    save_file({n: t.contiguous().clone() for n, t in state.items()}, tmp_path / "base.safetensors")
    lp.bake_checkpoint(tmp_path / "base.safetensors", directory, tmp_path / "out.safetensors")
    wanted = lp.merged_state_dict(loaded(case, directory))
    for n, tensor in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(tensor, wanted[n if n in wanted else f"{own}{n}"]), n


def test_loading_says_that_the_file_does_not_say_its_base(
    written: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = CASES["llama-rslora-patterns"]
    _, directory, _ = written(case)
    model = loaded(case, directory)
    (note,) = [r.getMessage() for r in caplog.records if r.name == "lora_param"]
    assert note.startswith(f"{directory} does not say what base it was made on")
    caplog.clear()
    lp.save(model, tmp_path / "a.safetensors")  # this one does
    lp.load(base_of(case), tmp_path / "a.safetensors")
    assert not [r for r in caplog.records if r.name == "lora_param"]


@pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own
def test_a_head_that_a_file_does_not_hold_is_told_of(tmp_path: Path) -> None:
    """A file has one weight for embedding and head; live, PEFT's forward leaves the head alone."""
    gpt2().save_pretrained(tmp_path / "base")
    wrapped = peft.get_peft_model(
        gpt2(), peft.LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "a")
    report = lp.bake_checkpoint(tmp_path / "base", tmp_path / "a", tmp_path / "baked")
    (note,) = (n for n in report.notes if "output head" in n)
    assert "changes with it in a file" in note
    live = lp.load(gpt2(), tmp_path / "a")
    ids = torch.arange(7)[None]
    torch.testing.assert_close(live(ids).logits, wrapped(ids).logits, atol=1e-5, rtol=1e-5)
    baked = type(live).from_pretrained(tmp_path / "baked")
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(baked(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-5)
    assert not any("output head" in n for n in lp.get_adapter(live).notes)
