"""The rules between names, as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lora_param.errors import NameRuleError
from lora_param.names.resolve import Here, resolve
from lora_param.names.table import Part, default_names, names_of, parse_names, read_names


def test_the_packaged_rules_can_be_read():
    names = default_names()
    assert {"base_model", "model", "_orig_mod"} <= names.prefixes
    assert len(names.rules) > 20
    assert any(r.interleaved and r.transposed and r.only == "gpt_oss" for r in names.rules)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("*.a.weight", "it has no '='"),
        ("a.weight = *.b.weight", "is not '*.' and a name"),
        ("*.a = *.#.b | *.c", "'#' stands in all parts or in none"),
        ("*.#.a = *.#.b", "never in the whole"),
        ("*.a = *.#.b.#.c", "at most one '#'"),
        ("*.a = *.b *.c", "is no name"),
        ("*.a = *.b | *.c ; interleaved", "of equal size"),
        ("*.a = *.b ; sideways", "'sideways' is none of"),
        ("*.a = *.b ; only", "followed by a model_type"),
        ("path a.b", "it is not 'path OTHER = OWN'"),
        ("path a.#.b = c", "both sides have as many '#'"),
        ("path *.b = c", "is no row of segments"),
        ("path a b = c", "is no row of segments"),
    ],
)
def test_a_line_that_is_no_rule_is_shown_with_its_number(line, why):
    with pytest.raises(NameRuleError) as caught:
        parse_names(f"# a comment\n\n{line}\n", "my.rules")
    assert "line 3 of my.rules" in str(caught.value)
    assert why in str(caught.value)


def test_rules_of_a_user_come_first(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("prefix net\n*.qkv.weight = *.query.weight | *.key.weight | *.value.weight\n")
    names = read_names(path)
    assert names.rules[0].whole.text == "*.qkv.weight"
    assert names.canonical("module.net.a.b") == "a.b"
    assert len(names.rules) == len(default_names().rules) + 1


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(NameRuleError, match="No such file"):
        read_names(tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        ("*.w.weight", "a.b.w.weight", ("a.b", None)),
        ("*.w.weight", "w.weight", ("", None)),
        ("*.w.weight", "a.xw.weight", None),
        ("*.e.#.w", "a.e.12.w", ("a", 12)),
        ("*.e.#.w", "a.e.x.w", None),
    ],
)
def test_what_a_part_matches(text, name, found):
    part = Part(text)
    assert part.match(name) == found
    if found is not None:
        assert part.name(*found) == name


def test_the_last_segment_is_never_taken_for_a_prefix():
    assert default_names().canonical("base_model.model") == "model"


SD_NAMES = json.loads(
    (Path(__file__).parents[1] / "formats" / "tools" / "sd-names.json").read_text()
)


@pytest.mark.parametrize("model", SD_NAMES)
def test_every_alias_of_a_name_is_the_same_name(model):
    names = default_names()
    for first, own in SD_NAMES[model].items():
        assert names.canonical(own) == own
        aliases = names.aliases(own)
        assert {names.canonical(a) for a in aliases} == {own}
        assert any(a.endswith(first) for a in aliases), (first, aliases)


@pytest.mark.parametrize(
    ("tool", "theirs", "ours"),
    [
        ("torchtune", "layers.3.attn.output_proj", "layers.3.self_attn.o_proj"),
        ("torchtune", "layers.3.mlp.w2", "layers.3.mlp.down_proj"),
        ("torchtune", "output", "lm_head"),
        ("llama.cpp", "blk.11.attn_k", "layers.11.self_attn.k_proj"),
        ("llama.cpp", "blk.0.ffn_gate_inp", "layers.0.mlp.gate"),
        ("llama.cpp", "token_embd", "embed_tokens"),
    ],
)
def test_names_of_one_tool_are_known_for_its_files_alone(tool, theirs, ours):
    names = names_of(tool)
    assert names.canonical(theirs) == ours == names.canonical(f"model.{ours}")
    assert theirs in names.aliases(f"model.{ours}")
    assert default_names().canonical(theirs) == theirs


def test_a_part_of_a_pipeline_is_left_out_where_the_base_is_that_part():
    base = ["down.q.weight"]
    assert resolve(["unet.down.q.weight"], base).places["unet.down.q.weight"] == Here(base[0])
    both = ["unet.other.weight", "down.q.weight"]
    assert resolve(["unet.down.q.weight"], both).missing == ["unet.down.q.weight"]


def test_a_path_of_a_users_own(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("path stage.#.mix = blocks.#.attn  # theirs, ours\n")
    names = read_names(path)
    assert names.canonical("a.stage.12.mix.weight") == "a.blocks.12.attn.weight"
    assert names.canonical("a.stage.x.mix.weight") == "a.stage.x.mix.weight"
