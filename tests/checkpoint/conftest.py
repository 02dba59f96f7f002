"""Checkpoints and adapters to test on: small ones made here, real ones out of packages."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_samples import trained, weights
from safetensors.torch import save_file

from lora_param.adapter import Adapter
from lora_param.checkpoint.create import create_adapter


@pytest.fixture
def asset() -> Callable[[str, str], Path]:
    """A file inside an installed package, without importing it."""

    def find(package: str, inside: str) -> Path:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            reason = f"the package {package}, which carries real weights, is not installed"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        return next(Path(spec.submodule_search_locations[0]).glob(inside))

    return find


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.safetensors"
    save_file(weights(), path, {"format": "pt", "note": "é"})
    return path


@pytest.fixture
def adapter(base: Path) -> Adapter:
    _, fresh = create_adapter(base, ["q", "v", "!b.v"], rank=2, alpha=3, seed=0)
    return trained(fresh)
