"""llama.cpp's adapters, beside the `gguf` package and the formulas of llama.cpp's own converter.

`convert_lora_to_gguf.py` names tensors as `gguf.TensorNameMap` does and reorders the rows of q and
k as `LlamaModel.permute` does; `build_lora_mm` computes (alpha / b.ne[0]) · b (a x).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lora_param as lp
from lora_param.errors import BrokenFileError, MismatchError, NoFormError, UnsettledError

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, WIDTH, SIZE = 4, 2, 16, 4
PARTS = {
    "model.embed_tokens.weight": (20, WIDTH),
    "lm_head.weight": (20, WIDTH),
    **{
        f"model.layers.{i}.{leaf}.weight": shape
        for i in (0, 1)
        for leaf, shape in {
            "self_attn.q_proj": (HEADS * SIZE, WIDTH),
            "self_attn.k_proj": (KV_HEADS * SIZE, WIDTH),
            "self_attn.v_proj": (KV_HEADS * SIZE, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * SIZE),
            "mlp.gate_proj": (24, WIDTH),
            "mlp.up_proj": (24, WIDTH),
            "mlp.down_proj": (WIDTH, 24),
        }.items()
    },
}


def llamas_permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """The reordering of rows that llama.cpp's converter documents for q and k of a Llama."""
    shape = weights.shape
    return (
        weights.reshape(n_head, 2, shape[0] // n_head // 2, *shape[1:])
        .swapaxes(1, 2)
        .reshape(shape)
    )


def base(directory: Path, model_type: str = "llama") -> Path:
    directory.mkdir()
    torch.manual_seed(0)
    save_file({n: torch.randn(s) for n, s in PARTS.items()}, directory / "model.safetensors")
    config = {
        "model_type": model_type,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_size": WIDTH,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def factors(rank: int = 2) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each weight, ΔW = scale·(B @ A)."""
    torch.manual_seed(1)
    return {
        n: (torch.randn(rank, s[1]) * 0.3, torch.randn(s[0], rank) * 0.3) for n, s in PARTS.items()
    }


def theirs(path: Path, arch: str = "llama", alpha: float = 5.0, rank: int = 2) -> Path:
    """A file by the gguf package, as the converter writes it."""
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    mapped = gguf.get_tensor_name_map(kind, 2)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (A, B) in factors(rank).items():
        own = mapped.get_name(name, (".weight",))
        a, b = A.numpy(), B.numpy()
        if own == "token_embd.weight":
            # PEFT's embedding: lora_embedding_A (r, V), lora_embedding_B (D, r); A is transposed
            a, b = b, a.T
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            b = llamas_permute(b, HEADS if "q_proj" in name else KV_HEADS)
        writer.add_tensor(f"{own}.lora_a", np.ascontiguousarray(a))
        writer.add_tensor(f"{own}.lora_b", np.ascontiguousarray(b))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def checked(directory: Path, adapter: Path, scale: float, tmp_path: Path) -> None:
    lp.bake_checkpoint(directory, adapter, tmp_path / "out", force=True)
    before, after = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "out"))
    for name, (A, B) in factors().items():
        wanted = before[name] + scale * (B @ A)
        torch.testing.assert_close(after[name], wanted, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("model_type", "arch"), [("llama", "llama"), ("mistral", "llama"), ("qwen2", "qwen2")]
)
@pytest.mark.parametrize("alpha", [5.0, 0.0])
def test_on_transformers_names_it_is_what_llama_cpp_computes(
    model_type: str, arch: str, alpha: float, tmp_path: Path
) -> None:
    path = theirs(tmp_path / "a.gguf", arch, alpha)
    checked(base(tmp_path / "base", model_type), path, alpha / 2 or 1.0, tmp_path)


def test_on_a_gguf_base_names_and_rows_are_its_own(tmp_path: Path) -> None:
    path = theirs(tmp_path / "a.gguf")
    reader = gguf.GGUFReader(path)
    torch.manual_seed(3)
    weights = {
        "blk.0.attn_q.weight": torch.randn(HEADS * SIZE, WIDTH),
        **{
            t.name.removesuffix(".lora_b"): None
            for t in reader.tensors
            if t.name.endswith(".lora_b")
        },
    }
    found = {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    deltas: dict[str, Tensor] = {}
    for name in weights:
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        delta = a @ b.T if name == "token_embd.weight" else b @ a
        deltas[name] = 2.5 * delta
        weights[name] = torch.randn(delta.shape)
        writer.add_tensor(name, weights[name].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lp.bake_checkpoint(tmp_path / "base.gguf", path, tmp_path / "out.gguf")
    out = {
        t.name: torch.from_numpy(np.array(t.data))
        for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors
    }
    for name, delta in deltas.items():
        torch.testing.assert_close(out[name], weights[name] + delta, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize(("model_type", "arch"), [("llama", "llama"), ("qwen2", "qwen2")])
def test_written_it_is_the_converters_tensors_under_its_names(
    model_type: str, arch: str, tmp_path: Path
) -> None:
    directory = base(tmp_path / "base", model_type)
    theirs(tmp_path / "theirs.gguf", arch)
    lp.convert(tmp_path / "theirs.gguf", "native", tmp_path / "n.safetensors", base=directory)
    lp.convert(tmp_path / "n.safetensors", "gguf", tmp_path / "ours.gguf", base=directory)
    one, other = (gguf.GGUFReader(tmp_path / f"{n}.gguf") for n in ("theirs", "ours"))
    assert str(other.get_field("general.type").contents()) == "adapter"
    assert str(other.get_field("general.architecture").contents()) == arch
    assert str(other.get_field("adapter.type").contents()) == "lora"
    assert other.get_field("adapter.lora.alpha").contents() == 5.0
    wanted = {t.name: np.array(t.data) for t in one.tensors}
    found = {t.name: np.array(t.data) for t in other.tensors}
    assert set(wanted) == set(found)
    for name, array in wanted.items():
        assert np.array_equal(found[name], array), name
    lp.convert(tmp_path / "ours.gguf", "gguf", tmp_path / "third.gguf", base=directory)
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "third.gguf").read_bytes()


def test_alphas_that_differ_go_into_B(tmp_path: Path) -> None:
    directory = base(tmp_path / "base")
    lp.apply_checkpoint(
        directory, ["q_proj:rank=2,alpha=3", "v_proj:rank=4,alpha=7"], tmp_path / "a.safetensors"
    )
    record = lp.read_adapter(tmp_path / "a.safetensors")
    record.tensors = {n: torch.randn(t.shape) * 0.3 for n, t in record.tensors.items()}
    lp.write_adapter(record, tmp_path / "a.safetensors")
    lp.convert(tmp_path / "a.safetensors", "gguf", tmp_path / "a.gguf", base=directory)
    for end in ("safetensors", "gguf"):
        lp.bake_checkpoint(directory, tmp_path / f"a.{end}", tmp_path / f"out-{end}")
    one, other = (
        load_file(tmp_path / f"out-{e}" / "model.safetensors") for e in ("safetensors", "gguf")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-6, msg=name)


def rewritten(path: Path, change: Any) -> Path:
    """The file with other tensors, by the gguf package."""
    reader = gguf.GGUFReader(path)
    tensors = change({t.name: np.array(t.data) for t in reader.tensors})
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 5.0)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    directory, path = base(tmp_path / "base"), theirs(tmp_path / "a.gguf")
    moved = rewritten(
        path, lambda ts: {n.replace("blk.1.ffn_up", "blk.7.ffn_up"): t for n, t in ts.items()}
    )
    with pytest.raises(MismatchError, match=r"blk\.7\.ffn_up\.weight"):
        lp.stats(directory, moved)
    half = rewritten(path, lambda ts: {n: t for n, t in ts.items() if n != "output.weight.lora_b"})
    with pytest.raises(BrokenFileError, match=r"no output\.weight\.lora_b"):
        lp.read_adapter(half)
    other = rewritten(path, lambda ts: ts | {"lora_unet_x.alpha": np.ones((1, 1), np.float32)})
    with pytest.raises(BrokenFileError, match=r"lora_unet_x\.alpha"):
        lp.read_adapter(other)
    norm = rewritten(path, lambda ts: ts | {"blk.0.attn_norm.weight": np.ones(16, np.float32)})
    with pytest.raises(NoFormError, match=r"attn_norm\.weight"):
        lp.read_adapter(norm)


def test_heads_and_architectures_are_not_guessed(tmp_path: Path) -> None:
    directory, path = base(tmp_path / "base"), theirs(tmp_path / "a.gguf")
    file = directory / "model.safetensors"
    with pytest.raises(UnsettledError, match="how many attention heads"):
        lp.stats(file, path)
    lp.apply_checkpoint(file, ["v_proj"], tmp_path / "v.safetensors", rank=2)
    with pytest.raises(UnsettledError, match=r"what kind of model .*config\.json"):
        lp.convert(tmp_path / "v.safetensors", "gguf", tmp_path / "v.gguf", base=file)
    config = directory / "config.json"
    config.write_text(config.read_text().replace("llama", "a_new_one"))
    with pytest.raises(NoFormError, match="model_type a_new_one"):
        lp.convert(tmp_path / "v.safetensors", "gguf", tmp_path / "v.gguf", base=directory)
    assert not (tmp_path / "v.gguf").exists()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_on_a_live_model_outputs_are_those_of_the_baked_file(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    classes = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    make, cls = classes[kind]
    config = make(
        vocab_size=20,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=False,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = cls(config).eval()
    model.save_pretrained(tmp_path / "base")
    path = theirs(tmp_path / "a.gguf", kind)
    lp.bake_checkpoint(tmp_path / "base", path, tmp_path / "out")
    merged = cls.from_pretrained(tmp_path / "out").eval()
    lp.load(model, path)
    x = torch.arange(12)[None]
    with torch.no_grad():
        wanted = merged(x).logits
        torch.testing.assert_close(model(x).logits, wanted, rtol=0, atol=2e-5)
    for name, (A, B) in factors().items():
        delta = merged.get_parameter(name).detach() - lp.base_state_dict(model)[name]
        torch.testing.assert_close(delta, 2.5 * (B @ A), rtol=0, atol=2e-6, msg=name)
    lp.save(model, tmp_path / "again.gguf", format="gguf")  # with the config of the live model
    one, other = (gguf.GGUFReader(tmp_path / n) for n in ("a.gguf", "again.gguf"))
    found = {t.name: np.array(t.data) for t in other.tensors}
    for t in one.tensors:
        assert np.array_equal(found[t.name], np.array(t.data)), t.name


def test_of_a_tied_pair_the_embedding_alone_is_adapted(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=20,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    path = rewritten(
        theirs(tmp_path / "a.gguf"), lambda ts: {n: t for n, t in ts.items() if "token" in n}
    )
    model = transformers.LlamaForCausalLM(config)
    head = model.lm_head.weight.detach().clone()
    lp.load(model, path)
    A, B = factors()["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight.detach(), head)
    found = model.model.embed_tokens.weight.detach() - head
    torch.testing.assert_close(found, 2.5 * (B @ A), rtol=0, atol=2e-6)
