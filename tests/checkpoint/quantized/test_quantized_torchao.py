from pathlib import Path

import pytest
import torch
from quantized_samples import opened, reads

pytest.importorskip("torchao")

from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup


def written(weight: torch.Tensor):
    return flatten_tensor_state_dict({"l.weight": weight, "l.bias": torch.zeros(6)})


def by_config(config) -> torch.Tensor:
    layer = torch.nn.Linear(64, 6, dtype=torch.bfloat16)
    quantize_(torch.nn.Sequential(layer), config)
    return layer.weight.data


CASES = {
    "float8": lambda: by_config(Float8WeightOnlyConfig()),
    "int8": lambda: by_config(Int8WeightOnlyConfig(version=2)),
    "intx": lambda: by_config(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    ),
    "mxfp8": lambda: MXTensor.to_mx(torch.randn(6, 64).bfloat16(), torch.float8_e4m3fn),
    "mxfp4": lambda: MXTensor.to_mx(torch.randn(6, 64).bfloat16(), torch.float4_e2m1fn_x2),
    "nvfp4": lambda: NVFP4Tensor.to_nvfp4(torch.randn(6, 64).bfloat16()),
    "nvfp4 of two levels": lambda: NVFP4Tensor.to_nvfp4(
        torch.randn(6, 64).bfloat16(), per_tensor_scale=torch.tensor(0.01)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_tensors_equal_torchaos_own_reading(name: str, tmp_path: Path) -> None:
    weight = CASES[name]()
    tensors, metadata = written(weight)
    with opened(tmp_path, tensors, {"quant_method": "torchao"}, metadata) as checkpoint:
        reads(checkpoint, "l.weight", weight.dequantize())
        assert set(checkpoint) == {"l.weight", "l.bias"}


def test_swizzled_scales_are_refused_by_name(tmp_path: Path) -> None:
    weight = NVFP4Tensor.to_nvfp4(torch.randn(128, 64).bfloat16(), is_swizzled_scales=True)
    tensors, metadata = written(weight)
    with opened(tmp_path, tensors, {"quant_method": "torchao"}, metadata) as checkpoint:
        assert "NVFP4Tensor with these settings" in checkpoint.weights["l._weight_qdata"].packed
