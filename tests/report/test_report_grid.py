from html_samples import row

from lora_param.report.page.grid import Place, in_reading_order, lay_out, place
from lora_param.targets.patterns import parse_pattern
from lora_param.targets.weights import Weight


def grid(*names):
    return lay_out([row(name) for name in names], lambda r: r.target)


def test_a_name_is_split_at_its_first_run_of_indices():
    assert place("encoder.layer.3.q.weight") == Place("encoder.layer.*.q.weight", (3,))
    assert place("blocks.3.12.conv.weight") == Place("blocks.*.*.conv.weight", (3, 12))
    assert place("h.2.experts.5.w1") == Place("h.*.experts.5.w1", (2,))
    assert place("0.weight") == Place("*.weight", (0,))
    assert place("pos_embed") == Place("pos_embed", ())
    assert place("h.1.in_proj_weight[0:64]") == Place("h.*.in_proj_weight[0:64]", (1,))
    assert place("h.1.experts.up[*]") == Place("h.*.experts.up[*]", (1,))


def test_a_rows_name_is_a_pattern_for_its_targets():
    names = [f"h.{i}.{p}.weight" for i in range(12) for p in "qv"]
    found = grid(*names)
    for i, name in enumerate(found.rows):
        matched = {n for n in names if parse_pattern(name).matches(Weight(n, (2, 2)))}
        assert matched == {t.target for (at, _), t in found.cells.items() if at == i}


def test_layers_and_projections():
    found = grid(*(f"m.layers.{i}.attn.{p}.weight" for i in (0, 10, 2) for p in "qv"))
    assert found.labels == ("q", "v")
    assert found.headings == ("0", "2", "10")
    assert found.axis == "m.layers"
    assert found.cells[1, 2].target == "m.layers.10.attn.v.weight"


def test_names_without_layers():
    found = grid("fc1.weight", "fc2.weight", "head.weight")
    assert (found.labels, found.columns, found.axis) == (("fc1", "fc2", "head"), ((),), "")
    assert grid("fc.weight").labels == ("fc",)
    assert grid("weight").labels == ("weight",)
    assert grid("0.weight", "2.weight").labels == ("weight",)


def test_mixed_names_keep_what_tells_them_apart():
    found = grid("enc.layer.0.q.weight", "dec.layer.0.q.weight", "pooler.weight")
    assert found.labels == ("enc.layer.q", "dec.layer.q", "pooler")
    assert found.headings == ("0", "–")
    assert found.axis == ""
    assert grid("h.0.a[0:2]", "h.0.a[2:4]").labels == ("a[0:2]", "a[2:4]")


def test_every_target_has_a_cell_of_its_own():
    names = [f"h.{i}.e.{j}.w" for i in range(3) for j in range(4)] + ["a.0.b", "a.b.0", "h.w"]
    assert sorted(t.target for t in grid(*names).cells.values()) == sorted(names)


def test_long_and_unprintable_labels():
    long = grid("a." + "x" * 200, "b." + "y" * 200)
    assert [len(label) for label in long.labels] == [34, 34]
    assert grid("a\x00\ud800\n.q", "b.q").labels[0] == "a\ufffd\ufffd\ufffd"


def test_reading_order():
    names = ["h.0.q", "h.10.q", "h.2.q", "head", "h.2.a"]
    found = [r.target for r in in_reading_order([row(n) for n in names], lambda r: r.target)]
    assert found == ["h.0.q", "h.2.q", "h.2.a", "h.10.q", "head"]
    two = [row("h.1.q", adapter="a"), row("h.0.q", adapter="a"), row("h.0.q", adapter="b")]
    assert [
        (r.adapter, r.target)
        for r in in_reading_order(two, lambda r: r.target, lambda r: r.adapter)
    ] == [
        ("a", "h.0.q"),
        ("a", "h.1.q"),
        ("b", "h.0.q"),
    ]
