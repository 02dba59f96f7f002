from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_samples import FP8, opened, reads

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

M, N = 12, 64


def case(form: str, compressor: Any, state: dict[str, torch.Tensor], **arguments: Any):
    """A file's tensors, its config, and what the library makes of them."""
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    meant = compressor.decompress(dict(state), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump()}},
    }
    return {f"l.{n}": t for n, t in state.items()}, config, meant


def check(path: Path, tensors: Any, config: Any, meant: torch.Tensor) -> None:
    with opened(path, tensors, config) as checkpoint:
        reads(checkpoint, "l.weight", meant)
        assert set(checkpoint) == {"l.weight"}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_integers(bits: int, strategy: str, symmetric: bool, tmp_path: Path) -> None:
    if strategy == "tensor" and not symmetric:
        pytest.skip("the library keeps no packed zero point for a whole tensor")
    columns = {"group": 4, "channel": 1, "tensor": 1}[strategy]
    scale = torch.rand((1,) if strategy == "tensor" else (M, columns)).bfloat16()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    arguments = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    if strategy == "group":
        arguments["group_size"] = 16
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    state = {"weight": torch.randn(M, N).bfloat16() * 3, "weight_scale": scale}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(low, high, (M, columns), dtype=torch.int8)
    stored = PackedQuantizationCompressor.compress(state, scheme)
    check(tmp_path, *case("pack-quantized", PackedQuantizationCompressor, stored, **arguments))


@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_plain_int8(strategy: str, symmetric: bool, tmp_path: Path) -> None:
    columns = {"group": 4, "channel": 1, "tensor": 1}[strategy]
    shape = (1,) if strategy == "tensor" else (M, columns)
    state = {
        "weight": torch.randint(-128, 128, (M, N), dtype=torch.int8),
        "weight_scale": torch.rand(shape).bfloat16(),
    }
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-128, 128, shape, dtype=torch.int8)
    arguments = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": symmetric}
    if strategy == "group":
        arguments["group_size"] = 16
    check(tmp_path, *case("int-quantized", NaiveQuantizationCompressor, state, **arguments))


@pytest.mark.parametrize(
    ("strategy", "shape", "more"),
    [
        ("tensor", (1,), {}),
        ("channel", (M, 1), {}),
        ("block", (3, 2), {"block_structure": [4, 32]}),
    ],
)
def test_float8(strategy: str, shape: tuple[int, ...], more: Any, tmp_path: Path) -> None:
    state = {
        "weight": (torch.randn(M, N) * 50).to(FP8),
        "weight_scale": torch.rand(shape).bfloat16(),
    }
    arguments = {"num_bits": 8, "type": "float", "strategy": strategy, **more}
    check(tmp_path, *case("float-quantized", NaiveQuantizationCompressor, state, **arguments))


def test_mxfp4(tmp_path: Path) -> None:
    state = {
        "weight_packed": torch.randint(0, 256, (M, N // 2), dtype=torch.uint8),
        "weight_scale": torch.randint(110, 140, (M, N // 32), dtype=torch.uint8),
    }
    arguments = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    check(tmp_path, *case("mxfp4-pack-quantized", MXFP4PackedCompressor, state, **arguments))


def test_a_form_that_is_not_read_is_refused_by_name(tmp_path: Path) -> None:
    tensors = {
        "l.weight_packed": torch.zeros(4, 8, dtype=torch.int32),
        "l.weight_scale": torch.ones(4, 1),
    }
    config = {"quant_method": "compressed-tensors", "format": "marlin-24"}
    with opened(tmp_path, tensors, config) as checkpoint:
        assert "'marlin-24', which is not read" in checkpoint.weights["l.weight_packed"].unsuitable
