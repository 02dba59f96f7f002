"""Each pattern of the language beside the nearest one that must not match."""

from __future__ import annotations

import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_param.errors import OptionError, PatternError
from lora_param.targets.patterns import parse_pattern
from lora_param.targets.weights import Weight


def names(pattern: str, name: str) -> bool:
    return parse_pattern(pattern).matches(Weight(name, (8, 8)))


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("q_proj", "layers.0.attn.q_proj.weight", "layers.0.attn.xq_proj.weight"),
        ("q_proj", "q_proj.weight", "q_proj.bias"),
        ("q_proj", "q_proj", "q_proj.0.weight"),
        ("attn.q_proj", "a.attn.q_proj.weight", "a.xattn.q_proj.weight"),
        ("q_proj.weight", "a.q_proj.weight", "a.q_proj.weight.x"),
        ("weight", "a.weight", "a.weights"),
        ("in_proj_weight", "attn.in_proj_weight", "attn.in_proj_weight_2"),
        ("a.b+c", "a.b+c.weight", "a.bbc.weight"),
        ("layer.*.q", "layer.0.q.weight", "layer.0.x.q.weight"),
        ("layer.*.q", "layer.10.q", "encoder.layer.1.q"),
        ("*.q", "layer.q.weight", "a.layer.q.weight"),
        ("**.q", "a.b.c.q.weight", "a.b.xq.weight"),
        ("**.q", "q.weight", "q.a"),
        ("a.**.w", "a.w", "a.x"),
        ("a.**.w", "a.b.c.w", "b.a.w"),
        (
            "encoder.layer.*.attention.**.weight",
            "encoder.layer.3.attention.self.query.weight",
            "encoder.layer.3.output.dense.weight",
        ),
        ("layer.?.q", "layer.1.q", "layer.11.q"),
        ("**", "anything.at.all", ""),
        ("layers.{0..11}.{q,v}_proj", "m.layers.11.v_proj.weight", "m.layers.12.v_proj.weight"),
        ("layers.{0..11}.{q,v}_proj", "layers.0.q_proj", "layers.0.k_proj"),
        ("l{1..3,7}", "l7.weight", "l4.weight"),
        ("l{08..10}", "l09.weight", "l9.weight"),
        ("l{3..1}", "l2.weight", "l0.weight"),
        ("b.{a,c.{d,e}}", "b.c.e.weight", "b.c.weight"),
        ("*.{q,v}", "x.v.weight", "x.y.v.weight"),
        (r"re:.*\.(q|v)", "a.q", "a.q.weight"),
        (r"re:h\.\d+\.w", "h.12.w", "h.x.w"),
    ],
)
def test_what_a_pattern_matches(pattern: str, matching: str, other: str) -> None:
    assert names(pattern, matching)
    assert not names(pattern, other)


def test_types_match_a_class_and_its_subclasses() -> None:
    head = Weight("a", (4, 4), classes=("NonDynamicallyQuantizableLinear", "Linear"))
    assert parse_pattern("type:Linear").matches(head)
    assert parse_pattern("type:NonDynamicallyQuantizableLinear").matches(head)
    assert not parse_pattern("type:LSTM").matches(head)
    assert not parse_pattern("type:Linear").matches(Weight("a.bias", (4,), classes=("Linear",)))


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("q:rank=16,alpha=32", {"rank": 16, "alpha": 32.0}),
        ("w[0:4]:rank=2", {"rank": 2}),
        ("type:LSTM:rank=3", {"rank": 3}),
        ("re:a.*:dropout=0.5", {"dropout": 0.5}),
        ("all-linear:scaling=rslora", {"scaling": "rslora"}),
        ("q:init=normal:0.02", {"init": "normal:0.02"}),
    ],
)
def test_settings(pattern: str, settings: dict[str, object]) -> None:
    assert parse_pattern(pattern).settings == settings


@pytest.mark.parametrize(
    ("pattern", "accepted"),
    [
        ("", "a"),
        ("!", "!a"),
        ("a..b", "a.b"),
        ("a{1..3", "a{1..3}"),
        ("a}b", "ab"),
        ("re:(", "re:()"),
        ("type:", "type:LSTM"),
        ("type:a b", "type:ab"),
        ("a:rnk=3", "a:rank=3"),
        ("foo:bar", "re:bar"),
        ("a b", "a_b"),
        ("a[0]", "a[0:1]"),
        ("a[1:2:3]", "a[1:2]"),
        ("a[x:y]", "a[1:2]"),
        ("!a:rank=3", "!a"),
        ("{0..10000000}", "{0..10}"),
        ("{1..999}{1..999}{1..9}", "{1..9}{1..9}"),
    ],
)
def test_what_cannot_be_read_beside_what_can(pattern: str, accepted: str) -> None:
    with pytest.raises(PatternError, match=re.escape(repr(pattern))):
        parse_pattern(pattern)
    parse_pattern(accepted)


def test_a_setting_of_the_wrong_type() -> None:
    with pytest.raises(OptionError, match="rank in 'a:rank=x'"):
        parse_pattern("a:rank=x")


segment = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=6)
dotted = st.lists(segment, min_size=1, max_size=5)


@given(dotted, st.integers(0, 4))
def test_every_end_of_a_name_matches_it(parts: list[str], start: int) -> None:
    name = ".".join(parts)
    end = ".".join(parts[start % len(parts) :])
    assert names(end, name)
    assert names(end, f"{name}.weight")
    assert not names(f"x{end}", name) or f"x{end}" in name


@given(dotted)
def test_globs_agree_with_their_meaning(parts: list[str]) -> None:
    name = ".".join(parts)
    assert names(".".join("*" for _ in parts), name)
    assert not names(".".join("*" for _ in [*parts, ""]), name)
    assert names("**", name)
    assert names(f"**.{parts[-1]}", name)
    assert names(f"{parts[0]}.**", name)


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused_in_our_words(text: str) -> None:
    try:
        parse_pattern(text)
    except (PatternError, OptionError) as error:
        assert str(error)  # noqa: PT017  both outcomes are right, a third is not
