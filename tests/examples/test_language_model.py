"""The example runs, and what it claims holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lora_param as lp


def test_language_model(example: Callable[[list[str]], Any], tmp_path: Path) -> None:
    found = example(["--quick", "--shift", "--out", str(tmp_path)])
    assert found.untouched
    assert (tmp_path / "perplexity.png").stat().st_size > 10_000
    assert found.percent < 5
    assert found.trainable == lp.stats(tmp_path / "adapter.safetensors").trainable

    names = ["base", "full fine-tuning", "LoRA", "LoRA, rate × 10", "LoRA off"]
    assert list(found.perplexity) == list(found.samples) == names
    (_, base), (_, lora), (_, faster) = (
        found.perplexity[name] for name in ("base", "LoRA", "LoRA, rate × 10")
    )
    assert base < 256 / 8, "it was trained"
    assert lora < base
    assert faster < 0.95 * base
    assert found.perplexity["LoRA off"] == found.perplexity["base"]
    assert found.samples["LoRA off"] == found.samples["base"]
    assert found.samples["LoRA, rate × 10"] != found.samples["base"]
    assert all(len(sample) > 20 for sample in found.samples.values())

    full, cost = found.costs["full fine-tuning"], found.costs["LoRA"]
    assert cost.gradients == 4 * found.trainable
    assert full.gradients == 4 * found.parameters
    assert cost.optimizer < 0.05 * full.optimizer
    assert cost.saved < 1.1 * full.saved


def test_texts_of_ones_own(example: Callable[[list[str]], Any], tmp_path: Path) -> None:
    missing = str(tmp_path / "nothing.txt")
    with pytest.raises(SystemExit, match=r"cannot be read.*nothing\.txt"):
        example(["--quick", "--text", missing, "--out", str(tmp_path)])
    short = tmp_path / "short.txt"
    short.write_text("In the beginning was the Word.\n")
    with pytest.raises(SystemExit, match="too short"):
        example(["--quick", "--shifted-text", str(short), "--out", str(tmp_path)])
