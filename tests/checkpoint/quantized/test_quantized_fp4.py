from pathlib import Path

import pytest
import torch
from quantized_samples import FP8, opened, reads


def test_experts_of_gpt_oss_equal_transformers_bits(tmp_path: Path) -> None:
    module = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 10, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 4), dtype=torch.uint8)
    tensors = {
        "e.gate_up_proj_blocks": blocks,
        "e.gate_up_proj_scales": scales,
        "e.gate_up_proj_bias": torch.zeros(3, 10),
    }
    with opened(tmp_path, tensors, {"quant_method": "mxfp4"}) as checkpoint:
        reads(checkpoint, "e.gate_up_proj", module.convert_moe_packed_tensors(blocks, scales))
        assert set(checkpoint) == {"e.gate_up_proj", "e.gate_up_proj_bias"}
        assert checkpoint.weights["e.gate_up_proj"].shape == (3, 128, 10)


def test_blocks_that_do_not_fit_their_scales_are_refused(tmp_path: Path) -> None:
    tensors = {
        "e.up_blocks": torch.zeros(3, 10, 4, 16, dtype=torch.uint8),
        "e.up_scales": torch.zeros(3, 10, 5, dtype=torch.uint8),
    }
    with opened(tmp_path, tensors) as checkpoint:
        assert "do not fit" in checkpoint.weights["e.up_blocks"].unsuitable


def test_nvfp4_equals_compressed_tensors(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    state = {
        "weight_packed": torch.randint(0, 256, (6, 32), dtype=torch.uint8),
        "weight_scale": (torch.rand(6, 4) * 400).to(FP8),
        "weight_global_scale": torch.tensor([1234.5]),
    }
    meant = NVFP4PackedCompressor.decompress(dict(state), scheme)["weight"]
    config = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    tensors = {f"l.{n}": t for n, t in state.items()}
    with opened(tmp_path, tensors | {"l.input_global_scale": torch.ones(1)}, config) as checkpoint:
        reads(checkpoint, "l.weight", meant)
        assert set(checkpoint) == {"l.weight"}


def test_nvfp4_of_modelopt_equals_its_definition(tmp_path: Path) -> None:
    packed = torch.randint(0, 256, (6, 32), dtype=torch.uint8)
    scale, whole = (torch.rand(6, 4) * 400).to(FP8), torch.tensor(0.01)
    numbers = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
    meant = torch.empty(6, 64)
    for i in range(6):
        for j in range(64):
            code = int(packed[i, j // 2]) >> (4 * (j % 2)) & 15
            meant[i, j] = numbers[code] * (scale[i, j // 16].float() * whole)
    tensors = {"l.weight": packed, "l.weight_scale": scale, "l.weight_scale_2": whole}
    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    with opened(tmp_path, tensors | {"l.input_scale": torch.ones(())}, config) as checkpoint:
        reads(checkpoint, "l.weight", meant.bfloat16())
        assert set(checkpoint) == {"l.weight"}
