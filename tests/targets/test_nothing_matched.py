"""A pattern that adapts nothing says why: the weights that it covers, a buffer, or the names."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import lora_param as lp
from lora_param.errors import NoMatchError, NoneSuitableError, UnsuitableWeightError
from lora_param.targets.plan import make_plan
from lora_param.targets.weights import Weight


class Buffered(nn.Module):
    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.zeros(4, 4))


def test_all_linear_on_a_model_without_linear_layers_says_why() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.PReLU())
    said = (
        "the pattern 'all-linear' can adapt none of the 7 weights that it covers (0.weight and 1 "
        "more: of a Conv2d, not of a linear layer; 0.bias and 4 more: 1-dimensional). "
        "Name the weights to adapt, such as 0.weight, 2.weight."
    )
    with pytest.raises(NoneSuitableError, match=f"^{re.escape(said)}$"):
        lp.apply(net)
    with pytest.raises(NoneSuitableError, match=f"^{re.escape(said)}$"):
        lp.plan(net)


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (Weight("w", (4, 4), "int8", ("Linear",)), "of dtype int8"),
        (Weight("w", (8, 1), "uint8", ("Linear",), packed="quantized, a Params4bit"), "Params4bit"),
        (Weight("w", (4, 4), classes=("Linear",), head=True), "the output head"),
        (Weight("wte.weight", (4, 4)), "an embedding, by its name"),
        (Weight("w.running_mean", (4, 4)), "a running statistic"),
        (Weight("w", (4, 4, 1)), "3-dimensional"),
    ],
)
def test_all_linear_on_a_model_of_unsuitable_weights_says_why(weight: Weight, reason: str) -> None:
    with pytest.raises(NoneSuitableError, match=reason):
        make_plan({weight.name: weight}, "all-linear")


@pytest.mark.parametrize("pattern", ["**.bias", "re:.*bias", "type:BatchNorm1d"])
def test_a_broad_pattern_over_unsuitable_weights_says_why(pattern: str) -> None:
    with pytest.raises(NoneSuitableError, match=r"can adapt none of the 2 .*1-dimensional"):
        lp.apply(Buffered(), pattern)


@pytest.mark.parametrize("pattern", ["table", "norm.running_mean", "**.running_var", "ta*"])
def test_a_buffer_as_a_target_is_said_to_be_one(pattern: str) -> None:
    said = r"(table|norm\.running_\w+) cannot be adapted: it is a buffer and not a parameter"
    for call in (lp.apply, lp.plan):
        with pytest.raises(UnsuitableWeightError, match=said):
            call(Buffered(), pattern)
    adapted = lp.apply(Buffered(), "linear", init="pissa", rank=2)
    with pytest.raises(UnsuitableWeightError, match=said):
        lp.apply(adapted, pattern, adapter="second")
    with pytest.raises(NoMatchError):
        lp.apply(adapted, "initial_A", adapter="second")
