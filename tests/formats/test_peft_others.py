"""PEFT's LoHa, LoKr and OFT, written live by PEFT, mean here what they mean to PEFT (issue 10)."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_cases import quiet
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_param as lp
from lora_param.errors import BrokenFileError, NoFormError, UnknownFileError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.fc = nn.Linear(12, 18)
        self.conv = nn.Conv2d(6, 8, (3, 2))
        self.point = nn.Conv2d(8, 6, 1)
        self.line = nn.Conv1d(6, 8, 3)
        self.head = nn.Linear(18, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fc(self.emb(ids))  # (2, 20, 18)
        images = x.reshape(2, 6, 10, 6)
        images = self.point(self.conv(images)).reshape(2, 6, -1)
        return self.head(x).mean((1, 2)) + self.line(images).mean((1, 2))


IDS = torch.arange(40).reshape(2, 20) % 20
_LAYERS = ["fc", "conv", "line", "point"]
_LOHA = {"r": 2, "alpha": 3, "target_modules": _LAYERS, "init_weights": False}
_LOKR = {**_LOHA, "r": 1}
_FLAT = ["fc", "conv", "point"]  # without a 1-d convolution, on which PEFT's LoKr fails
_OFT = {"r": 0, "oft_block_size": 3, "target_modules": ["fc", "head"], "init_weights": False}
CASES: dict[str, Any] = {
    "loha": lambda: peft.LoHaConfig(**_LOHA),
    "loha-effective": lambda: peft.LoHaConfig(**_LOHA, use_effective_conv2d=True),
    "loha-patterns": lambda: peft.LoHaConfig(
        **_LOHA, rank_pattern={"fc": 3}, alpha_pattern={"conv": 1.5}, modules_to_save=["head"]
    ),
    "lokr": lambda: peft.LoKrConfig(**_LOKR),
    "lokr-effective": lambda: peft.LoKrConfig(
        **{**_LOKR, "target_modules": _FLAT}, use_effective_conv2d=True
    ),
    "lokr-factor": lambda: peft.LoKrConfig(**_LOKR, decompose_factor=2),
    "lokr-whole": lambda: peft.LoKrConfig(**{**_LOKR, "r": 9, "target_modules": _FLAT}),
    "lokr-both": lambda: peft.LoKrConfig(**_LOKR, decompose_both=True, decompose_factor=3),
    "oft": lambda: peft.OFTConfig(**_OFT, use_cayley_neumann=False),
    "oft-series": lambda: peft.OFTConfig(**_OFT),
    "oft-two-terms": lambda: peft.OFTConfig(**_OFT, num_cayley_neumann_terms=2),
    "oft-three-terms": lambda: peft.OFTConfig(**_OFT, num_cayley_neumann_terms=3),
    "oft-shared": lambda: peft.OFTConfig(**_OFT, block_share=True, bias="oft_only"),
    "oft-blocks": lambda: peft.OFTConfig(**{**_OFT, "r": 3, "oft_block_size": 0}),
    "oft-embedding": lambda: peft.OFTConfig(
        **{**_OFT, "oft_block_size": 2, "target_modules": ["emb", "point"]}
    ),
}


def base() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape) * 0.3)
    return net


def saved(name: str, directory: Path) -> Any:
    """PEFT's model, and the directory it wrote."""
    torch.manual_seed(1)
    with quiet():
        model = peft.get_peft_model(base(), CASES[name]()).eval()
        with torch.no_grad():
            for n, p in model.named_parameters():
                if "modules_to_save.default" in n or (p.requires_grad and n.endswith("bias")):
                    p.add_(0.1)
        model.save_pretrained(str(directory))
    return model


every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_outputs_deltas_and_merges_are_pefts(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / "peft")
    ours = lp.load(base(), tmp_path / "peft")
    with torch.no_grad():
        wanted = theirs(IDS)
        assert (wanted - base()(IDS)).abs().max() > 1e-3
        torch.testing.assert_close(ours(IDS), wanted, rtol=0, atol=5e-6)
        state = lp.merged_state_dict(ours)
        if not name.startswith("oft"):
            for key, t in lp.get_adapter(ours).targets.items():
                if t.settings.variant == "copy":
                    continue
                module = theirs.base_model.model.get_submodule(key.removesuffix(".weight"))
                update = state[key] - base().state_dict()[key]
                delta = module.get_delta_weight("default")
                torch.testing.assert_close(update, delta, rtol=0, atol=1e-6)
    lp.disable(ours)
    assert torch.equal(ours(IDS), base()(IDS))
    save_file(base().state_dict(), tmp_path / "base.safetensors")
    lp.bake_checkpoint(
        tmp_path / "base.safetensors", tmp_path / "peft", tmp_path / "out.safetensors"
    )
    with quiet():
        merged = theirs.merge_and_unload().state_dict()
    for key, tensor in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(tensor, merged[key], rtol=0, atol=1e-6)


@every_case
def test_peft_to_here_to_peft(name: str, tmp_path: Path) -> None:
    theirs = saved(name, tmp_path / "peft")
    wanted = theirs(IDS)
    ours = lp.load(base(), tmp_path / "peft")
    lp.save(ours, tmp_path / "ours", format="peft")
    assert (tmp_path / "ours" / WEIGHTS).read_bytes() == (tmp_path / "peft" / WEIGHTS).read_bytes()
    with quiet() as told:
        again = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
        again.save_pretrained(str(tmp_path / "again"))
    assert not [t for t in told if "missing" in t or "unexpected" in t]
    torch.testing.assert_close(again(IDS), wanted, rtol=0, atol=5e-6)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()
    lp.save(ours, tmp_path / "native.safetensors")
    lp.convert(tmp_path / "native.safetensors", "peft", tmp_path / "b", base=base())
    assert (tmp_path / "b" / WEIGHTS).read_bytes() == (tmp_path / "ours" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("variant", "form", "rank"),
    [
        ("loha", "", 2),
        ("lokr", "left2x2", 2),
        ("lokr", "full+left3x3", 2),
        ("lokr", "left2x2", 8),
        ("lokr", "both+left6x6", 2),
    ],
)
def test_what_was_trained_here_is_loaded_by_peft(
    variant: str, form: str, rank: int, tmp_path: Path
) -> None:
    ours = lp.apply(base(), ["fc"], rank=rank, variant=variant, form=form)
    with torch.no_grad():
        for p in lp.parameters(ours):
            p.copy_(torch.randn(p.shape) * 0.3)
    lp.save(ours, tmp_path / "ours", format="peft")
    with quiet() as told:
        theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    assert not [t for t in told if "missing" in t or "unexpected" in t]
    torch.testing.assert_close(theirs(IDS), ours(IDS), rtol=0, atol=5e-6)
    again = lp.load(base(), tmp_path / "ours")
    torch.testing.assert_close(again(IDS), ours(IDS), rtol=0, atol=5e-6)


def test_lycoris_to_peft_and_back(tmp_path: Path) -> None:
    saved("loha", tmp_path / "peft")
    wanted = lp.merged_state_dict(lp.load(base(), tmp_path / "peft"))
    lp.convert(tmp_path / "peft", "lycoris", tmp_path / "a.safetensors", base=base())
    lp.convert(tmp_path / "a.safetensors", "peft", tmp_path / "b", base=base())
    for path in (tmp_path / "a.safetensors", tmp_path / "b"):
        found = lp.merged_state_dict(lp.load(base(), path))
        assert all(torch.equal(found[k], t) for k, t in wanted.items())


@pytest.mark.parametrize("form", ["", "both"])
def test_low_precision_factors_multiplied_out_lose_nothing(form: str, tmp_path: Path) -> None:
    """PEFT has no LoKr whose second matrix is of factors at this rank: they are multiplied out."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 32))
    net = lp.apply(copy.deepcopy(plain), ["0"], rank=8, alpha=8, variant="lokr", form=form)
    for p in lp.parameters(net):
        p.data = torch.randn(p.shape).bfloat16()
    wanted = lp.merged_state_dict(net)["0.weight"]
    lp.save(net, tmp_path / "a", format="peft")
    found = lp.merged_state_dict(lp.load(copy.deepcopy(plain), tmp_path / "a"))["0.weight"]
    change = wanted - plain[0].weight.detach()
    assert (found - wanted).norm() <= 1e-6 * change.norm()


def test_listed_without_a_base(tmp_path: Path) -> None:
    for name in ("loha", "lokr", "oft"):
        saved(name, tmp_path / name)
        rows = lp.stats(tmp_path / name).rows
        assert {r.variant for r in rows} <= {"loha", "lokr", "oft_columns"}


def test_a_convolution_that_peft_turns_in_two_ways_is_refused(tmp_path: Path) -> None:
    with quiet():
        config = peft.OFTConfig(**{**_OFT, "target_modules": ["conv"]})
        peft.get_peft_model(base(), config).save_pretrained(str(tmp_path / "peft"))
    with pytest.raises(NoFormError, match=r"rotation of conv.*two different things"):
        lp.load(base(), tmp_path / "peft")


def test_a_whole_lokr_of_a_1d_convolution_is_refused(tmp_path: Path) -> None:
    with quiet():
        config = peft.LoKrConfig(**{**_LOKR, "r": 9, "target_modules": ["line"]})
        peft.get_peft_model(base(), config).save_pretrained(str(tmp_path / "peft"))
    with pytest.raises(NoFormError, match=r"1-d convolution line, which PEFT lays out"):
        lp.load(base(), tmp_path / "peft")


@pytest.mark.parametrize(
    ("name", "config", "weights", "error", "told"),
    [
        ("oft", {"coft": True}, {}, NoFormError, "coft"),
        ("oft-series", {"peft_version": "0.17.1"}, {}, NoFormError, "before 0.18"),
        ("oft", {"oft_block_size": "gone"}, {}, NoFormError, "before 0.14"),
        (
            "oft",
            {"num_cayley_neumann_terms": 0, "use_cayley_neumann": True},
            {},
            BrokenFileError,
            "num_cayley_neumann_terms",
        ),
        ("oft", {}, {"fc.oft_R.weight": torch.ones(4, 4)}, BrokenFileError, r"\(4, 4\)"),
        (
            "loha",
            {"peft_type": "LORA", "lora_alpha": 3, "alpha": None},
            {},
            BrokenFileError,
            "says LORA",
        ),
        ("loha", {"peft_type": "LOKR"}, {}, BrokenFileError, "not those of LOKR"),
        ("loha", {"peft_type": "VERA"}, {}, UnknownFileError, "VERA"),
        ("loha", {"alpha": "gone"}, {}, BrokenFileError, "no alpha"),
        ("loha", {"use_dora": True}, {}, NoFormError, "use_dora"),
        ("loha", {"r": 5}, {}, BrokenFileError, "rank 2.*says 5"),
        ("loha", {}, {"fc.hada_w2_b": torch.ones(2, 13)}, BrokenFileError, "hada_w2_b"),
        ("loha", {}, {"fc.hada_w9_b": torch.ones(2, 13)}, BrokenFileError, "hada_w9_b"),
        ("loha", {}, {"fc.lora_A.weight": torch.ones(2, 13)}, BrokenFileError, "A, hada"),
    ],
)
def test_what_does_not_fit_is_named(
    name: str,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    error: type[Exception],
    told: str,
    tmp_path: Path,
) -> None:
    saved(name, tmp_path / "peft")
    path = tmp_path / "peft" / CONFIG
    changed = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({k: v for k, v in changed.items() if v != "gone"}))
    tensors = load_file(tmp_path / "peft" / WEIGHTS)
    tensors |= {f"base_model.model.{k}": t for k, t in weights.items()}
    save_file(tensors, tmp_path / "peft" / WEIGHTS)
    with pytest.raises(error, match=told):
        lp.load(base(), tmp_path / "peft")


@pytest.mark.parametrize(
    ("apply", "told"),
    [
        ([("fc", "loha", "", {}), ("head", "lora", "", {})], "PEFT's LOHA is for all"),
        ([("fc", "loha", "rows", {})], "DoRA's lengths"),
        ([("emb", "loha", "", {})], "a layer that PEFT's LOHA does not have"),
        ([("fc[0:4]", "loha", "", {})], "a part of a weight"),
        ([("fc", "loha", "", {"dropout": 0.1})], "with dropout"),
        ([("fc", "lokr", "left2x3", {}), ("head", "lokr", "left1x9", {})], "decompose_factor"),
    ],
)
def test_what_peft_has_no_form_for_is_refused_by_name(
    apply: list[tuple[str, str, str, dict[str, Any]]], told: str, tmp_path: Path
) -> None:
    net = base()
    patterns = [f"{n}:variant={v},form={f}" if f else f"{n}:variant={v}" for n, v, f, _ in apply]
    lp.apply(net, patterns, rank=1, **apply[0][3])
    with pytest.raises(NoFormError, match=told):
        lp.save(net, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
