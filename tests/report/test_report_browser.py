"""The page in a real browser: what it shows is what `stats` says."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from assets import MINILM, find_asset
from browser import Browser, browser
from html_samples import fill, odd_rows, row, tuned
from matplotlib.image import imread

import lora_param as lp
from lora_param.report.page.grid import lay_out
from lora_param.report.stats import Stats

FIELDS = {
    "updateNorm": "update_norm",
    "weightNorm": "weight_norm",
    "relativeNorm": "ratio",
    "effectiveRank": "effective_rank",
}
ROWS = """
return [...document.querySelectorAll("tr[data-target]")].map(row => ({
    id: row.id, ...row.dataset,
    cells: Object.assign({}, ...[...row.cells].map(cell => ({...cell.dataset}))),
    text: row.innerText,
}))
"""
CELLS = """
return [...document.querySelectorAll("table.map")].map(map =>
    Object.fromEntries([...map.querySelectorAll("td a")].map(link => {
        const box = link.getBoundingClientRect()
        return [link.getAttribute("href").slice(1), {
            fill: getComputedStyle(link.parentElement).backgroundColor, title: link.title,
            text: link.innerText, x: box.x + box.width / 2, y: box.y + box.height / 2,
        }]
    })))
"""
LABELS = """
return [...document.querySelectorAll("table.map")].map(map =>
    [...map.querySelectorAll("th span")].map(text => {
        const box = text.getBoundingClientRect()
        return {text: text.innerText, x: box.x + box.width / 2, y: box.y + box.height / 2}
    }))
"""
SCROLLED = """
return [...document.querySelectorAll(".wide")].filter(wide => wide.checkVisibility()).map(wide => {
    const line = wide.querySelector("tbody tr"), label = line.firstElementChild
    const before = label.getBoundingClientRect(), bar = wide.offsetHeight - wide.clientHeight
    wide.scrollLeft = 1e6
    const after = label.getBoundingClientRect(), last = line.lastElementChild
    return {
        name: wide.getAttribute("aria-label"), inside: wide.clientWidth, all: wide.scrollWidth, bar,
        before: before.left, after: after.left, width: after.width,
        reached: last.getBoundingClientRect().right - wide.getBoundingClientRect().right,
    }
})
"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def shown(tab: Browser, tmp_path: Path):
    def show(stats: Stats, **emulated: object) -> Browser:
        path = tmp_path / "page.html"
        stats.write_html(path, force=True)
        tab.emulate(**emulated)  # type: ignore[arg-type]
        tab.open(path)
        return tab

    return show


@pytest.fixture(scope="module")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Stats:
    """Twelve layers of three projections, and a head."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        f"h.{i}.attn.{p}.weight": torch.randn(12, 16, generator=generator)
        for i in range(12)
        for p in ("q", "k", "v")
    }
    weights["head.weight"] = torch.randn(20, 16, generator=generator)
    return tuned(weights, ["q", "k", "v", "head"], tmp_path_factory.mktemp("layered"), rank=4)


def luminance(colour: str) -> float:
    red, green, blue = (int(c) for c in re.findall(r"\d+", colour)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def check_table(tab: Browser, stats: Stats) -> dict[str, str]:
    """The table's values are those of `to_dict`; returns target → the identifier of its line."""
    found = {row["target"]: row for row in tab.run(ROWS)}
    data = stats.to_dict()["rows"]
    assert isinstance(data, list)
    assert set(found) == {r["target"] for r in data}
    for r in data:
        row = found[r["target"]]
        for name, field in FIELDS.items():
            assert (float(row["cells"][name]) if row["cells"][name] else None) == r[field]
        assert (int(row["cells"]["rank"]), int(row["cells"]["trainable"])) == (
            r["rank"],
            r["trainable"],
        )
        assert ("disabled" in row["text"]) is not r["enabled"]
        assert ("still zero" in row["text"]) is r["dead"]
    total = tab.run("return {...document.querySelector('.tiles').dataset}")
    assert (int(total["trainable"]), int(total["base"])) == (stats.trainable, stats.base)
    assert float(total["percent"]) == stats.percent
    return {target: row["id"] for target, row in found.items()}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_heat_maps_show_the_numbers(scheme, shown, layered: Stats) -> None:
    tab = shown(layered, scheme=scheme)
    names = check_table(tab, layered)
    cells, labels = tab.run(CELLS), tab.run(LABELS)
    assert len(cells) == len(labels) == 2
    grid = lay_out(layered.rows, lambda r: r.target)
    for drawn, texts, field in zip(cells, labels, ("ratio", "effective_rank"), strict=True):
        assert set(drawn) == set(names.values())
        for (i, j), r in grid.cells.items():
            cell = drawn[names[r.target]]
            assert cell["title"].splitlines()[0] == r.target
            assert f"{r.ratio:.4f}" in cell["title"]
            assert cell["text"] == f"{getattr(r, field):.{4 if field == 'ratio' else 2}f}"
            # beside its projection and below its layer
            assert any(
                t["text"] == grid.labels[i] and abs(t["y"] - cell["y"]) < 4 and t["x"] < cell["x"]
                for t in texts
            )
            assert any(
                t["text"] == grid.headings[j] and abs(t["x"] - cell["x"]) < 4 and t["y"] < cell["y"]
                for t in texts
            )
        ranked = sorted(layered.rows, key=lambda r: getattr(r, field))
        seen = [luminance(drawn[names[r.target]]["fill"]) for r in ranked]
        steps = np.diff(seen if scheme == "dark" else seen[::-1])
        assert (steps >= 0).all()
        assert len(set(seen)) > (8 if field == "ratio" else 6)  # shares of the rank: from 0 to 1


def test_light_dark_and_narrow(shown, layered: Stats) -> None:
    for scheme, bright in (("light", True), ("dark", False)):
        for width in (1100, 400):
            tab = shown(layered, scheme=scheme, width=width)
            wide = tab.run("return document.documentElement.scrollWidth")
            assert width - 20 < wide <= width  # less a scroll bar
            picture = imread(io.BytesIO(tab.screenshot()))
            assert picture.shape[1] == wide
            assert (picture[:12, :12, :3].mean() > 0.9) is np.bool_(bright)
            ink = tab.run("return getComputedStyle(document.querySelector('h1')).color")
            assert (luminance(ink) < 128) is bright
            # labels are whole: nothing begins or ends outside its drawing
            boxes = tab.run(
                "return [...document.querySelectorAll('svg')].map(s => [s, ...s.querySelectorAll("
                "'text')].map(e => { const b = e.getBoundingClientRect(); return [b.left, b.right]"
                "}))"
            )
            for (left, right), *texts in boxes:
                assert all(left - 1 <= a and b <= right + 1 for a, b in texts)


@pytest.mark.parametrize("layers", [12, 80])
def test_maps_and_tables_scroll_at_400_pixels_with_their_labels_in_sight(layers, shown) -> None:
    rows = tuple(
        row(f"encoder.layer.{i}.attention.self.{p}.weight")
        for i in range(layers)
        for p in ("query", "key", "value")
    )
    tab = shown(Stats(rows, 10**6, (), "m"), width=400)
    found = tab.run(SCROLLED)
    names = [f["name"] for f in found]
    assert names == ["‖ΔW‖/‖W‖", "effective rank", "Targets"]
    for f in found:
        assert f["all"] > f["inside"] + 40, f  # there is something to scroll to
        assert f["bar"] >= 6, f  # and a bar that says so
        assert abs(f["after"] - f["before"]) < 1, f  # the labels stay
        assert 120 <= f["width"] <= 400 / 3 + 1, f
        assert abs(f["reached"]) < 2, f
    assert tab.run("return document.documentElement.scrollWidth") <= 400
    wide = shown(Stats(rows, 10**6, (), "m"), width=1100).run(SCROLLED)
    assert all(f["all"] == f["inside"] for f in wide)


def test_nothing_is_asked_for(shown, layered: Stats) -> None:
    tab = shown(layered)
    assert tab.run("return performance.getEntriesByType('resource').length") == 0
    assert tab.run("return document.styleSheets.length") == 1
    assert tab.run("return document.images.length + document.scripts.length") == 0
    assert tab.log() == []


def test_it_prints_light(shown, layered: Stats) -> None:
    tab = shown(layered, scheme="dark")
    document = tab.print()
    assert document.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type\s*/Page\b", document)) >= 2


def test_a_cell_leads_to_its_line(shown, layered: Stats) -> None:
    tab = shown(layered)
    tab.run("location.hash = document.querySelector('.map a').getAttribute('href')")
    found = tab.run("return document.querySelector('tr:target').dataset.target")
    assert found in {r.target for r in layered.rows}


def test_every_state(shown) -> None:
    tab = shown(odd_rows())
    states = [row["state"] for row in tab.run(ROWS)]
    assert states == ["", "still zero", "disabled", "disabled, still zero", "not finite", ""]
    drawn, _ = tab.run(CELLS)
    hollow = {key for key, cell in drawn.items() if cell["fill"] == "rgba(0, 0, 0, 0)"}
    assert hollow == {"t1", "t3", "t4", "t5"}  # zero, zero, not finite, and ‖W‖ = 0


@pytest.mark.assets
def test_a_real_model(tmp_path: Path, shown) -> None:
    model, adapter = find_asset(*MINILM), tmp_path / "a.safetensors"
    lp.apply_checkpoint(model, ["query", "value"], adapter, rank=8, seed=0)
    fill(adapter, leave=("encoder.layer.3.attention.self.query.weight",))
    lp.disable(adapter, targets=["encoder.layer.1.attention.self.value"])
    stats = lp.stats(model, adapter)
    tab = shown(stats)
    assert len(check_table(tab, stats)) == 12
    remarks = tab.run("return document.querySelector('.remarks').innerText")
    assert "1 of 12 targets still zero" in remarks
    assert "1 of 12 targets disabled" in remarks
    spectra = dict(
        tab.run(
            "return [...document.querySelectorAll('[data-spectrum-of]')].map(row => "
            "[row.dataset.spectrumOf, row.cells[1].textContent.split(' ').map(Number)])"
        )
    )
    for r in stats.rows:
        assert spectra[r.target] == pytest.approx(r.singular_values, rel=1e-3)
        assert math.hypot(*spectra[r.target]) == pytest.approx(r.update_norm, rel=1e-3)
    panels = tab.run("return [...document.querySelectorAll('figure')].map(f => f.innerText)")
    assert [panel.split()[-1] for panel in panels] == ["query", "value"]
    lines = (
        "return [...document.querySelectorAll('figure')].map(f => f.querySelectorAll('a').length)"
    )
    assert tab.run(lines) == [5, 6]  # one has no update
