"""Directories of quantized weights, as the tools write them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_param.checkpoint.base import Checkpoint
from lora_param.checkpoint.open import open_checkpoint

FP8 = torch.float8_e4m3fn


def folder(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    quantization: Mapping[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    dtype: str = "bfloat16",
) -> Path:
    """A Hugging Face directory with these tensors and this `quantization_config`."""
    path.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", metadata)
    config: dict[str, Any] = {"torch_dtype": dtype, "model_type": "x"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    return path


def opened(
    path: Path, tensors: Mapping[str, torch.Tensor], *more: Any, **config: Any
) -> Checkpoint:
    return open_checkpoint(folder(path, tensors, *more, **config))


def reads(checkpoint: Checkpoint, name: str, meant: torch.Tensor) -> None:
    """The weight is there under this name, with these numbers to the bit, and planned as such."""
    found, weight = checkpoint[name], checkpoint.weights[name]
    assert found.dtype == meant.dtype
    assert found.shape == meant.shape
    assert torch.equal(found, meant)
    assert (weight.shape, weight.dtype) == (meant.shape, str(meant.dtype).removeprefix("torch."))
    assert weight.quantized
    assert not weight.unsuitable
