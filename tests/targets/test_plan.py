from __future__ import annotations

import json
import math
import re

import pytest

from lora_param.errors import (
    NoMatchError,
    OptionError,
    OverlapError,
    SliceError,
    TargetError,
    TiedWeightsError,
    UnsuitableWeightError,
)
from lora_param.targets.matching import match_targets
from lora_param.targets.plan import make_plan
from lora_param.targets.settings import Settings
from lora_param.targets.weights import Weight

SHAPES = {
    "embed.weight": (100, 16),
    "layers.0.attn.q_proj.weight": (16, 16),
    "layers.0.attn.q_proj.bias": (16,),
    "layers.0.attn.v_proj.weight": (16, 16),
    "layers.0.in_proj_weight": (48, 16),
    "layers.0.conv.weight": (8, 4, 3, 3),
    "layers.0.experts": (4, 8, 16),
    "lm_head.weight": (100, 16),
}


def keys(*patterns: str, **kwargs: object) -> list[str]:
    return [str(t.target) for t in make_plan(SHAPES, patterns, **kwargs).targets]  # type: ignore[arg-type]


def test_counts_shapes_and_share() -> None:
    plan = make_plan(
        SHAPES, ["q_proj", "in_proj_weight[0/3]", "experts[*]"], settings=Settings(rank=2)
    )
    assert [(c.pattern, c.matched) for c in plan.counts] == [
        ("q_proj", 1),
        ("in_proj_weight[0/3]", 1),
        ("experts[*]", 1),
    ]
    assert [t.settings.shapes(t.matrix) for t in plan.targets] == [
        {"lora_A": (2, 16), "lora_B": (16, 2)},
        {"lora_A": (2, 16), "lora_B": (16, 2)},
        {"lora_A": (4, 2, 16), "lora_B": (4, 8, 2)},
    ]
    assert plan.trainable == 64 + 64 + 4 * (32 + 16)
    assert plan.base == sum(math.prod(s) for s in SHAPES.values())
    assert plan.percent == pytest.approx(100 * plan.trainable / plan.base)
    assert json.loads(json.dumps(plan.to_dict()))["trainable"] == plan.trainable


def test_all_linear_on_names_alone_says_what_it_leaves_out() -> None:
    plan = make_plan(SHAPES, "all-linear")
    assert [t.target.name for t in plan.targets] == [
        "layers.0.attn.q_proj.weight",
        "layers.0.attn.v_proj.weight",
        "layers.0.in_proj_weight",
    ]
    assert {item.name: item.reason for item in plan.left_out} == {
        "embed.weight": "an embedding, by its name",
        "lm_head.weight": "an output head, by its name",
    }
    assert plan.counts[0].left_out == 2


def test_the_last_pattern_that_names_a_weight_decides() -> None:
    plan = make_plan(SHAPES, ["**.attn.**:rank=4", "v_proj:rank=2,alpha=3"])
    assert [t.settings.rank for t in plan.targets] == [4, 2]
    assert plan.targets[1].settings.scale == 1.5
    assert plan.targets[1].pattern == "v_proj:rank=2,alpha=3"
    assert [item.name for item in plan.left_out] == ["layers.0.attn.q_proj.bias"]


def test_patterns_that_take_away() -> None:
    assert keys("**.attn.**", "!v_proj") == ["layers.0.attn.q_proj.weight"]
    assert keys("**.attn.**", exclude=["v_proj"]) == ["layers.0.attn.q_proj.weight"]
    assert keys("in_proj_weight[0/3]", "in_proj_weight[1/3]", "!in_proj_weight[1/3]") == [
        "layers.0.in_proj_weight[0:16]"
    ]
    with pytest.raises(NoMatchError, match=r"q_porj.*Nearest: .*q_proj"):
        keys("**.attn.**", "!q_porj")
    with pytest.raises(TargetError, match="nothing is left"):
        keys("q_proj", "!q_proj")
    with pytest.raises(OptionError, match="at least one pattern"):
        keys("!q_proj")


@pytest.mark.parametrize(
    ("pattern", "error", "says"),
    [
        ("q_prj", NoMatchError, r"matches none of 8 weights\. Nearest: q_proj"),
        ("type:LSTM", TargetError, "needs a live model"),
        ("q_proj.bias", UnsuitableWeightError, "1-dimensional"),
        ("q_proj:rank=0", OptionError, "rank is 0"),
        ("q_proj[0/3]", SliceError, "16 rows do not divide"),
        ("q_proj:alpha=0", OptionError, "alpha"),
        ("q_proj:alpha=nan", OptionError, "alpha"),
        ("q_proj:dropout=1", OptionError, "dropout"),
        ("q_proj:scaling=odd", OptionError, "standard, rslora, constant"),
    ],
)
def test_what_is_refused(pattern: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        keys(pattern)


def test_overlapping_targets_are_refused() -> None:
    with pytest.raises(OverlapError, match=re.escape("in_proj_weight[0:16]")):
        keys("in_proj_weight", "in_proj_weight[0/3]")
    assert len(keys("in_proj_weight[0/3]", "in_proj_weight[1/3]")) == 2


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (Weight("w", (4, 4), "int8"), "of dtype int8"),
        (Weight("w", (4, 4), "float4_e2m1fn_x2"), "packed as float4"),
        (Weight("w", (4, 4), "float8_e4m3fn", packed="quantized: w_scale is beside it"), "w_scale"),
        (Weight("w", (0, 4)), "empty"),
        (Weight("w", (4, 4), "complex64"), "of dtype complex64"),
    ],
)
def test_unsuitable_weights(weight: Weight, reason: str) -> None:
    weights = {"w": weight, "v": Weight("v", (9, 9))}
    with pytest.raises(UnsuitableWeightError, match=reason):
        make_plan(weights, "w")
    plan = make_plan(weights, "**")
    assert [t.target.name for t in plan.targets] == ["v"]
    assert reason in plan.left_out[0].reason


def test_tied_weights_want_a_choice() -> None:
    weights = {
        "emb.weight": Weight("emb.weight", (9, 9), tied=("head.weight",)),
        "head.weight": Weight("head.weight", (9, 9), tied=("emb.weight",)),
    }
    with pytest.raises(TiedWeightsError, match=r"emb\.weight is tied to head\.weight"):
        make_plan(weights, "emb")
    together = make_plan(weights, "head", tied="together").targets
    assert [(t.target.name, t.also, t.apart) for t in together] == [
        ("head.weight", ("emb.weight",), ())
    ]
    apart = make_plan(weights, "head", tied="apart").targets
    assert [(t.target.name, t.also, t.apart) for t in apart] == [
        ("head.weight", (), ("emb.weight",))
    ]
    both = make_plan(weights, ["emb", "head"]).targets
    assert [(t.target.name, t.also) for t in both] == [("emb.weight", ("head.weight",))]
    assert make_plan(weights, "emb", tied="apart").base == 81
    with pytest.raises(OptionError, match="error, together, apart"):
        make_plan(weights, "emb", tied="maybe")  # type: ignore[arg-type]


def test_patterns_over_existing_targets() -> None:
    existing = {
        "a.q.weight": Weight("a.q.weight", (4, 4)),
        "a.in[0:2]": Weight("a.in", (4, 4)),
        "a.in[2:4]": Weight("a.in", (4, 4)),
    }
    assert match_targets(existing, None) == list(existing)
    assert match_targets(existing, "q") == ["a.q.weight"]
    assert match_targets(existing, ["in"]) == ["a.in[0:2]", "a.in[2:4]"]
    assert match_targets(existing, ["in[1/2]"]) == ["a.in[2:4]"]
    assert match_targets(existing, ["**", "!q"]) == ["a.in[0:2]", "a.in[2:4]"]
    assert match_targets(existing, ["!q"]) == ["a.in[0:2]", "a.in[2:4]"]
    with pytest.raises(NoMatchError, match="Nearest: q"):
        match_targets(existing, ["qq"])


def test_lokr_takes_the_inputs_of_a_stack_for_no_kernel() -> None:
    found = make_plan({"w": (4, 16, 64)}, ["w[*]"], settings=Settings(rank=2, variant="lokr"))
    (whole,) = make_plan({"w": (16, 64)}, ["w"], settings=Settings(rank=2, variant="lokr")).targets
    shapes = found.targets[0].settings.shapes((4, 16, 64))
    assert {n: s[1:] for n, s in shapes.items()} == whole.settings.shapes((16, 64))
    (conv,) = make_plan(
        {"w": (8, 6, 3, 3)}, ["w"], settings=Settings(rank=2, variant="lokr")
    ).targets
    assert conv.settings.form == "left2x2"
