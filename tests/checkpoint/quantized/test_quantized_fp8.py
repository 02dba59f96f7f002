from pathlib import Path

import pytest
import torch
from quantized_samples import FP8, folder, opened, reads

from lora_param.checkpoint.open import open_checkpoint
from lora_param.checkpoint.quantized.fp8 import dequantize_fp8, quantize_fp8

BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def quantized(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * 100).to(FP8)


def scales(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3 + 1e-4


def test_blocks_as_deepseek_and_transformers_store_them_equal_transformers_bits(
    tmp_path: Path,
) -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    q, s = quantized(256, 384), scales(2, 3)
    experts, e = quantized(3, 128, 256), scales(3, 1, 2)
    dequantize = module.Fp8Dequantize(None)._dequantize_one
    tensors = {
        "l.weight": q,
        "l.weight_scale_inv": s,
        "experts.gate_up_proj": experts,
        "experts.gate_up_proj_scale_inv": e,
    }
    with opened(tmp_path, tensors, BLOCKS) as checkpoint:
        reads(checkpoint, "l.weight", dequantize(q, s, torch.bfloat16))
        reads(checkpoint, "experts.gate_up_proj", dequantize(experts, e, torch.bfloat16))
        assert set(checkpoint) == {"l.weight", "experts.gate_up_proj"}
        assert checkpoint.weights["l.weight"].quantized == "fp8 in blocks of 128×128"


def test_blocks_that_the_shape_cuts_off_equal_the_definition(tmp_path: Path) -> None:
    q, s = quantized(200, 130), scales(2, 2)
    meant = torch.empty(200, 130)
    for i in range(200):
        for j in range(130):
            meant[i, j] = q[i, j].float() * s[i // 128, j // 128]
    with opened(tmp_path, {"l.weight": q, "l.weight_scale_inv": s}, BLOCKS) as checkpoint:
        reads(checkpoint, "l.weight", meant.bfloat16())


@pytest.mark.parametrize("name", ["l.weight_scale", "l.weight_scale_inv", "l.scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,)])
def test_one_scale_and_a_scale_for_each_row(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    q, s = quantized(6, 10), scales(*shape)
    with opened(tmp_path, {"l.weight": q, name: s}, dtype="float16") as checkpoint:
        column = s.reshape(-1, 1) if s.numel() > 1 else s
        reads(checkpoint, "l.weight", (q.float() * column).half())


@pytest.mark.parametrize("stored", [torch.uint8, torch.float8_e8m0fnu])
def test_mxfp8_equals_the_library(stored: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    q = quantized(6, 96)
    e = torch.randint(100, 140, (6, 3), dtype=torch.uint8)
    state = {"weight": q, "weight_scale": e}
    meant = MXFP8QuantizationCompressor.decompress(state, scheme)["weight"]
    with opened(tmp_path, {"l.weight": q, "l.weight_scale": e.view(stored)}) as checkpoint:
        reads(checkpoint, "l.weight", meant)
        assert checkpoint.weights["l.weight"].quantized == "mxfp8"


def test_blocks_whose_size_nothing_states_are_refused(tmp_path: Path) -> None:
    with opened(
        tmp_path, {"l.weight": quantized(256, 256), "l.weight_scale_inv": scales(2, 2)}
    ) as c:
        assert "no config.json beside it states their block" in c.weights["l.weight"].unsuitable


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tensors = {"l.weight": quantized(256, 256), "l.weight_scale_inv": scales(3, 2)}
    with opened(tmp_path, tensors, BLOCKS) as checkpoint:
        assert "do not fit" in checkpoint.weights["l.weight"].unsuitable


def test_float8_without_a_scale_is_a_plain_weight(tmp_path: Path) -> None:
    with opened(tmp_path, {"l.weight": quantized(4, 4)}) as checkpoint:
        assert checkpoint.weights["l.weight"].dtype == "float8_e4m3fn"
        assert not checkpoint.weights["l.weight"].unsuitable


@pytest.mark.parametrize("block", [(128, 128), (1, 32), (1, 130), (200, 130)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.uint8])
def test_quantizing_what_was_read_gives_the_file_again(
    block: tuple[int, int], stored: torch.dtype
) -> None:
    W = torch.randn(200, 130)
    grid = torch.full((-(-200 // block[0]), -(-130 // block[1])), 127.0).to(stored)
    q, s = quantize_fp8(W, grid, block, FP8)
    read = dequantize_fp8(q, s, block)
    assert s.dtype == stored
    again, same = quantize_fp8(read, s, block, FP8)
    assert torch.equal(again.view(torch.uint8), q.view(torch.uint8))
    assert torch.equal(same, s)
    assert ((read - W).abs() <= W.abs() / 16 + 1e-3).all()  # half a step of three bits


def test_a_sharded_directory_reads_scales_from_other_files(tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    q, s = quantized(256, 128), scales(2, 1)
    folder(tmp_path, {"x": torch.zeros(1)}, BLOCKS)
    (tmp_path / "model.safetensors").unlink()
    save_file({"l.weight": q}, tmp_path / "a.safetensors")
    save_file({"l.weight_scale_inv": s}, tmp_path / "b.safetensors")
    index = {"weight_map": {"l.weight": "a.safetensors", "l.weight_scale_inv": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_checkpoint(tmp_path) as checkpoint:
        reads(checkpoint, "l.weight", (q.float() * s.repeat_interleave(128, 0)).bfloat16())
