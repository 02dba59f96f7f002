"""Baking into quantized checkpoints: against W + ΔW of what is read, and its library's bytes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_samples import FP8, folder
from safetensors.torch import load_file, save_file
from tiny_models import llama

import lora_param as lp
from lora_param.adapter import Adapter
from lora_param.checkpoint.create import create_adapter
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import OptionError, OutputError, QuantizationLossError
from lora_param.files.safetensors import tensor_bytes

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
Q, V = "l.0.q_proj.weight", "l.0.v_proj.weight"


def fp8_folder(path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"norm.weight": torch.ones(256).bfloat16()}
    for name in (Q, V):
        W = torch.randn(256, 200, generator=g) * 100
        tensors[name], tensors[f"{name}_scale_inv"] = W.to(FP8), torch.full((2, 2), 1e-3)
    tensors["l.0.v_proj.input_scale"] = torch.ones(())
    tensors["head.weight"] = torch.randn(8, 256, generator=g).bfloat16()
    return folder(path, tensors, BLOCKS)


def trained(base: Path, size: float, *targets: str, seed: int = 1) -> Adapter:
    _, adapter = create_adapter(base, targets or ["q_proj", "head"], rank=4)
    g = torch.Generator().manual_seed(seed)
    new = {k: torch.randn(t.shape, generator=g) * size for k, t in adapter.tensors.items()}
    return replace(adapter, tensors=new)


def merged(base: Path, adapter: Adapter, name: str, dtype: torch.dtype) -> torch.Tensor:
    """W + ΔW in fp32, rounded once."""
    with open_checkpoint(base) as checkpoint:
        W = checkpoint[name].float()
    if name in adapter.targets:
        f = adapter.factors(name)
        W = W + (f["lora_B"] @ f["lora_A"]) * adapter.targets[name].scale
    return W.to(dtype)


def as_data(adapter: Adapter) -> dict[str, Any]:
    return {"verify": True, "sync": False, "adapters": adapter}


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_dense_is_w_plus_delta_and_nothing_of_the_format_is_left(
    dtype: str | None, tmp_path: Path
) -> None:
    base, out = fp8_folder(tmp_path / "base"), tmp_path / "out"
    adapter = trained(base, 0.1)
    report = lp.bake_checkpoint(base, out=out, dtype=dtype, **as_data(adapter))
    found = load_file(out / "model.safetensors")
    assert set(found) == {Q, V, "norm.weight", "head.weight"}
    kind = getattr(torch, dtype or "bfloat16")
    for name, tensor in found.items():
        assert torch.equal(tensor, merged(base, adapter, name, kind)), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == (dtype or "bfloat16")
    assert report.quantized == "dense"
    assert report.changed
    with open_checkpoint(out) as checkpoint:
        assert not any(w.quantized or w.packed for w in checkpoint.weights.values())


def test_dense_shards_have_an_index_that_fits(tmp_path: Path) -> None:
    base, out = fp8_folder(tmp_path / "base"), tmp_path / "out"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    places = {n: "b" if n in (Q, "norm.weight", "head.weight") else "a" for n in tensors}
    places[f"{Q}_scale_inv"] = "c"  # a file of nothing but scales
    for file in "abc":
        part = {n: t for n, t in tensors.items() if places[n] == file}
        save_file(part, base / f"{file}.safetensors")
    index = {
        "metadata": {"total_size": 1},
        "weight_map": {n: f"{f}.safetensors" for n, f in places.items()},
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    adapter = trained(base, 0.1)
    lp.bake_checkpoint(base, out=out, **as_data(adapter))
    with open_checkpoint(out) as checkpoint:
        for name in (Q, V, "norm.weight", "head.weight"):
            assert torch.equal(checkpoint[name], merged(base, adapter, name, torch.bfloat16))
        size = sum(t.numel() * t.element_size() for t in checkpoint.values())
    written = json.loads((out / "model.safetensors.index.json").read_text())
    assert written["metadata"]["total_size"] == size
    assert set(written["weight_map"]) == {Q, V, "norm.weight", "head.weight"}
    assert not (out / "c.safetensors").exists()


def test_a_single_file_is_baked_dense(tmp_path: Path) -> None:
    base, out = fp8_folder(tmp_path / "base"), tmp_path / "out.safetensors"
    adapter = trained(base, 0.1)
    report = lp.bake_checkpoint(base / "model.safetensors", out=out, **as_data(adapter))
    assert torch.equal(load_file(out)[Q], merged(base, adapter, Q, torch.bfloat16))
    assert any("no longer quantized" in note for note in report.notes)


def test_same_quantizes_what_changes_and_nothing_else(tmp_path: Path) -> None:
    base, out = fp8_folder(tmp_path / "base"), tmp_path / "out"
    adapter = trained(base, 0.3)
    report = lp.bake_checkpoint(base, out=out, quantized="same", **as_data(adapter))
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    for name in set(before) - {Q, f"{Q}_scale_inv", "head.weight"}:
        assert tensor_bytes(before[name]) == tensor_bytes(after[name]), name
    assert (base / "config.json").read_text() == (out / "config.json").read_text()
    f, target = adapter.factors(Q), adapter.targets[Q]
    delta = (f["lora_B"] @ f["lora_A"]) * target.scale
    read = [
        t[Q].float()
        * t[f"{Q}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :200]
        for t in (before, after)
    ]
    loss = (read[1] - read[0] - delta).norm() / delta.norm()
    row = next(r for r in report.rows if r.target == Q)
    assert row.kept == pytest.approx(1 - float(loss), rel=1e-4)
    assert row.kept > 0.5
    assert report.quantized == "same"
    # no more than half a step of three bits from W + ΔW
    assert ((read[1] - read[0] - delta).abs() <= (read[0] + delta).abs() / 16 + 1e-5).all()


def test_an_update_of_which_quantizing_leaves_less_than_half_is_refused_without_force(
    tmp_path: Path,
) -> None:
    base, out = fp8_folder(tmp_path / "base"), tmp_path / "out"
    adapter = trained(base, 0.003)
    with pytest.raises(QuantizationLossError, match=r"less than half .* 1 of 1 .*q_proj"):
        lp.bake_checkpoint(base, out=out, quantized="same", **as_data(adapter))
    assert not out.exists()
    report = lp.bake_checkpoint(base, out=out, quantized="same", force=True, **as_data(adapter))
    assert next(r for r in report.rows if r.target == Q).kept < 0.5
    assert lp.bake_checkpoint(base, out=tmp_path / "dense", **as_data(adapter)).changed


@pytest.mark.parametrize("form", ["dense", "same"])
@pytest.mark.parametrize("kind", ["nf4", "nested nf4", "int8"])
def test_bitsandbytes_is_baked_to_what_the_library_makes_of_w_plus_delta(
    form: Any, kind: str, tmp_path: Path
) -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    W = torch.randn(64, 96).bfloat16()

    def stored(W: torch.Tensor) -> dict[str, torch.Tensor]:
        if kind == "int8":
            q, absmax, _ = bnb.int8_vectorwise_quant(W.half())
            return {Q: q, Q.replace("weight", "SCB"): absmax}
        q, state = bnb.quantize_4bit(W, quant_type="nf4", compress_statistics="nested" in kind)
        return {Q: q} | {f"{Q}.{k}": t for k, t in state.as_dict(packed=True).items()}

    base = folder(tmp_path / "base", stored(W), {"quant_method": "bitsandbytes"})
    out = tmp_path / "out"
    adapter = trained(base, 0.3, "q_proj")
    report = lp.bake_checkpoint(base, out=out, quantized=form, **as_data(adapter))
    found = load_file(out / "model.safetensors")
    if form == "dense":
        assert set(found) == {Q}
        assert torch.equal(found[Q], merged(base, adapter, Q, torch.bfloat16))
        return
    f = adapter.factors(Q)
    with open_checkpoint(base) as checkpoint:
        wide = checkpoint.numbers(Q)  # type: ignore[attr-defined]
    meant = stored(wide + (f["lora_B"] @ f["lora_A"]) * adapter.targets[Q].scale)
    if kind == "nf4":
        assert all(torch.equal(found[n], meant[n]) for n in meant if "quant_state" not in n)
    with open_checkpoint(out) as checkpoint:
        again = checkpoint[Q].float()
        assert checkpoint.weights[Q].quantized
    delta = (f["lora_B"] @ f["lora_A"]) * adapter.targets[Q].scale
    loss = float((again - wide - delta).norm() / delta.norm())
    assert report.rows[0].kept == pytest.approx(1 - loss, abs=0.02)
    assert report.rows[0].kept > 0.5


def test_a_format_that_is_only_read_is_written_dense_and_not_the_same(tmp_path: Path) -> None:
    tensors = {
        "l.q_proj.qweight": torch.randint(-(2**31), 2**31 - 1, (8, 16)).int(),
        "l.q_proj.qzeros": torch.randint(-(2**31), 2**31 - 1, (2, 2)).int(),
        "l.q_proj.scales": torch.rand(2, 16).half() / 50,
        "l.q_proj.bias": torch.ones(16).half(),
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    base, name = folder(tmp_path / "base", tensors, config, dtype="float16"), "l.q_proj.weight"
    (base / "quantize_config.json").write_text("{}")
    adapter = trained(base, 0.1, "q_proj")
    with pytest.raises(OptionError, match=r"GPTQ int4 in groups of 32.*dense"):
        lp.bake_checkpoint(base, out=tmp_path / "out", quantized="same", **as_data(adapter))
    lp.bake_checkpoint(base, out=tmp_path / "out", **as_data(adapter))
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {name, "l.q_proj.bias"}
    assert torch.equal(found[name], merged(base, adapter, name, torch.float16))
    assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_the_error_of_quantization_is_measured_against_the_original(tmp_path: Path) -> None:
    base = fp8_folder(tmp_path / "base")
    adapter = trained(base, 0.3)
    with open_checkpoint(base) as checkpoint:
        W = {n: checkpoint[n] for n in checkpoint}
    noise = torch.randn(256, 200)
    f, target = adapter.factors(Q), adapter.targets[Q]
    delta = (f["lora_B"] @ f["lora_A"]) * target.scale
    for size, said in ((3.0, "belongs on it"), (0.2, "usually the better base")):
        noise *= size * delta.norm() / noise.norm()
        original = folder(tmp_path / f"original{size}", W | {Q: W[Q].float() + noise})
        report = lp.bake_checkpoint(
            base, out=tmp_path / f"out{size}", original=original, **as_data(adapter)
        )
        rows = {r.target: r for r in report.rows}
        assert rows[Q].quantization_error == pytest.approx(size, rel=1e-3)
        assert rows["head.weight"].quantization_error is None
        assert any(said in note for note in report.notes)


def test_an_original_that_lacks_the_weight_is_refused(tmp_path: Path) -> None:
    base = fp8_folder(tmp_path / "base")
    original = folder(tmp_path / "original", {Q: torch.zeros(2, 2)})
    with pytest.raises(OptionError, match="original"):
        lp.bake_checkpoint(
            base, out=tmp_path / "o", original=original, **as_data(trained(base, 1.0))
        )


def test_what_is_not_read_is_not_made_dense(tmp_path: Path) -> None:
    base = fp8_folder(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["x.weight"], tensors["x.weight_scale_inv"] = tensors[V].clone(), torch.ones(7, 7)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(OutputError, match=r"x\.weight cannot be read"):
        lp.bake_checkpoint(base, out=tmp_path / "out", **as_data(trained(base, 0.3)))


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_files_of_torch_save_are_read_alone_whatever_the_output(name: str, tmp_path: Path) -> None:
    base, W = tmp_path / "base.pt", torch.randn(8, 6) * 100
    torch.save({Q: W.to(FP8), f"{Q}_scale": torch.tensor([1e-3])}, base)
    adapter = trained(base, 0.3, "q_proj")
    with pytest.raises(OutputError, match="can be read and not baked: save it with safetensors"):
        lp.bake_checkpoint(base, out=tmp_path / name, **as_data(adapter))
    assert {p.name for p in tmp_path.iterdir()} == {"base.pt"}


def test_a_base_that_is_not_quantized_has_no_form(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", {Q: torch.randn(4, 4)})
    adapter = trained(base, 1.0, "q_proj")
    for option in ({"quantized": "same"}, {"original": base}):
        with pytest.raises(OptionError, match="the base is not quantized"):
            lp.bake_checkpoint(base, out=tmp_path / "out", **option, **as_data(adapter))


@pytest.mark.parametrize("form", ["dense", "same"])
def test_in_place(form: Any, tmp_path: Path) -> None:
    base, out = fp8_folder(tmp_path / "base"), tmp_path / "out"
    adapter = trained(base, 0.3)
    lp.bake_checkpoint(base, out=out, quantized=form, **as_data(adapter))
    lp.bake_checkpoint(base, in_place=True, quantized=form, **as_data(adapter))
    for file in ("model.safetensors", "config.json"):
        assert (base / file).read_bytes() == (out / file).read_bytes()


def test_transformers_loads_what_was_baked_dense(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 2}
    model = llama(**sizes, num_hidden_layers=1, dtype="bfloat16").bfloat16()
    base = tmp_path / "base"
    model.save_pretrained(base)
    tensors, data = {}, json.loads((base / "config.json").read_text())
    for name, tensor in load_file(base / "model.safetensors").items():
        if "proj" in name:
            scale = tensor.float().abs().amax() / 448
            tensors[name] = (tensor.float() / scale).to(FP8)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
        else:
            tensors[name] = tensor
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(data | {"quantization_config": BLOCKS}))
    adapter = trained(base, 0.1, "q_proj", "v_proj", "down_proj")
    out = tmp_path / "out"
    lp.bake_checkpoint(base, out=out, **as_data(adapter))
    again = transformers.LlamaForCausalLM.from_pretrained(out, dtype="auto")
    assert again.dtype == torch.bfloat16
    with open_checkpoint(base) as checkpoint:
        for name in checkpoint:
            meant = merged(base, adapter, name, torch.bfloat16)
            assert torch.equal(again.get_parameter(name), meant), name
    assert again(torch.arange(8)[None]).logits.isfinite().all()
