"""GGUF as a base, against llama.cpp's own Python package."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lora_param as lp
from lora_param.checkpoint.create import create_adapter
from lora_param.checkpoint.open import open_checkpoint
from lora_param.errors import BrokenFileError, OptionError, OutputError
from lora_param.files.gguf import read_gguf
from lora_param.weight.blocks import one_thread

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType
READ = ["Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K"]
Q = "blk.0.attn_q.weight"


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Bytes of a type, with scales that are no NaN."""
    elements, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (rows * columns // elements, size), dtype=np.uint8)
    scale = rng.random((len(made), 2)).astype(np.float16).view(np.uint8)
    places = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2]}.get(kind, [0])
    for k, place in enumerate(places):
        made[:, place : place + 2] = scale[:, 2 * k : 2 * k + 2]
    return made.reshape(rows, -1)


def written(path: Path, kind: str = "Q8_0", alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("general.file_type", 7)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "ü"])
    writer.add_array("scores", [1.0, 2.0])
    writer.add_string("last", "end")
    rng = np.random.default_rng(1)
    if kind in ("F16", "F32"):
        W = rng.standard_normal((6, 512)).astype(np.float16 if kind == "F16" else np.float32)
        writer.add_tensor(Q, W)
    else:
        writer.add_tensor(Q, blocks(kind, 6, 512), raw_dtype=TYPES[kind])
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(7, np.float32))
    writer.add_tensor("output.weight", rng.standard_normal((3, 5)).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_library(path: Path) -> dict[str, np.ndarray]:
    reader = gguf.GGUFReader(path)
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(t.shape)[::-1])
        for t in reader.tensors
    }


def trained(path: Path, size: float = 0.3) -> Any:
    _, adapter = create_adapter(path, ["attn_q"], rank=4)
    g = torch.Generator().manual_seed(1)
    new = {k: torch.randn(t.shape, generator=g) * size for k, t in adapter.tensors.items()}
    return replace(adapter, tensors=new)


def delta(adapter: Any) -> torch.Tensor:
    f = adapter.factors(Q)
    with one_thread():  # the last bit of a product depends on their number
        return (f["lora_B"] @ f["lora_A"]) * adapter.targets[Q].scale


@pytest.mark.parametrize("kind", READ)
@pytest.mark.parametrize("alignment", [None, 64])
def test_blocks_equal_the_library(kind: str, alignment: int | None, tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", kind, alignment)
    meant = by_library(path)
    with open_checkpoint(path) as checkpoint:
        assert set(checkpoint) == set(meant)
        numbers = checkpoint.numbers(Q)  # type: ignore[attr-defined]
        assert torch.equal(numbers, torch.from_numpy(meant[Q]))
        assert torch.equal(checkpoint[Q], numbers.bfloat16())
        weight = checkpoint.weights[Q]
        assert (weight.shape, weight.dtype) == ((6, 512), "bfloat16")
        assert weight.quantized == f"GGUF {kind}"


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_plain_tensors_are_what_they_are(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", kind)
    meant = by_library(path)
    with open_checkpoint(path) as checkpoint:
        for name, values in meant.items():
            assert torch.equal(
                checkpoint[name].float(), torch.from_numpy(values.astype(np.float32))
            )
        assert not checkpoint.weights[Q].quantized
        assert checkpoint.weights[Q].dtype == {"F16": "float16", "F32": "float32"}[kind]


def test_a_type_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf", "IQ4_XS")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.weights[Q].unsuitable == "GGUF IQ4_XS, which is not read"
    _, adapter = create_adapter(path, ["output"], rank=2)
    with pytest.raises(OutputError, match="IQ4_XS"):
        lp.bake_checkpoint(path, adapter, tmp_path / "b.gguf", quantized="dense")
    lp.bake_checkpoint(path, adapter, tmp_path / "b.gguf")


@pytest.mark.parametrize("kind", [*READ, "F16", "F32"])
@pytest.mark.parametrize("dtype", [None, "float16"])
def test_dense_is_w_plus_delta_for_the_library(
    kind: str, dtype: str | None, tmp_path: Path
) -> None:
    path, out = written(tmp_path / "a.gguf", kind, 64), tmp_path / "b.gguf"
    adapter = trained(path)
    report = lp.bake_checkpoint(path, adapter, out, dtype=dtype, verify=True)
    with open_checkpoint(path) as checkpoint:
        stored = getattr(torch, dtype) if dtype else checkpoint[Q].dtype
        meant = (checkpoint[Q].float() + delta(adapter)).to(stored)
    assert np.array_equal(by_library(out)[Q].astype(np.float32), meant.float().numpy())
    old, new = gguf.GGUFReader(path), gguf.GGUFReader(out)
    types = {t.name: t.tensor_type.name for t in new.tensors}
    names = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    assert types[Q] == names[stored]
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert list(old.fields) == list(new.fields)
    for name, field in old.fields.items():
        if name != "general.file_type":
            assert field.contents() == new.fields[name].contents(), name
    assert report.changed


def test_same_gives_the_librarys_q8_0(tmp_path: Path) -> None:
    path, out = written(tmp_path / "a.gguf"), tmp_path / "b.gguf"
    adapter = trained(path)
    lp.bake_checkpoint(path, adapter, out, quantized="same", verify=True, force=True)
    wide = by_library(path)[Q] + delta(adapter).numpy()
    tensors = {t.name: t for t in gguf.GGUFReader(out).tensors}
    assert tensors[Q].tensor_type == TYPES.Q8_0
    assert np.array_equal(tensors[Q].data, gguf.quantize(wide, TYPES.Q8_0))
    four = written(tmp_path / "c.gguf", "Q4_K")
    adapter = trained(four)
    with pytest.raises(OptionError, match="Q4_K"):
        lp.bake_checkpoint(four, adapter, tmp_path / "d.gguf", quantized="same")


def test_the_output_of_a_gguf_file_is_called_so(tmp_path: Path) -> None:
    path = written(tmp_path / "a.gguf")
    with pytest.raises(OutputError, match="GGUF"):
        lp.bake_checkpoint(path, trained(path), tmp_path / "b.safetensors")


def test_a_damaged_header_is_an_error_and_no_crash(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.gguf").read_bytes()
    entries = read_gguf(tmp_path / "a.gguf").entries
    size, end = entries[Q].start, entries["output.weight"].stop
    path = tmp_path / "b.gguf"
    rng = np.random.default_rng(0)
    for stop in [*range(0, size, 7), end - 1]:
        path.write_bytes(whole[:stop])
        with pytest.raises(BrokenFileError):
            read_gguf(path)
    for _ in range(500):
        damaged = bytearray(whole)
        for place in rng.integers(0, size, 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            with open_checkpoint(path) as checkpoint:
                for name in checkpoint:
                    _ = checkpoint[name].shape
        except BrokenFileError:
            continue
