import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from lora_param.checkpoint.baked import BakeReport
from lora_param.checkpoint.measures import BakedTarget
from lora_param.report import figures
from lora_param.report.stats import Stats, TargetRow, WeightRow
from lora_param.report.terminal import bake_view, plain_text, plan_view, stats_view
from lora_param.targets.plan import Settings, make_plan

WIDTHS = [40, 60, 80, 120]
SHAPES = {
    "embeddings.word_embeddings.weight": (30522, 384),
    **{
        f"encoder.layer.{i}.attention.self.{p}.{kind}": shape
        for i in range(6)
        for p in ("query", "key", "value")
        for kind, shape in (("weight", (384, 384)), ("bias", (384,)))
    },
    "pooler.dense.weight": (384, 384),
}


def row(target="fc.weight", **changes):
    values = {
        "shape": (384, 384),
        "dtype": "float32",
        "adapter": "default",
        "rank": 8,
        "alpha": 16.0,
        "scale": 2.0,
        "enabled": True,
        "trainable": 6144,
        "dead": False,
        "update_norm": 1.0,
        "weight_norm": 16.0,
        "effective_rank": 3.5,
    }
    return TargetRow(target, **{**values, **changes})


def layers(count=6, **changes):
    return [row(f"encoder.layer.{i}.attention.self.query.weight", **changes) for i in range(count)]


def minilm():
    weights = tuple(
        WeightRow(n, s, "float32", math.prod(s), (n,) if "query.weight" in n else ())
        for n, s in SHAPES.items()
    )
    return Stats(tuple(layers()), sum(w.elements for w in weights), weights, "model")


def baked(target="h.0.weight", **changes):
    values = {
        "adapter": "default", "changed": 147_450, "total": 147_456, "rounding_loss": 1e-4,
        "relative_norm": 0.01, "dead": False,
    }  # fmt: skip
    return BakedTarget(target, **{**values, **changes})


def bake(**changes):
    rows = tuple(
        baked(f"h.{i}.weight", changed=0 if i == 3 else 147_450 + i,
              rounding_loss=1e-4 * (i + 1), relative_norm=0.01 * (i + 1))
        for i in range(4)
    )  # fmt: skip
    values = {
        "rows": rows, "disabled": ("x.weight",), "dead": (), "files": ("a", "b"),
        "bytes": 91_000_000, "verified": True, "notes": ("A note.",),
    }  # fmt: skip
    return BakeReport(Path("out/model"), **{**values, **changes})


def views():
    plan = make_plan(SHAPES, ["all-linear", "query:rank=4"], exclude="key", settings=Settings(8))
    return [stats_view(minilm()), plan_view(plan), bake_view(bake())]


def test_totals():
    stats = Stats((row(), row("b", dead=True), row("c", enabled=False)), base=1_000_000, unfrozen=5)
    assert (stats.trainable, stats.total) == (18_432, 1_018_432)
    assert stats.percent == pytest.approx(1.8432)
    assert [r.target for r in stats.dead] == ["b"]
    assert [r.target for r in stats.disabled] == ["c"]
    assert Stats().percent == 0


def test_a_long_source_breaks_without_trailing_blanks():
    stats = Stats((row(),), 10**7, source="a/long/path/to/base.safetensors with " * 3)
    file = io.StringIO()
    Console(file=file, width=60).print(stats)
    assert all(line == line.rstrip() for line in file.getvalue().splitlines())
    assert str(stats)


def test_colour_marks_and_words_stay():
    rows = (row("a"), row("b", enabled=False))
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system="standard")
    console.print(Stats(rows, 10**7))
    assert "\x1b[33mdisabled\x1b[0m" in file.getvalue()


def test_as_data_it_is_json_without_nan():
    data = Stats((row(update_norm=math.nan),), base=10).to_dict()
    found = json.loads(json.dumps(data, allow_nan=False))["rows"][0]
    assert (found["update_norm"], found["ratio"], found["finite"]) == (None, None, False)
    assert found["shape"] == [384, 384]


def test_ratio():
    assert row().ratio == 1 / 16
    assert row(update_norm=None).ratio is None
    assert row(weight_norm=0.0).ratio == math.inf
    assert row(weight_norm=0.0, update_norm=0.0).ratio == 0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("index", range(3))
def test_nothing_is_wider_than_asked_and_no_blanks_trail(width, index):
    file = io.StringIO()
    Console(file=file, width=width).print(views()[index])
    for line in file.getvalue().splitlines():
        assert len(line) <= width
        assert line == line.rstrip()
        assert "\x1b" not in line


def test_stats_say_what_is_trainable_and_collapse_layers():
    text = plain_text(stats_view(minilm()), 80)
    assert "trainable 36,864 of 14,529,024 (0.25 %)" in text
    assert "encoder.layer.{0..5}.attention.self.query.weight ×6\n" in text
    wide = plain_text(stats_view(minilm()), 100)
    assert "encoder.layer.{0..5}.attention.self.query.weight ×6  384×384     36,864" in wide
    assert "6 targets · adapter default · rank 8 · alpha 16 · scale 2 · float32" in text
    assert "word_embeddings.weight" in text
    assert text.count("LoRA") == 1


def test_figures_stand_below_each_other():
    rows = (row("a", trainable=1_234_567), row("bcd.e", trainable=12))
    lines = plain_text(stats_view(Stats(rows, 10**8)), 80).splitlines()
    ends = [line.index(n) + len(n) for n, line in zip(("1,234,567", "12"), lines[-2:], strict=True)]
    assert ends[0] == ends[1]


def test_out_of_the_ordinary_is_said_in_words():
    rows = [*layers(2), row("off.weight", enabled=False), row("zero.weight", dead=True)]
    rows.append(row("bad.weight", update_norm=math.nan))
    lines = plain_text(stats_view(Stats(tuple(rows), 10**7)), 100).splitlines()
    said = {name: line for line in lines for name in ("off", "zero", "bad") if f"{name}.w" in line}
    assert said["off"].endswith("disabled")
    assert said["zero"].endswith("still zero")
    assert said["bad"].endswith("not finite")
    assert "1 of 5 targets still zero: ΔW = 0" in lines
    assert "1 of 5 targets disabled: the base alone" in lines
    assert "1 of 5 targets not finite: NaN or infinity" in lines


def test_ranges_of_what_was_measured():
    rows = [row(f"h.{i}.w", update_norm=1.0 + i) for i in range(3)]
    text = plain_text(stats_view(Stats(tuple(rows), 10**7)), 100)
    assert "1–3" in text
    assert "0.062–0.188" in text


def test_an_adapter_alone_has_no_share():
    text = str(Stats(tuple(layers(weight_norm=None)), source="a.safetensors"))
    assert "trainable 36,864\n" in text
    assert "%" not in text
    assert "0 weights" in str(Stats())


def test_plan_says_counts_cost_and_what_is_left_out():
    text = plain_text(views()[1], 100)
    assert "trainable 61,440 of 14,529,024 (0.42 %), 240.0 KiB in fp32" in text
    assert "an embedding, by its name" in text
    counts = [line.split() for line in text.splitlines()]
    assert ["all-linear", "19", "1", "left", "out"] in counts
    assert ["query:rank=4", "6"] in counts
    assert ["!key", "6", "taken", "away"] in counts


def test_bake_says_what_changed_and_what_was_lost():
    text = plain_text(bake_view(bake()), 100)
    assert "baked 4 of 5 targets, 442,353 elements changed" in text
    assert "out/model · 86.8 MiB · 2 files · verified" in text
    assert "0.0100–0.0300" in text
    assert "≤ 0.000300" in text
    assert text.count("lost in rounding") == 1
    assert "disabled: the base alone" in text
    assert text.endswith("A note.")
    nothing = bake(rows=(), disabled=(), notes=(), verified=False, files=("model",))
    assert str(nothing) == "out/model · 86.8 MiB\nbaked 0 of 0 targets"


def test_a_bake_report_prints_itself():
    assert str(bake()) == plain_text(bake_view(bake()))
    assert repr(bake()) == "<BakeReport: 4 of 5 targets, 'out/model'>"
    file = io.StringIO()
    Console(file=file, width=80).print(bake())
    assert file.getvalue() == plain_text(bake_view(bake()), 80) + "\n"


def test_reprs_are_short():
    plan = make_plan(SHAPES, ["query"])
    assert repr(plan) == "<Plan: 6 targets, trainable 36,864 of 14,529,024 (0.25 %)>"
    assert repr(Settings()) == "Settings(rank=8, alpha=16.0)"
    assert repr(Settings(4, init="pissa")) == "Settings(rank=4, alpha=16.0, init='pissa')"
    stats = Stats((row(), row("b", dead=True), row("c", enabled=False)), base=1_000_000)
    told = "3 targets, trainable 18,432 of 1,000,000 (1.84 %), 1 still zero, 1 disabled"
    assert repr(stats) == f"<Stats: {told}>"
    assert repr(Stats((row(),))) == "<Stats: 1 target, trainable 6,144>"


def test_output_that_takes_only_ascii_gets_ascii():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=file, width=80).print(*views())
    file.flush()
    assert b"384x384" in raw.getvalue()


def test_where_columns_have_no_room_each_figure_stands_after_its_header():
    varying = [
        row(f"encoder.layer.{i}.attention.self.query.weight", update_norm=1 + i) for i in range(6)
    ]
    rows = (*varying, row("encoder.layer.9.attention.self.query.weight", dead=True))
    stats = stats_view(Stats(rows, 10**7))
    lines = plain_text(stats, 36).splitlines()
    assert max(map(len, lines)) <= 36
    joined = "".join(line.strip("│├└─ ") for line in lines).replace(" ", "")
    for told in (
        "encoder.layer",
        "{0..5}.attention.self.query.weight ×6",
        "shape 384×384",
        "trainable 36,864",
        "‖ΔW‖ 1–6",
        "‖ΔW‖/‖W‖ 0.062–0.375",
        "eff. rank 3.50",
        "9.attention.self.query.weight still zero",
    ):
        assert told.replace(" ", "") in joined
    plan = plain_text(plan_view(make_plan(SHAPES, ["query"])), 20)
    assert "shape 384×384" in plan
    assert "trainable 36,864" in plan


def test_an_adapter_alone_keeps_the_size_of_its_updates():
    name = "model.layers.0.self_attn.a_rather_long_name_of_a_projection.weight"
    text = plain_text(stats_view(Stats((row(name, weight_norm=None),))), 100)
    assert "‖ΔW‖" in text
    assert "eff. rank" not in text


def test_a_name_wider_than_the_terminal_loses_nothing():
    name = "a" * 90
    lines = plain_text(stats_view(Stats((row(name),), 10**7)), 60).splitlines()
    assert "a" * 90 in "".join(line.strip() for line in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0.00 %"), (0.0051, "0.01 %"), (0.0049, "0.0049 %"), (3e-7, "0.00000030 %")],
)
def test_a_share_is_never_rounded_to_nothing(value, text):
    assert figures.percent(value) == text


def test_rows_need_neither_torch_nor_rich_nor_numpy():
    code = (
        "import sys, lora_param.report.stats, lora_param.report.figures\n"
        "print(sorted({'torch', 'rich', 'numpy'} & {m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
