"""Issue 10, "Bad input": one sentence with both sides, and nothing written."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_cases import CASES, base_of, saved
from safetensors.torch import load_file, save_file

import lora_param as lp
from lora_param.errors import LoraParamError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    saved(CASES["square"], tmp_path / "peft")
    (tmp_path / "peft" / "README.md").unlink()
    return tmp_path / "peft"


def configure(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    for name, value in changes.items():
        if value is KeyError:
            del config[name]
        else:
            config[name] = value
    (directory / CONFIG).write_text(json.dumps(config))


def retensor(directory: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, directory / WEIGHTS)


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = next(k for k in tensors if old in k)
        tensors[key.replace(old, new)] = tensors.pop(key)

    return change


def refuse(directory: Path, match: str, tmp_path: Path) -> None:
    """Everything that reads an adapter says so, in one sentence, and leaves nothing behind."""
    model = base_of(CASES["square"])
    torch.save(dict(model.state_dict()), tmp_path / "base.pt")
    before = {n: p.clone() for n, p in model.named_parameters()}
    for use in (
        lambda: lp.load(model, directory),
        lambda: lp.stats(tmp_path / "base.pt", directory),
        lambda: lp.bake_checkpoint(tmp_path / "base.pt", directory, tmp_path / "out.pt"),
        lambda: lp.convert(
            directory, "native", tmp_path / "out.safetensors", base=tmp_path / "base.pt"
        ),
    ):
        with pytest.raises(LoraParamError, match=match) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert {n: p for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {}
    assert not (tmp_path / "out.pt").exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_config_without_weights(adapter: Path, tmp_path: Path) -> None:
    (adapter / WEIGHTS).unlink()
    refuse(adapter, rf"there is {CONFIG} and neither {WEIGHTS} nor adapter_model.bin", tmp_path)


def test_weights_without_a_config(adapter: Path, tmp_path: Path) -> None:
    (adapter / CONFIG).unlink()
    for path in (adapter, adapter / WEIGHTS):
        refuse(
            path, rf"{WEIGHTS} cannot be read: .*without the {CONFIG} that belongs beside", tmp_path
        )


def test_two_adapters_in_one_directory(adapter: Path, tmp_path: Path) -> None:
    (adapter / "adapter_model.bin").write_bytes((adapter / WEIGHTS).read_bytes())
    refuse(adapter, rf"holds both {WEIGHTS} and adapter_model.bin", tmp_path)
    (tmp_path / "two" / "a").mkdir(parents=True)
    (tmp_path / "two" / "b").mkdir()
    for name in "ab":
        (tmp_path / "two" / name / CONFIG).write_text((adapter / CONFIG).read_text())
    refuse(tmp_path / "two", r"several adapters \(a, b\); give one of them", tmp_path)


def test_a_rank_that_disagrees_with_the_tensors(adapter: Path, tmp_path: Path) -> None:
    configure(adapter, r=4)
    refuse(adapter, r"tensors of square are of rank 2, its config says 4", tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["wide"]},
        {"target_modules": "squar"},  # an expression is for the whole name
        {"exclude_modules": ["square"]},
    ],
    ids=str,
)
def test_modules_that_peft_would_leave_out(
    adapter: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    configure(adapter, **changes)
    adapted: list[str] = []
    with warnings.catch_warnings(), suppress(ValueError):  # PEFT's, where no target is left
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(base_of(CASES["square"]), adapter)
        adapted = [name for name, _ in wrapped.named_modules() if name.endswith("lora_A")]
    assert not any("square" in name for name in adapted)
    refuse(adapter, r"factors of square, which target_modules of its config does not", tmp_path)
    found = lp.check(adapter, consumer="peft")
    assert (found.answer("itself"), found.answer("peft")) == ("refused", "differs")


@pytest.mark.parametrize("value", ["(", 3, [3]], ids=str)
def test_target_modules_that_cannot_be_read(adapter: Path, tmp_path: Path, value: object) -> None:
    configure(adapter, target_modules=value)
    refuse(adapter, "target_modules is", tmp_path)
    with pytest.raises(LoraParamError, match="target_modules is"):
        lp.check(adapter)


def test_no_alpha(adapter: Path, tmp_path: Path) -> None:
    configure(adapter, lora_alpha=KeyError)
    refuse(adapter, r"it has no lora_alpha, without which the scale", tmp_path)


def test_halves_of_two_ranks(adapter: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = next(k for k in tensors if "lora_B" in k)
        tensors[key] = tensors[key][:, :1]

    retensor(adapter, change)
    refuse(adapter, r"lora_A of square is of rank 2 and lora_B of rank 1", tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan(adapter: Path, tmp_path: Path, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(t for k, t in tensors.items() if "lora_A" in k)[0, 0] = value

    retensor(adapter, change)
    base = base_of(CASES["square"])
    torch.save(dict(base.state_dict()), tmp_path / "base.pt")
    for use in (
        lambda: lp.load(base, adapter),
        lambda: lp.bake_checkpoint(tmp_path / "base.pt", adapter, tmp_path / "out.pt"),
        lambda: lp.convert(adapter, "native", tmp_path / "o.safetensors", base=base),
        lambda: lp.convert(adapter, "peft", tmp_path / "o", base=base),
    ):
        with pytest.raises(LoraParamError, match="NaN or infinite"):
            use()
    assert [row.words for row in lp.stats(adapter).rows] == [("not finite",)]
    assert {p.name for p in tmp_path.iterdir()} == {"peft", "base.pt"}


def test_keys_of_two_conventions(adapter: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lora_unet_wide.lora_down.weight"] = torch.ones(2, 6)

    retensor(adapter, change)
    refuse(adapter, r"lora_unet_wide.lora_down.weight is one of kohya, beside PEFT's", tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("square.lora_A", "squire.lora_A", "one is missing to .*squire.lora_A.weight"),
        ("lora_A.weight", "lora_C.weight", "lora_C.weight is none that PEFT writes"),
        ("lora_A.weight", "lora_A.default.weight", "lora_A.default.weight is none that PEFT"),
        ("base_model.model.", "model.", "do not begin with base_model.model."),
    ],
)
def test_one_renamed_key_is_an_error_that_names_it(
    old: str, new: str, match: str, adapter: Path, tmp_path: Path
) -> None:
    retensor(adapter, renamed(old, new))
    refuse(adapter, match, tmp_path)


def test_a_renamed_layer_is_an_error_that_names_it(adapter: Path, tmp_path: Path) -> None:
    retensor(adapter, renamed("square", "squire"))
    retensor(adapter, renamed("square", "squire"))
    refuse(adapter, r"0 of 1 targets fit.*In the adapter alone: squire.weight", tmp_path)


def test_a_renamed_copy_is_an_error_that_names_it(tmp_path: Path) -> None:
    saved(CASES["bert"], tmp_path / "peft")
    retensor(tmp_path / "peft", renamed("model.classifier.bias", "model.klassifier.bias"))
    with pytest.raises(LoraParamError, match=r"In the adapter alone: klassifier.bias"):
        lp.load(base_of(CASES["bert"]), tmp_path / "peft")


def test_other_shapes(adapter: Path, tmp_path: Path) -> None:
    retensor(adapter, renamed("square", "wide"))
    retensor(adapter, renamed("square", "wide"))
    refuse(adapter, r"wide.weight is \(9, 6\), the adapter's tensors are for \(6, 6\)", tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"peft_type": "VERA"}, "a PEFT adapter of VERA"),
        ({"use_qalora": True}, "use_qalora in its config.*merge it with PEFT"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "corda"}, "init_lora_weights = 'corda'.*path_initial_model"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"later_field": 3}, "later_field = 3 in its config"),
        ({"use_dora": True}, "square has no lora_magnitude_vector, and its config says DoRA"),
        ({"r": "two"}, "r is 'two'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
    ],
)
def test_what_has_no_form_here_is_refused_by_name(
    changes: dict[str, Any], match: str, adapter: Path, tmp_path: Path
) -> None:
    configure(adapter, **changes)
    refuse(adapter, match, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": NaN}x', "[" * 100_000])
def test_a_config_that_is_none(text: str, adapter: Path, tmp_path: Path) -> None:
    (adapter / CONFIG).write_text(text)
    refuse(adapter, f"{CONFIG} cannot be read", tmp_path)


def test_nulls_stand_for_defaults(adapter: Path) -> None:
    names = ("fan_in_fan_out", "peft_type", "rank_pattern", "alpha_pattern", "use_dora", "bias")
    configure(adapter, **dict.fromkeys(names), target_parameters=[])
    assert list(lp.read_adapter(adapter).targets) == ["square.weight"]


def test_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    """FORMATS.md §3.3: its update reads every input in each group."""
    from peft_cases import quiet

    net = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3, groups=2))
    with quiet():
        import peft

        model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))
        model.save_pretrained(str(tmp_path / "peft"))
    with pytest.raises(LoraParamError, match="grouped convolution 0"):
        lp.read_adapter(tmp_path / "peft")


def test_factors_that_pefts_own_forward_ignores_are_refused(tmp_path: Path) -> None:
    case = CASES["attention"]
    saved(case, tmp_path / "peft", target_modules=["out_proj"])
    with pytest.raises(LoraParamError, match=r"attn.out_proj.*PEFT's forward does not use"):
        lp.load(base_of(case), tmp_path / "peft")


def test_a_switch_is_not_in_the_format_and_the_way_out_is_said(adapter: Path) -> None:
    for switch in (lp.enable, lp.disable):
        with pytest.raises(LoraParamError, match=r"cannot be switched.*convert .*--to native"):
            switch(adapter)
