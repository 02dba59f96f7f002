"""The page of a comparison, against the comparison."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from html_samples import HOSTILE, Page
from safetensors.torch import save_file

import lora_param as lp
from lora_param.arithmetic.difference import Diff, Difference
from lora_param.errors import OutputError


@pytest.fixture
def checkpoints(tmp_path: Path) -> tuple[Path, Path]:
    """Two, of three layers; tuned differs in q everywhere, in k's shape, and lacks the head."""
    g = torch.Generator().manual_seed(0)
    names = [f"h.{i}.{n}.weight" for i in range(3) for n in "qk"]
    base = {n: torch.randn(8, 6, generator=g) for n in [*names, "head.weight"]}
    tuned = {n: t + torch.ones(8, 6) if ".q" in n else t for n, t in base.items()}
    tuned["h.1.k.weight"] = torch.randn(4, 6, generator=g)
    del tuned["head.weight"]
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "tuned.safetensors", tmp_path / "base.safetensors"


def test_every_difference_is_in_the_table_at_full_precision(
    checkpoints: tuple[Path, Path],
) -> None:
    found = lp.diff(*checkpoints)
    page = Page(found.to_html())
    lines = [a["data-name"] for a in page.all("tr") if "data-name" in a]
    assert lines == [
        *("h.0.q.weight", "h.1.k.weight", "h.1.q.weight", "h.2.q.weight"), "head.weight",
    ]  # fmt: skip
    rows = {row.name: row for row in found.rows}
    for field in ("norm", "ratio", "changed", "rank"):
        written = [a[f"data-{field}"] for a in page.all("td") if f"data-{field}" in a]
        values = [getattr(rows[name], field) for name in lines]  # type: ignore[index]
        assert written == ["" if v is None else str(v) for v in values]
    (tiles,) = page.all("dl")
    assert (tiles["data-same"], tiles["data-compared"]) == ("false", "6")


def test_the_map_has_a_place_for_each_and_links_to_its_line(
    checkpoints: tuple[Path, Path],
) -> None:
    page = Page(lp.diff(*checkpoints).to_html())
    identifiers = {f"#{a['id']}" for a in page.all("tr") if "id" in a}
    assert {a["href"] for a in page.all("a")} == identifiers
    hollow = [a for a in page.all("td") if "not-comparable" in (a.get("class") or "")]
    assert len(hollow) == 2


def test_adapters_show_how_alike_their_directions_are(tmp_path: Path) -> None:
    def adapter(seed: int) -> Path:
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6))
        lp.apply(model, "all-linear", rank=2)
        g = torch.Generator().manual_seed(seed)
        for p in lp.parameters(model):
            torch.nn.init.normal_(p, generator=g)
        path = tmp_path / f"{seed}.safetensors"
        lp.save(model, path)
        return path

    text = lp.diff(adapter(1), adapter(2)).to_html()
    assert "How alike their directions are" in text
    assert len([a for a in Page(text).all("td") if a.get("data-overlap")]) == 2


def test_nothing_differs(checkpoints: tuple[Path, Path]) -> None:
    page = Page(text := lp.diff(checkpoints[0], checkpoints[0]).to_html())
    assert page.all("dl")[0]["data-same"] == "true"
    assert page.all("table") == []
    assert ">yes<" in text


def test_its_notes_are_on_it() -> None:
    assert ">read as float32<" in Diff("a", "b", "baked", (), 1, ("read as float32",)).to_html()


def test_names_of_others_are_text() -> None:
    rows = (Difference(HOSTILE, HOSTILE), Difference("a", norm=math.nan, ratio=math.inf))
    page = Page(Diff(HOSTILE, HOSTILE, "checkpoints", rows, 2).to_html())
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "iframe"})


def test_an_output_that_is_something_else_is_kept(
    checkpoints: tuple[Path, Path], tmp_path: Path
) -> None:
    found, out = lp.diff(*checkpoints), tmp_path / "page.html"
    found.write_html(out)
    assert out.read_text() == found.to_html()
    with pytest.raises(OutputError, match="exists"):
        found.write_html(out)
    found.write_html(out, force=True)
    with pytest.raises(OutputError, match="not an HTML page"):
        found.write_html(checkpoints[0], force=True)
