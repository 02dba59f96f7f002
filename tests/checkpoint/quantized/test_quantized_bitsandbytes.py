import json
from pathlib import Path

import pytest
import torch
from quantized_samples import opened, reads

from lora_param.checkpoint.quantized.bitsandbytes import quantize_int8
from lora_param.checkpoint.quantized.logical import QuantizedCheckpoint

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def functional():
    return pytest.importorskip("bitsandbytes.functional")


def stored(W: torch.Tensor, **how):
    """W as bitsandbytes writes it, and as it reads it."""
    bnb = functional()
    q, state = bnb.quantize_4bit(W, **how)
    tensors = {"l.weight": q} | {f"l.weight.{k}": t for k, t in state.as_dict(packed=True).items()}
    return tensors, bnb.dequantize_4bit(q, state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(96, 50), (7, 18)])
def test_4bit_equals_the_library(
    dtype: torch.dtype, nested: bool, kind: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    W = torch.randn(shape).to(dtype)
    tensors, meant = stored(W, quant_type=kind, compress_statistics=nested)
    with opened(tmp_path, tensors) as checkpoint:
        reads(checkpoint, "l.weight", meant)
        assert set(checkpoint) == {"l.weight"}
        assert checkpoint.weights["l.weight"].quantized == f"bitsandbytes {kind} in blocks of 64"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_quantizing_to_4bit_gives_the_librarys_bytes(
    kind: str, blocksize: int, tmp_path: Path
) -> None:
    how = {"quant_type": kind, "blocksize": blocksize, "compress_statistics": False}
    tensors, _ = stored(torch.randn(96, 50), **how)
    W = torch.randn(96, 50)
    meant, _ = stored(W, **how)
    with opened(tmp_path, tensors) as checkpoint:
        assert isinstance(checkpoint, QuantizedCheckpoint)
        packed = checkpoint.packed["l.weight"]
        assert packed.encode is not None
        new = packed.encode(W, checkpoint.parts("l.weight"))
        for role, entry in packed.entries.items():
            assert torch.equal(new[role], meant[entry]), role


@pytest.mark.parametrize("nested", [False, True])
def test_quantizing_what_was_read_gives_the_file_again(nested: bool, tmp_path: Path) -> None:
    tensors, _ = stored(torch.randn(96, 50), quant_type="nf4", compress_statistics=nested)
    with opened(tmp_path, tensors) as checkpoint:
        assert isinstance(checkpoint, QuantizedCheckpoint)
        packed = checkpoint.packed["l.weight"]
        parts = checkpoint.parts("l.weight")
        assert packed.encode is not None
        again = packed.encode(packed.decode(parts), parts)
        assert torch.equal(packed.decode(again), packed.decode(parts))
        assert torch.equal(again["weight"], parts["weight"])


def test_int8_equals_the_library(tmp_path: Path) -> None:
    bnb = functional()
    W = torch.randn(6, 20).half()
    q, absmax, _ = bnb.int8_vectorwise_quant(W)
    layout = torch.zeros((), dtype=torch.uint8)
    tensors = {"l.weight": q, "l.SCB": absmax, "l.weight_format": layout}
    meant = bnb.int8_vectorwise_dequant(q, absmax).bfloat16()
    with opened(tmp_path, tensors, {"quant_method": "bitsandbytes"}) as checkpoint:
        reads(checkpoint, "l.weight", meant)
        assert set(checkpoint) == {"l.weight"}
    again, scale = quantize_int8(W.float())
    assert torch.equal(again, q)
    assert torch.equal(scale, absmax)


def test_int8_by_its_definition(tmp_path: Path) -> None:
    q = torch.randint(-127, 128, (6, 20), dtype=torch.int8)
    absmax = torch.rand(6)
    meant = (q.double() * absmax.double()[:, None] / 127).float()
    with opened(tmp_path, {"l.weight": q, "l.SCB": absmax}, dtype="float32") as checkpoint:
        torch.testing.assert_close(checkpoint["l.weight"], meant, rtol=1e-6, atol=0)


def test_a_state_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    W = torch.zeros(32, dtype=torch.uint8)
    text = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 8]}
    for change in ({"shape": [8, 9]}, {"blocksize": 0}, {"dtype": "int8"}, {"shape": "x"}, None):
        state = b"{" if change is None else json.dumps(text | change).encode()
        tensors = {
            "l.weight": W,
            "l.weight.absmax": torch.ones(1),
            "l.weight.quant_map": torch.ones(16),
            "l.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
        }
        with opened(tmp_path, tensors) as checkpoint:
            assert "does not fit" in checkpoint.weights["l.weight"].unsuitable
