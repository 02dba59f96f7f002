"""Other tools' adapters beside what the tools themselves merged (see `write_tool_fixtures.py`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_param as lp
from lora_param.errors import BrokenFileError, MismatchError, OptionError, UnsettledError

TOOLS = Path(__file__).parent / "tools"
ALPHA = {"loralib": 3.0, "loralib-convs": 3.0, "torchtune": 5.0, "torchtune-dora": 5.0}
FILES = {
    "loralib": "lora.pt",
    "loralib-convs": "lora.pt",
    "torchtune": "adapter_model.pt",
    "torchtune-dora": "adapter_model.pt",
    "mlx": "",
    "mlx-dora": "",
    "mlx-experts": "",
    "diffusers": "pytorch_lora_weights.safetensors",
    "diffusers-dora": "pytorch_lora_weights.safetensors",
    "diffusers-rslora": "pytorch_lora_weights.safetensors",
    "diffusers-first": "pytorch_lora_weights.safetensors",
}
ENABLED = {"loralib": (True, False, True)}


def copied(name: str, tmp_path: Path) -> Path:
    """The adapter, without what the fixture has beside it."""
    source, target = TOOLS / name, tmp_path / name
    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(("base", "merged")):
            shutil.copy(file, target / file.name)
    return target / FILES[name] if FILES[name] else target


def read(name: str, path: Path) -> lp.Adapter:
    return lp.read_adapter(path, alpha=ALPHA.get(name), enable_lora=ENABLED.get(name))


def prefixed(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    part = "unet." if name.startswith("diffusers") else ""
    return {f"{part}{n}": t for n, t in tensors.items()}


def base_of(name: str, tmp_path: Path) -> Path:
    path = tmp_path / f"base-{name}.safetensors"
    save_file(prefixed(name, load_file(TOOLS / name / "base.safetensors")), path)
    return path


def tensors_of(path: Path) -> dict[str, Tensor]:
    if path.is_dir():
        path = path / "adapters.safetensors"
    if path.suffix == ".safetensors":
        return load_file(path)
    found: dict[str, Tensor] = torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("name", FILES)
def test_baked_it_is_what_the_tool_merged(name: str, tmp_path: Path) -> None:
    path, base = copied(name, tmp_path), base_of(name, tmp_path)
    lp.bake_checkpoint(base, read(name, path), tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    wanted = prefixed(name, load_file(TOOLS / name / "merged.safetensors"))
    before = load_file(base)
    assert set(out) == set(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(out[key], tensor, rtol=0, atol=1e-6, msg=key)
    changed = {n for n, t in wanted.items() if not torch.equal(t, before[n])}
    assert changed
    assert {n for n, t in out.items() if not torch.equal(t, before[n])} == changed


@pytest.mark.parametrize("name", [n for n in FILES if n != "loralib-convs"])
def test_written_again_it_is_the_same_tensors_and_then_the_same_bytes(
    name: str, tmp_path: Path
) -> None:
    path, base = copied(name, tmp_path), base_of(name, tmp_path)
    kind = name.partition("-")[0]
    end = path.suffix if path.is_file() else ""
    again, third = tmp_path / f"again{end}", tmp_path / f"third{end}"
    lp.convert(read(name, path), kind, again, base=base)
    if name != "diffusers-first":
        before, after = tensors_of(path), tensors_of(again)
        assert set(before) == set(after)
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), key
    lp.convert(read(name, again), kind, third, base=base)
    files = sorted(p.relative_to(again) for p in again.rglob("*")) if again.is_dir() else [None]
    for file in files:
        one, other = (p if file is None else p / file for p in (again, third))
        assert one.read_bytes() == other.read_bytes()
    lp.bake_checkpoint(base, read(name, third), tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    wanted = prefixed(name, load_file(TOOLS / name / "merged.safetensors"))
    for key, tensor in wanted.items():
        torch.testing.assert_close(out[key], tensor, rtol=0, atol=1e-6, msg=key)


def renamed(path: Path) -> tuple[Path, str]:
    """The adapter with one key that no weight has."""
    tensors = tensors_of(path)
    halves = [k for k in tensors if "lora" in k]
    stem = min(halves).rpartition(".lora")[0] or min(halves).partition("_lora")[0]
    own = [k for k in tensors if k.startswith((f"{stem}.", f"{stem}_lora"))]
    changed = {k.replace(stem, f"{stem}x") if k in own else k: t for k, t in tensors.items()}
    file = path / "adapters.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors":
        from lora_param.files.header import read_header

        metadata = dict(read_header(file).metadata)
        metadata.pop("lora_adapter_metadata", None)
        save_file(changed, file, metadata)
    else:
        torch.save(changed, file)
    return path, f"{stem}x".replace(".processor.", ".")


@pytest.mark.parametrize("name", [n for n in FILES if "-" not in n])
def test_one_renamed_key_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    path, key = renamed(copied(name, tmp_path))
    base = base_of(name, tmp_path)
    with pytest.raises(MismatchError, match=key):
        lp.stats(base, read(name, path))


@pytest.mark.parametrize("name", [n for n in FILES if "-" not in n])
@pytest.mark.parametrize("other", ["base_model.model.q.lora_A.weight", "lora_unet_q.alpha"])
def test_keys_of_two_conventions_are_refused(name: str, other: str, tmp_path: Path) -> None:
    path = copied(name, tmp_path)
    tensors = {**tensors_of(path), other: torch.ones(1, 6)}
    file = path / "adapters.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    with pytest.raises(BrokenFileError, match=other):
        read(name, path)


@pytest.mark.parametrize("name", [n for n in FILES if "-" not in n])
def test_a_half_alone_is_refused(name: str, tmp_path: Path) -> None:
    path = copied(name, tmp_path)
    tensors = tensors_of(path)
    gone = next(k for k in tensors if "lora_B" in k or "lora_b" in k or "lora.up" in k)
    tensors.pop(gone)
    file = path / "adapters.safetensors" if path.is_dir() else path
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    with pytest.raises(BrokenFileError, match="belong together"):
        read(name, path)


@pytest.mark.parametrize("name", ["loralib", "torchtune"])
def test_alpha_that_is_not_stored_is_asked_for(name: str, tmp_path: Path) -> None:
    path = copied(name, tmp_path)
    with pytest.raises(UnsettledError, match=r"alpha .* give it \(alpha=\)"):
        lp.read_adapter(path)
    with pytest.raises(UnsettledError, match="alpha"):
        lp.stats(path)


def test_alpha_that_is_stored_is_not_to_be_given(tmp_path: Path) -> None:
    path = copied("mlx", tmp_path)
    with pytest.raises(OptionError, match=r"mlx has no use"):
        lp.read_adapter(path, alpha=2)


# --- loralib ------------------------------------------------------------------------------------


def test_which_blocks_a_merged_linear_has_is_asked_for(tmp_path: Path) -> None:
    path, base = copied("loralib", tmp_path), base_of("loralib", tmp_path)
    record = lp.read_adapter(path, alpha=3)
    with pytest.raises(UnsettledError, match=r"which 2 of 3 blocks .*enable_lora="):
        lp.stats(base, record)
    with pytest.raises(BrokenFileError, match=r"enable_lora=\[True, True, True\]"):
        lp.stats(base, lp.read_adapter(path, alpha=3, enable_lora=(True, True, True)))


def test_blocks_are_slices_of_rows_or_columns(tmp_path: Path) -> None:
    path, base = copied("loralib", tmp_path), base_of("loralib", tmp_path)
    rows = {r.target for r in lp.stats(base, read("loralib", path)).rows}
    wanted = {"qkv.weight[0:6]", "qkv.weight[12:18]", "c_attn.weight[:,0:6]"}
    assert wanted | {"c_attn.weight[:,12:18]", "fc.weight", "emb.weight", "fc.bias"} <= rows


def test_what_the_file_leaves_open_is_said_when_it_is_written(tmp_path: Path) -> None:
    path, base = copied("loralib", tmp_path), base_of("loralib", tmp_path)
    record = lp.convert(read("loralib", path), "loralib", tmp_path / "b.pt", base=base)
    assert "alpha 3" in record.notes[-1]
    assert "enable_lora is 1,0,1" in record.notes[-1]


def test_a_square_weight_needs_the_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    A, B, W = torch.randn(2, 6), torch.randn(6, 2), torch.randn(6, 6)
    torch.save({"fc.lora_A": A, "fc.lora_B": B}, tmp_path / "a.pt")
    save_file({"fc.weight": W}, tmp_path / "base.safetensors")
    with pytest.raises(UnsettledError, match="layout='out-in'"):
        lp.stats(tmp_path / "base.safetensors", tmp_path / "a.pt", alpha=4)
    for layout, delta in {"out-in": B @ A, "in-out": (B @ A).T}.items():
        out = tmp_path / f"{layout}.safetensors"
        lp.bake_checkpoint(
            tmp_path / "base.safetensors", tmp_path / "a.pt", out, alpha=4, layout=layout
        )
        torch.testing.assert_close(load_file(out)["fc.weight"], W + 2 * delta, rtol=0, atol=1e-6)


# --- torchtune ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchtune", "torchtune-dora"])
def test_on_transformers_names_rows_of_q_and_k_are_in_its_order(name: str, tmp_path: Path) -> None:
    path = copied(name, tmp_path)
    lp.bake_checkpoint(TOOLS / name / "hf", path, tmp_path / "out", alpha=5)
    out = load_file(tmp_path / "out" / "model.safetensors")
    wanted = load_file(TOOLS / name / "merged_hf.safetensors")
    assert set(out) == set(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(out[key], tensor, rtol=0, atol=1e-6, msg=key)
    # and the other way round
    lp.convert(path, "native", tmp_path / "n.safetensors", base=TOOLS / name / "hf", alpha=5)
    back = tmp_path / "back.pt"
    lp.convert(tmp_path / "n.safetensors", "torchtune", back, base=TOOLS / name / "hf")
    before, after = tensors_of(path), tensors_of(back)
    assert set(before) == set(after)
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=1e-7, msg=key)


def test_without_a_config_the_order_of_rows_is_not_guessed(tmp_path: Path) -> None:
    path = copied("torchtune", tmp_path)
    base = TOOLS / "torchtune" / "hf" / "model.safetensors"
    with pytest.raises(UnsettledError, match=r"rows of q and k.*config\.json"):
        lp.stats(base, path, alpha=5)


def test_torchtunes_config_beside_the_file_tells_alpha(tmp_path: Path) -> None:
    path = copied("torchtune", tmp_path)
    config: dict[str, Any] = {"r": 2, "lora_alpha": 5, "target_modules": ["q_proj"]}
    beside = path.parent / "adapter_config.json"
    beside.write_text(json.dumps(config))
    scales = {t.scale for t in lp.read_adapter(path).targets.values()}
    assert scales == {2.5}
    with pytest.raises(OptionError, match="alpha"):
        lp.read_adapter(path, alpha=7)
    beside.write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(BrokenFileError, match="r is 4"):
        lp.read_adapter(path)


# --- mlx ----------------------------------------------------------------------------------------


def test_mlx_ranks_and_scales_that_differ_become_one(tmp_path: Path) -> None:
    base = base_of("mlx", tmp_path)
    name = "model.layers.{}.self_attn.{}_proj.weight"
    lp.apply_checkpoint(
        base,
        [f"{name.format(0, 'q')}:rank=2,alpha=6", f"{name.format(1, 'v')}:rank=3,alpha=2"],
        tmp_path / "a.safetensors",
    )
    record = lp.read_adapter(tmp_path / "a.safetensors")
    torch.manual_seed(0)
    record.tensors = {n: torch.randn(t.shape) * 0.3 for n, t in record.tensors.items()}
    lp.write_adapter(record, tmp_path / "a.safetensors")
    lp.convert(tmp_path / "a.safetensors", "mlx", tmp_path / "mlx", base=base)
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 3
    for adapter in ("a.safetensors", "mlx"):
        lp.bake_checkpoint(base, tmp_path / adapter, tmp_path / f"baked-{adapter}", force=True)
    one, other = (load_file(tmp_path / f"baked-{a}") for a in ("a.safetensors", "mlx"))
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-6)


def test_mlx_stacks_fit_a_file_of_single_experts(tmp_path: Path) -> None:
    path = copied("mlx-experts", tmp_path)
    split: dict[str, dict[str, Tensor]] = {}
    for which in ("base", "merged"):
        tensors = load_file(TOOLS / "mlx-experts" / f"{which}.safetensors")
        split[which] = {}
        for key, tensor in tensors.items():
            if ".switch_mlp." in key:
                for e, matrix in enumerate(tensor):
                    split[which][key.replace("switch_mlp", f"experts.{e}")] = matrix.contiguous()
            else:
                split[which][key] = tensor
    save_file(split["base"], tmp_path / "base.safetensors")
    lp.bake_checkpoint(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    for key, tensor in split["merged"].items():
        torch.testing.assert_close(out[key], tensor, rtol=0, atol=1e-6, msg=key)
