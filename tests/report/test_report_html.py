"""The page as text; `test_report_browser.py` opens it."""

from __future__ import annotations

import importlib.util
import json
import math
import re

import matplotlib
import numpy as np
import pytest
import torch
from html_samples import HOSTILE, Page, odd_rows, row, tuned
from safetensors.torch import save_file

import lora_param as lp
from lora_param.errors import MissingPackageError, OutputError
from lora_param.report.stats import Stats


def test_it_asks_for_nothing_and_runs_nothing() -> None:
    for name in ("h.0.q", HOSTILE):
        stats = Stats((row(name), row("h.1.q", adapter=HOSTILE)), 100, (), name, (name,))
        text = stats.to_html()
        page = Page(text)
        assert {tag for tag, _ in page.tags}.isdisjoint(
            {"script", "link", "img", "iframe", "object", "image", "style:import", "base", "form"}
        )
        for tag, attributes in page.tags:
            assert not any(a.startswith("on") for a in attributes), (tag, attributes)
            assert not attributes.get("src")
            assert (attributes.get("href") or "#").startswith("#")
        (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
        assert "@import" not in style
        assert "url(" not in style
        policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "http" not in Stats((row("h.0.q"),)).to_html().replace("http-equiv", "")


def test_the_table_has_every_value_exactly() -> None:
    stats = odd_rows()
    rows = [a for a in Page(stats.to_html()).all("tr") if "data-target" in a]
    assert [a["data-target"] for a in rows] == [r.target for r in stats.rows]
    assert [a["data-state"] for a in rows] == [", ".join(r.words) for r in stats.rows]
    cells = Page(stats.to_html()).all("td")
    for attribute, field in (
        ("update-norm", "update_norm"),
        ("weight-norm", "weight_norm"),
        ("relative-norm", "ratio"),
        ("effective-rank", "effective_rank"),
    ):
        shown = [float(c[f"data-{attribute}"] or "") for c in cells if f"data-{attribute}" in c]
        np.testing.assert_equal(shown, [getattr(r, field) for r in stats.rows])


def test_states_differ_by_form_and_the_key_names_them() -> None:
    text = odd_rows().to_html()
    drawn = text.partition('<table class="map')[2].partition("</section>")[0]
    for word, times in (("still zero", 2), ("disabled", 2), ("not finite", 2)):
        assert f"</i>{word}</span>" in drawn  # in the key
        found = re.findall(rf"<td class=\"[^\"]*{word.replace(' ', '-')}", drawn)
        assert len(found) == times, word  # ‖ΔW‖ of a zero weight has no finite ratio
    assert drawn.count("<span>!</span>") == 2
    plain = Stats((row("h.0.q"), row("h.1.q")), 100).to_html()
    assert "still zero" not in plain
    assert "still-zero" not in plain.partition("<body>")[2]
    assert "7 base elements train too" in text


def test_an_adapter_alone_says_that_it_has_no_base() -> None:
    text = Stats(tuple(row(f"h.{i}.q", weight_norm=None) for i in range(3))).to_html()
    assert "Give the model as well" in text
    assert "relative-norm" not in text
    assert 'data-update-norm="5.0"' in text


def test_what_was_not_measured_is_not_drawn() -> None:
    bare = {"update_norm": None, "weight_norm": None, "effective_rank": None}
    text = Stats((row("h.0.q", **bare, singular_values=None),), 100).to_html()
    assert "were not measured" in text
    assert text.count('<table class="map') == 1
    assert "<svg" not in text
    assert "Spectra" not in text


def test_rank_one_needs_no_spectrum() -> None:
    one = {"rank": 1, "singular_values": (5.0,), "effective_rank": 1.0}
    assert "<svg" not in Stats((row("h.0.q", **one), row("h.1.q", **one)), 100).to_html()


def test_the_strongest_spectra_are_shown_of_too_many() -> None:
    rows = tuple(row(f"part{i}.q", singular_values=(1.0 + i, 0.5)) for i in range(30))
    text = Stats(rows, 100).to_html()
    assert "the 24 strongest of 30" in text
    assert text.count("<figure>") == 24
    assert "updates of part29." in text
    assert "updates of part5." not in text


def test_adapters_have_drawings_of_their_own() -> None:
    text = Stats((row("h.0.q", adapter="a"), row("h.0.q", adapter="b<")), 100).to_html()
    assert text.count("of adapter a<") == text.count("of adapter b&lt;<") == 3
    assert 'data-adapter="b&lt;"' in text


def test_a_base_alone_is_its_weights(tmp_path) -> None:
    path = tmp_path / "m.pt"
    torch.save({f"h.{i}.w": torch.zeros(2, 3) for i in range(4)}, path)
    text = lp.stats(path).to_html()
    assert "h.<wbr>{0.<wbr>.<wbr>3}.<wbr>w" in text
    assert "4 weights of the base, 24 elements" in text
    assert "<svg" not in text


def test_nothing_at_all() -> None:
    assert "no targets: nothing is adapted" in Stats().to_html()


@pytest.mark.parametrize("name", ["$x_1$ \\frac", "字.重み", "_hidden", "a b.\x1b[1m", "\ud800.q"])
def test_any_name_can_be_drawn(name: str, tmp_path) -> None:
    Stats((row(name), row("h.1.q")), 100, (), name).write_html(tmp_path / "page.html")
    Page((tmp_path / "page.html").read_text("utf-8"))


@pytest.mark.parametrize("least", [5e-324, 1e-30, 1.0, 1e300])
@pytest.mark.parametrize("base", [0.0, 1e-310, 1.0, math.nan, math.inf])
def test_any_number_can_be_drawn(least: float, base: float) -> None:
    sizes = (least, 1.7e308, least)
    rows = [
        row(f"h.{i}.q", update_norm=s, weight_norm=base, singular_values=(s, s / 2, 0.0))
        for i, s in enumerate(sizes)
    ]
    for some in (rows, rows[:1], rows[1:2], rows[::2]):
        Page(Stats(tuple(some), 100).to_html())


def test_equal_stats_give_equal_pages_and_leave_matplotlib_as_it_was() -> None:
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 40, "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        first = odd_rows().to_html()
        assert dict(matplotlib.rcParams) == before
    assert first == odd_rows().to_html()


def test_a_large_adapter_can_be_mailed() -> None:
    values = tuple(1.1**-k for k in range(16))
    rows = tuple(
        row(f"model.layers.{i}.self_attn.{p}_proj.weight", rank=16, singular_values=values)
        for i in range(80)
        for p in ("q", "k", "v", "o", "gate", "up", "down")
    )
    assert len(Stats(rows, 7 * 10**10).to_html()) < 2_000_000


def test_singular_values(tmp_path) -> None:
    weights = {"h.0.q.weight": torch.randn(12, 10), "e.up": torch.randn(3, 6, 5)}
    stats = tuned(weights, ["q", "e.up[*]"], tmp_path, rank=4)
    for r in stats.rows:
        assert r.singular_values is not None
        assert len(r.singular_values) == 4
        assert math.hypot(*r.singular_values) == pytest.approx(r.update_norm)
    plain, asked = (json.dumps(stats.to_dict(singular_values=s)) for s in (False, True))
    assert '"singular_values"' not in plain
    assert asked.count('"singular_values"') == 2
    assert row("a", singular_values=(math.nan,)).to_dict(singular_values=True)[
        "singular_values"
    ] is None  # fmt: skip


def test_writing(tmp_path) -> None:
    stats, path = Stats((row("h.0.q"),), 100), tmp_path / "page.html"
    stats.write_html(path)
    assert path.read_text("utf-8") == stats.to_html()
    with pytest.raises(OutputError, match="force"):
        stats.write_html(path)
    Stats().write_html(path, force=True)
    assert path.read_text("utf-8") == Stats().to_html()
    (tmp_path / "model.pt").write_bytes(b"precious")
    with pytest.raises(OutputError, match="not an HTML page"):
        stats.write_html(tmp_path / "model.pt", force=True)
    assert (tmp_path / "model.pt").read_bytes() == b"precious"
    with pytest.raises(OutputError, match="does not exist"):
        stats.write_html(tmp_path / "missing" / "page.html")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt", "page.html"]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    for call in (Stats().to_html, lambda: Stats().write_html(tmp_path / "page.html")):
        with pytest.raises(MissingPackageError, match=r"pip install 'lora_param\[report\]'"):
            call()


def test_the_title_is_the_name_of_the_base_and_the_path_stands_below(tmp_path) -> None:
    (tmp_path / "minilm").mkdir()
    path, adapter = tmp_path / "minilm" / "model.safetensors", tmp_path / "a.safetensors"
    save_file({"h.0.q.weight": torch.randn(8, 8)}, path)
    lp.apply_checkpoint(path, ["q"], adapter, rank=2)
    tagless = re.sub("<wbr>", "", lp.stats(path, adapter).to_html())
    assert "<title>minilm/model.safetensors – LoRA report</title>" in tagless
    assert "<h1>minilm/model.safetensors</h1>" in tagless
    assert f"<p class=path>{path} with {adapter}</p>" in tagless
    other = path.rename(tmp_path / "bert.safetensors")
    assert lp.stats(other).name == "bert.safetensors"
    assert lp.stats(adapter).name == "a.safetensors"
    model = lp.stats(lp.apply(torch.nn.Linear(4, 4), rank=1))
    assert (model.name, "class=path" in model.to_html()) == ("Linear", False)


def cells(text: str) -> dict[str, list[str]]:
    """What is written in the heat maps, by the identifier of the table's line."""
    found: dict[str, list[str]] = {}
    for url, value in re.findall(
        r'<a href="#(t\d+)" title="[^"]*" tabindex=-1><span>(.*?)</', text
    ):
        found.setdefault(url, []).append(value)
    return found


def columns(text: str, name: str) -> list[str]:
    return re.findall(rf'<td data-{name}="[^"]*">(.*?)</td>', text)


def test_numbers_have_equal_decimals_and_the_map_agrees_with_the_table(tmp_path) -> None:
    weights = {f"h.{i}.{p}.weight": torch.randn(24, 24) for i in range(6) for p in "qkv"}
    text = tuned(weights, ["q", "k", "v"], tmp_path, rank=8).to_html()
    written = {n: columns(text, n) for n in ("relative-norm", "effective-rank", "update-norm")}
    for values in written.values():
        assert len(values) == 18
        assert len({len(v.partition(".")[2]) for v in values}) == 1
        assert "0." + "0" * 9 not in values
    drawn = cells(text)
    assert len(drawn) == 18
    for i in range(18):
        assert drawn[f"t{i}"] == [written["relative-norm"][i], written["effective-rank"][i]]


def test_effective_rank_is_coloured_as_a_share_of_the_rank() -> None:
    """The same effective rank on ranks of 2, 4 and 8: the more of its rank, the darker."""
    rows = tuple(
        row(f"h.{i}.q", rank=rank, effective_rank=1.9, singular_values=(4.0, 3.0))
        for i, rank in enumerate((2, 4, 8))
    )
    text = Stats(rows, 100).to_html().rpartition('<table class="map')[2]
    steps = [int(s) for s in re.findall(r'<td class="rank(\d+)', text)]
    assert steps == [15, 7, 3]  # 0.95, 0.475 and 0.2375 of the rank, in sixteenths
    assert "50 % of the rank" in text


def test_spectra_are_scaled_to_the_largest_of_each() -> None:
    """Two updates of one form and of sizes far apart lie on one line; another form does not."""
    loud, quiet, flat = (100.0, 10.0, 1.0), (1e-3, 1e-4, 1e-5), (5.0, 4.9, 4.8)
    rows = [row(f"h.{i}.q", rank=3, singular_values=s) for i, s in enumerate((loud, quiet, flat))]
    drawn = Stats(tuple(rows), 100).to_html().partition("<figure>")[2]
    lines = re.findall(r'<a href="#t\d"[^>]*><title>.*?</title><path d="([^"]*)"', drawn, re.DOTALL)
    assert len(lines) == 3
    assert lines[0] == lines[1]
    assert lines[0].split()[:3] == lines[2].split()[:3]  # all begin at 1
    assert lines[0] != lines[2]
