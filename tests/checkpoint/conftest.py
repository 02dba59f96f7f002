"""A small checkpoint and an adapter for it."""

from pathlib import Path

import pytest
from checkpoint_samples import trained, weights
from safetensors.torch import save_file

from lora_param.adapter import Adapter
from lora_param.checkpoint.create import create_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file(weights(), path, {"format": "pt", "note": "é"})
    return path


@pytest.fixture
def adapter(base: Path) -> Adapter:
    _, fresh = create_adapter(base, ["q", "v", "!b.v"], rank=2, alpha=3, seed=0)
    return trained(fresh)
