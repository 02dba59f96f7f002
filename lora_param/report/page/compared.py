"""`Diff` as one page, drawn as the page of `Stats` is: where two adapters or checkpoints differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from lora_param.arithmetic.difference import Diff, Difference
from lora_param.report import figures
from lora_param.report.page.grid import Grid, in_reading_order, lay_out
from lora_param.report.page.maps import Cell, Measure, heat_map, wide_columns
from lora_param.report.page.rendering import render

__all__ = ["compared_page"]

_FIELDS = (
    ("norm", "‖a − b‖"),
    ("ratio", "‖a − b‖/‖b‖"),
    ("changed", "changed"),
    ("rank", "rank"),
    ("overlap", "overlap"),
)

Write = dict[str, figures.Write]


def compared_page(found: Diff) -> str:
    """What differs between two sides, as an HTML document.

    Raises:
        MissingPackageError: Matplotlib or Jinja2 is not installed.
    """
    rows = in_reading_order(found.rows, lambda r: r.name)
    write: Write = {f: figures.aligned(getattr(r, f) for r in rows) for f, _ in _FIELDS}
    write["changed"] = lambda n: "" if n is None else figures.count(int(n))
    write["rank"] = lambda n: "" if n is None else str(int(n))
    grid = lay_out(rows, lambda r: r.name)
    return render(
        "diff.html",
        found=found,
        name=f"{found.a} and {found.b}",
        noun="target" if found.kind == "adapters" else "weight",
        tiles=list(_tiles(found, write)),
        rows=rows,
        fields=[(f, n) for f, n in _FIELDS if any(getattr(r, f) is not None for r in rows)],
        write=write,
        drawn={
            "suffix": "",
            "grid": grid,
            **wide_columns(len(grid.columns)),
            "maps": list(_maps(grid, rows, write)),
        },
    )


def _tiles(found: Diff, write: Write) -> Iterator[tuple[str, str, str]]:
    """Name, value and a remark: the verdict, how many differ, and by how much."""
    question = "is it base and adapter?" if found.kind == "baked" else "the same?"
    yield question, "yes" if found.same else "no", "bit for bit" if found.same else ""
    yield "differ", figures.count(len(found.rows)), f"both have {figures.count(found.compared)}"
    ratios = [r.ratio for r in found.rows if r.ratio is not None and math.isfinite(r.ratio)]
    if ratios:
        text = figures.span(ratios, write=write["ratio"])
        yield dict(_FIELDS)["ratio"], text, "range" if "–" in text else ""
    if any(r.changed for r in found.rows):
        total = sum(r.total or 0 for r in found.rows if r.changed is not None)
        changed = sum(r.changed or 0 for r in found.rows)
        yield "changed", figures.count(changed), f"of {figures.count(total)} elements there"


def _maps(
    grid: Grid[Difference], rows: Sequence[Difference], write: Write
) -> Iterator[dict[str, Any]]:
    links = {row.name: f"#t{i}" for i, row in enumerate(rows)}

    def cells(field: str) -> dict[tuple[int, int], Cell]:
        drawn = {}
        for at, row in grid.cells.items():
            value = getattr(row, field)
            said = "\n".join([row.name, row.what, *_said(row, write)])
            if row.norm is None:
                mark = frozenset({"not comparable"})
                drawn[at] = Cell(links[row.name], said, None, "≠", mark)
            else:
                drawn[at] = Cell(links[row.name], said, value, write[field](value))
        return drawn

    same = "An empty place is the same on both sides, or on neither."
    about = f"Size of the difference beside b (Frobenius norms). {same}"
    if rows:
        measure = Measure("How far they are apart", dict(_FIELDS)["ratio"], about)
        yield heat_map(measure, cells("ratio"), write["ratio"])
    if any(r.overlap is not None for r in rows):
        about = f"How much of the smaller update's directions the other spans. {same}"
        ticks = ("0 %", "50 %", "100 %")
        measure = Measure("How alike their directions are", "overlap", about, "rank", ticks)
        yield heat_map(measure, cells("overlap"), write["overlap"])


def _said(row: Difference, write: Write) -> Iterator[str]:
    for field, name in _FIELDS:
        value = getattr(row, field)
        if value is not None:
            yield f"{name} {write[field](value)}"
