from hypothesis import given
from hypothesis import strategies as st

from lora_param.report.collapse import collapse
from lora_param.targets.patterns import parse_pattern
from lora_param.targets.weights import Weight


def names(items, alike=lambda _: 0):
    return [(g.name, len(g.items)) for g in collapse(items, str, alike)]


def test_layers_and_experts():
    stack = [f"l.{i}.e.{j}.w" for i in range(3) for j in range(4)]
    assert names(stack) == [("l.{0..2}.e.{0..3}.w", 12)]
    assert names(stack[:-1]) == [("l.{0,1}.e.{0..3}.w", 8), ("l.2.e.{0..2}.w", 3)]


def test_what_differs_stays_apart():
    layers = [f"h.{i}.q" for i in range(6)]
    assert names(layers, lambda n: n == "h.2.q") == [("h.{0,1,3..5}.q", 5), ("h.2.q", 1)]
    assert names(["a.01.w", "a.02.w", "b.w"]) == [("a.01.w", 1), ("a.02.w", 1), ("b.w", 1)]
    assert names(["0.w[0:4]", "1.w[0:4]", "1.w[4:8]"]) == [("{0,1}.w[0:4]", 2), ("1.w[4:8]", 1)]
    assert names([]) == []


@given(st.sets(st.tuples(*[st.integers(0, 4)] * 3), min_size=1))
def test_a_collapsed_name_is_a_pattern_for_exactly_its_items(points):
    items = [f"a.{i}.b.{j}.{k}.w" for i, j, k in sorted(points)]
    groups = collapse(items, str, lambda _: 0)
    assert sorted(n for g in groups for n in g.items) == sorted(items)
    for group in groups:
        pattern = parse_pattern(group.name)
        matched = [n for n in items if pattern.matches(Weight(n, (2, 2)))]
        assert matched == list(group.items)
