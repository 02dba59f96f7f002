"""LyCORIS' files, as LyCORIS 4.1.3 wrote them, beside the weights that it computes with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lycoris_cases import CASES, model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_param as lp
from lora_param.errors import BrokenFileError, MismatchError, NoFormError

FIXTURE = load_file(Path(__file__).parent / "lycoris-4.1.3.safetensors")
STATE = {k.removeprefix("state."): t for k, t in FIXTURE.items() if k.startswith("state.")}
METADATA = {"ss_network_module": "lycoris.kohya", "mine": "kept"}


def file_of(tmp_path: Path, chosen: str = "") -> Path:
    path = tmp_path / "lycoris.safetensors"
    save_file({k: t for k, t in STATE.items() if chosen in k}, path, METADATA)
    return path


def check(state: dict[str, Tensor]) -> None:
    """The state dict holds the weights, and biases, that LyCORIS has."""
    base = model().state_dict()
    for case in CASES:
        wanted = FIXTURE[f"weight.{case}"]
        torch.testing.assert_close(state[f"{case}.weight"], wanted, rtol=2e-6, atol=2e-6)
        assert not torch.equal(wanted, base[f"{case}.weight"])
        bias = FIXTURE.get(f"bias.{case}", base[f"{case}.bias"])
        torch.testing.assert_close(state[f"{case}.bias"], bias, rtol=2e-6, atol=2e-6)


def test_every_method_is_read_as_lycoris_computes_it(tmp_path: Path) -> None:
    loaded = lp.load(model(), file_of(tmp_path))
    check(lp.merged_state_dict(loaded))
    kinds = {t.settings.variant for t in lp.get_adapter(loaded).targets.values()}
    assert kinds == {"lora", "dora_columns", "tucker", "loha", "lokr", "diff", "oft", "boft"}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_toggles(case: str, tmp_path: Path) -> None:
    path = file_of(tmp_path, f"lycoris_{case}.")
    loaded, plain, merged = lp.load(model(), path)[case], model()[case], model()[case]
    state = {"weight": FIXTURE[f"weight.{case}"]}
    if f"bias.{case}" in FIXTURE:
        state["bias"] = FIXTURE[f"bias.{case}"]
    merged.load_state_dict(state, strict=False)
    shapes = {
        "linear": (3, 12),
        "even": (3, 5),
        "conv": (2, 6, 5, 5),
        "point": (2, 6, 5, 5),
        "line": (2, 6, 5),
        "norm": (3, 7),
        "group": (2, 6, 4),
    }
    x = torch.randn(shapes[CASES[case][1]])
    torch.testing.assert_close(loaded(x), merged(x), rtol=2e-5, atol=2e-5)
    lp.disable(loaded)
    assert torch.equal(loaded(x), plain(x))
    lp.enable(loaded)
    loaded(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lp.parameters(loaded))


def test_baked_into_a_file(tmp_path: Path) -> None:
    save_file(model().state_dict(), tmp_path / "base.safetensors")
    lp.bake_checkpoint(
        tmp_path / "base.safetensors", file_of(tmp_path), tmp_path / "out.safetensors"
    )
    baked = load_file(tmp_path / "out.safetensors")
    check(baked)
    live = lp.bake(lp.load(model(), file_of(tmp_path))).state_dict()
    assert all(torch.equal(live[k], t) for k, t in baked.items())


@pytest.mark.parametrize("through_native", [False, True])
def test_written_again_every_byte_of_its_tensors_is_the_same(
    through_native: bool, tmp_path: Path
) -> None:
    path, out = file_of(tmp_path), tmp_path / "again.safetensors"
    source = path
    if through_native:
        source = tmp_path / "native.safetensors"
        lp.convert(path, "native", source, base=model())
        check(lp.merged_state_dict(lp.load(model(), source)))
    lp.convert(source, "lycoris", out, base=model())
    again = load_file(out)
    renamed = {k.replace("lora_unet_", "lycoris_"): t for k, t in again.items()}
    assert set(renamed) == set(STATE)
    for key, tensor in STATE.items():
        if through_native and key.endswith("alpha"):  # of two whole matrices it says nothing
            continue
        assert torch.equal(renamed[key], tensor), key
        assert renamed[key].dtype == tensor.dtype
    if not through_native:
        with safe_open(out, "pt") as file:
            assert file.metadata() == METADATA
    lp.convert(out, "lycoris", tmp_path / "third.safetensors", base=model())
    assert (tmp_path / "third.safetensors").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("case", ["locon_linear", "loha_conv", "lokr_linear", "oft_linear"])
def test_a_bias_beside_any_kind_is_a_target_of_its_own(case: str, tmp_path: Path) -> None:
    diff = torch.randn(model()[case].bias.shape)
    state = {k: t for k, t in STATE.items() if k.startswith(f"lycoris_{case}.")}
    save_file(state | {f"lycoris_{case}.diff_b": diff}, tmp_path / "a.safetensors")
    loaded = lp.load(model(), tmp_path / "a.safetensors")
    found = lp.merged_state_dict(loaded)
    torch.testing.assert_close(found[f"{case}.weight"], FIXTURE[f"weight.{case}"])
    assert torch.equal(found[f"{case}.bias"], model()[case].bias.detach() + diff)
    lp.convert(tmp_path / "a.safetensors", "lycoris", tmp_path / "b.safetensors", base=model())
    again = load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(again[k], t) for k, t in state.items())
    assert torch.equal(again[f"lycoris_{case}.diff_b"], diff)


def test_half_precision_files_keep_their_dtypes(tmp_path: Path) -> None:
    half = {k: t.half() for k, t in STATE.items()}
    save_file(half, tmp_path / "half.safetensors", METADATA)
    lp.convert(tmp_path / "half.safetensors", "lycoris", tmp_path / "out.safetensors", base=model())
    again = load_file(tmp_path / "out.safetensors")
    assert set(again) == set(half)
    assert all(torch.equal(again[k], t) and again[k].dtype == t.dtype for k, t in half.items())


def test_without_its_base_it_is_listed(tmp_path: Path) -> None:
    stats = lp.stats(file_of(tmp_path))
    assert {row.variant for row in stats.rows} >= {"loha", "lokr", "oft", "boft", "diff", "tucker"}
    with_base = lp.stats(lp.load(model(), file_of(tmp_path)))
    base = model().state_dict()
    for row in with_base.rows:
        case, leaf = row.target.rpartition(".")[::2]
        wanted = FIXTURE[f"{leaf}.{case}"] - base[row.target]
        assert row.update_norm == pytest.approx(wanted.norm().item(), rel=1e-4)
        assert not row.dead


def test_a_strength_is_written_as_alpha(tmp_path: Path) -> None:
    loaded = lp.load(model(), file_of(tmp_path, "loha_linear"))
    lp.set_scale(loaded, 0.5)
    wanted = lp.merged_state_dict(loaded)["loha_linear.weight"]
    lp.save(loaded, tmp_path / "half.safetensors", format="lycoris")
    again = lp.load(model(), tmp_path / "half.safetensors")
    torch.testing.assert_close(lp.merged_state_dict(again)["loha_linear.weight"], wanted)
    assert load_file(tmp_path / "half.safetensors")["lora_unet_loha_linear.alpha"].item() == 1.5


def test_a_strength_of_a_low_precision_difference_loses_nothing(tmp_path: Path) -> None:
    diff = torch.randn(18, 12).bfloat16()
    save_file({"lycoris_full_linear.diff": diff}, tmp_path / "a.safetensors")
    loaded = lp.load(model(), tmp_path / "a.safetensors")
    lp.set_scale(loaded, 0.7)
    lp.save(loaded, tmp_path / "b.safetensors", format="lycoris")
    (found,) = load_file(tmp_path / "b.safetensors").values()
    torch.testing.assert_close(found, diff.float() * 0.7)


@pytest.mark.parametrize("to", ["kohya", "portable"])
@pytest.mark.parametrize("case", ["loha_linear", "lokr_linear", "lokrboth_linear"])
def test_a_lora_of_it_says_what_it_loses(to: str, case: str, tmp_path: Path) -> None:
    path, out = file_of(tmp_path, f"lycoris_{case}."), tmp_path / f"{to}.safetensors"
    with pytest.raises(NoFormError, match=rf"{case}.weight.* of variant lo.*lossy=True"):
        lp.convert(path, to, out, base=model())
    assert not out.exists()
    lost: list[lp.Compressed] = []
    lp.convert(path, to, out, base=model(), lossy=True, rank=2, report=lost.append)
    (row,) = lost
    base = model().state_dict()[f"{case}.weight"]
    update = FIXTURE[f"weight.{case}"] - base
    found = lp.merged_state_dict(lp.load(model(), out))[f"{case}.weight"] - base
    error = ((found - update).norm() / update.norm()).item()
    assert row.error == pytest.approx(error, abs=1e-5)
    S = torch.linalg.svdvals(update)
    assert error == pytest.approx((S[2:].norm() / S.norm()).item(), abs=1e-5)


def test_a_lora_of_it_needs_no_base_where_it_does_not_depend_on_it(tmp_path: Path) -> None:
    lp.convert(
        file_of(tmp_path, "loha_linear"), "native", tmp_path / "n.st.safetensors", base=model()
    )
    lost: list[lp.Compressed] = []
    lp.convert(
        tmp_path / "n.st.safetensors",
        "native",
        tmp_path / "low.safetensors",
        lossy=True,
        rank=4,
        report=lost.append,
    )
    assert lost[0].error < 1e-5  # rank 2·2
    wanted = FIXTURE["weight.loha_linear"]
    found = lp.merged_state_dict(lp.load(model(), tmp_path / "low.safetensors"))
    torch.testing.assert_close(found["loha_linear.weight"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"loha_linear.on_input": torch.ones(())}, NoFormError, r"on_input.*IA3"),
        ({"loha_linear.a1.weight": torch.ones(2, 2)}, NoFormError, r"a1\.weight.*GLoRA"),
        ({"loha_linear.lambda_layer": torch.ones(1, 2)}, NoFormError, "T-LoRA"),
        ({"loha_linear.bias_indices": torch.ones(2)}, NoFormError, "sparse bias"),
        ({"loha_linear.hada_w9": torch.ones(2)}, NoFormError, "hada_w9"),
        ({"loha_linear.lokr_w1": torch.ones(2, 2)}, BrokenFileError, "do not fit.*lokr_w1"),
        ({"loha_linear.hada_w2_a": torch.ones(18, 3)}, BrokenFileError, r"hada_w2_a \(18, 3\)"),
        ({"loha_linear.hada_w2_a": None}, BrokenFileError, "loha_linear do not fit"),
        ({"loha_linear.alpha": torch.tensor(float("nan"))}, BrokenFileError, "no finite number"),
        ({"lokr_linear.lokr_w1": None}, BrokenFileError, "lokr_linear do not fit"),
        ({"locon_linear.hada_w1_a": torch.ones(18, 2)}, BrokenFileError, "fit.*hada_w1_a"),
        ({"locon_linear.diff": torch.ones(18, 12)}, BrokenFileError, r"diff \(18, 12\)"),
        ({"locon_linear.b_norm": torch.ones(18)}, BrokenFileError, "b_norm"),
        (
            {"locon_linear.diff": torch.ones(18, 12), "locon_linear.lora_down.weight": None},
            BrokenFileError,
            "diff",
        ),
        ({"locon_linear.diff_b": torch.ones(4)}, MismatchError, r"locon_linear\.bias is \(18,\)"),
        (
            {"full_linear.w_norm": torch.ones(18, 12), "full_linear.diff_b": None},
            BrokenFileError,
            "w_norm",
        ),
        ({"full_linear.dora_scale": torch.ones(18, 1)}, BrokenFileError, "dora_scale"),
        ({"oft_linear.oft_blocks": torch.ones(6, 3, 2)}, BrokenFileError, "oft_blocks"),
        ({"oft_linear.oft_blocks": torch.ones(5, 3, 3)}, MismatchError, r"\(15,\)"),
        ({"full_linear.diff_b": torch.ones(4)}, MismatchError, r"full_linear\.bias is \(18,\)"),
        ({"loharows_linear.dora_scale": torch.ones(5, 1)}, NoFormError, "dora_scale"),
        (
            {"nowhere.lokr_w1": torch.ones(2, 2), "nowhere.lokr_w2": torch.ones(2, 2)},
            MismatchError,
            "lycoris_nowhere",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, Tensor | None], error: type[Exception], told: str, tmp_path: Path
) -> None:
    changed = STATE | {f"lycoris_{k}": t for k, t in change.items()}
    path = tmp_path / "bad.safetensors"
    save_file({k: t for k, t in changed.items() if t is not None}, path)
    with pytest.raises(error, match=told):
        lp.load(model(), path)


def test_parts_and_other_layers_have_no_form_there(tmp_path: Path) -> None:
    net = nn.ModuleDict({"fc": nn.Linear(6, 8), "emb": nn.Embedding(9, 6)})
    lp.apply(net, ["fc[0:4]"], rank=2, variant="loha")
    with pytest.raises(NoFormError, match=r"fc\.weight\[0:4\].*a part"):
        lp.save(net, tmp_path / "a.safetensors", format="lycoris")
    lp.remove(net)
    lp.apply(net, ["emb"], rank=2, variant="lokr")
    with pytest.raises(NoFormError, match=r"emb\.weight"):
        lp.save(net, tmp_path / "a.safetensors", format="lycoris")


def test_a_first_matrix_over_parts_of_a_kernel_is_refused(tmp_path: Path) -> None:
    net = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3)})
    lp.apply(net, ["conv"], rank=1, variant="lokr", form="left2x9")
    with pytest.raises(NoFormError, match=r"9 columns, does not divide 4 inputs"):
        lp.save(net, tmp_path / "a.safetensors", format="lycoris")


@pytest.mark.parametrize("variant", ["loha", "lokr"])
def test_what_was_trained_here_is_written_for_lycoris(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"fc": nn.Linear(6, 8), "conv": nn.Conv2d(15, 6, 3)})
    lp.apply(net, ["fc", "conv"], rank=2, variant=variant)
    with torch.no_grad():
        for p in lp.parameters(net):
            p.normal_()
    wanted = lp.merged_state_dict(net)
    lp.save(net, tmp_path / "a.safetensors", format="lycoris")
    torch.manual_seed(0)
    again = nn.ModuleDict({"fc": nn.Linear(6, 8), "conv": nn.Conv2d(15, 6, 3)})
    found = lp.merged_state_dict(lp.load(again, tmp_path / "a.safetensors"))
    assert all(torch.equal(found[k], t) for k, t in wanted.items())


def test_the_record_says_how_large_it_is(tmp_path: Path) -> None:
    path = file_of(tmp_path, "loha_linear")
    assert json.loads(json.dumps(lp.stats(path).to_dict()))["trainable"] == 2 * 2 * (18 + 12)
