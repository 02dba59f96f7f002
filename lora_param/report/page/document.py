"""`Stats` as one page that needs nothing else: no script, no network, no fonts of its own.

The templates beside this file say how it looks, this file what is on it. All that is drawn stands
in tables as well, norms and ranks at full precision in `data-` attributes. Light and dark mode are
the reader's, paper is always light.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lora_param.report import figures
from lora_param.report.collapse import collapse
from lora_param.report.layout import remarks, split_common
from lora_param.report.page.grid import Grid, in_reading_order, lay_out
from lora_param.report.page.maps import Cell, Measure, heat_map, wide_columns
from lora_param.report.page.rendering import render
from lora_param.report.stats import Stats, TargetRow, WeightRow

__all__ = ["page"]

_PANELS = 24  # of spectra; more would hide one another
_FIELDS = (
    ("ratio", "‖ΔW‖/‖W‖"),
    ("effective_rank", "eff. rank"),
    ("update_norm", "‖ΔW‖"),
    ("weight_norm", "‖W‖"),
    ("scale", "scale"),
)

Write = dict[str, figures.Write]


def page(stats: Stats) -> str:
    """What is in a model, an adapter, or both, as an HTML document.

    Raises:
        MissingPackageError: Matplotlib or Jinja2 is not installed.
    """
    rows = in_reading_order(stats.rows, lambda r: r.target, lambda r: r.adapter)
    measured = [*dict(_FIELDS), "rank"]
    write = {f: figures.aligned(getattr(r, f) for r in rows) for f in measured}
    return render(
        "page.html",
        stats=stats,
        name=stats.name or stats.source or "LoRA",
        tiles=list(_tiles(stats, write)) if rows or not stats.weights else [],
        common=_common(rows),
        remarks=remarks(stats),
        rows=rows,
        several=len({r.adapter for r in rows}) > 1,
        fields=[(f, n) for f, n in _FIELDS if any(getattr(r, f) is not None for r in rows)],
        write=write,
        adapters=_drawings(rows, write),
        weights=collapse(
            stats.weights, lambda w: w.name, lambda w: (w.shape, w.dtype, w.quantized, _adapted(w))
        ),
        adapted=_adapted,
    )


# --- above the drawings -----------------------------------------------------------------------


def _tiles(stats: Stats, write: Write) -> Iterator[tuple[str, str, str]]:
    """Name, value and a remark: the trainable share, and ranges over all targets."""
    if stats.base:
        share = f"{figures.count(stats.trainable)} of {figures.count(stats.base)} elements"
        yield "trainable", figures.percent(stats.percent), share
    else:
        yield "trainable", figures.count(stats.trainable), "elements"
    names = {r.adapter for r in stats.rows}
    adapters = f"of {figures.plural(len(names), 'adapter')}" if len(names) > 1 else ""
    yield "targets", figures.count(len(stats.rows)), adapters
    size = "ratio" if any(r.ratio is not None for r in stats.rows) else "update_norm"
    for name, field in (dict(_FIELDS)[size], size), ("effective rank", "effective_rank"):
        known = [v for r in stats.rows if (v := getattr(r, field)) is not None]
        usual = [v for v in known if math.isfinite(v) and v > 0]
        if usual:
            text = figures.span(usual, write=write[field])
            without = ["zero"] if 0 in known else []
            without += ["NaN"] if any(map(math.isnan, known)) else []
            without += ["infinity"] if any(map(math.isinf, known)) else []
            about = ["range"] if "–" in text else []
            about += [f"without {' or '.join(without)}"] if without else []
            yield name, text, " ".join(about)


def _common(rows: Sequence[TargetRow]) -> str:
    """What all targets have in common."""
    shared, _ = split_common(
        rows,
        [
            ("variant", lambda r: "" if r.variant == "lora" else r.variant),
            ("rank", lambda r: str(r.rank)),
            ("alpha", lambda r: f"{r.alpha:g}"),
            ("scale", lambda r: f"{r.scale:g}"),
            ("dtype", lambda r: r.dtype),
        ],
    )
    return " · ".join(shared)


def _adapted(weight: WeightRow) -> str:
    parts = len(weight.adapted)
    return "" if not parts else "LoRA" if parts == 1 else f"LoRA ×{parts}"


# --- drawings ---------------------------------------------------------------------------------


Value = Callable[[TargetRow], float | None]


def _share_of_rank(row: TargetRow) -> float | None:
    return None if row.effective_rank is None else min(row.effective_rank / row.rank, 1.0)


def _measures(rows: Sequence[TargetRow]) -> Iterator[tuple[Measure, str, Value]]:
    """What is shown, the field that is written, and by what of a target it is coloured."""
    strong = "How strong the updates are"
    if any(r.ratio is not None for r in rows):
        about = "Size of each update beside the weight that it is added to (Frobenius norms)."
        yield Measure(strong, "‖ΔW‖/‖W‖", about), "ratio", lambda r: r.ratio
    elif any(r.update_norm is not None for r in rows):
        about = (
            "Size of each update (Frobenius norm). Give the model as well to see it beside ‖W‖, "
            "the size of the weight that it is added to."
        )
        yield Measure(strong, "‖ΔW‖", about), "update_norm", lambda r: r.update_norm
    else:
        about = "The updates were not measured: shown is the rank that each target was given."
        yield Measure("What is adapted", "rank", about), "rank", lambda r: float(r.rank)
    if any(r.effective_rank is not None and r.rank > 1 for r in rows):
        about = (
            "How many directions carry each update (exp of the entropy of its singular values), "
            "coloured as a share of the rank that it was given."
        )
        ticks = ("0 %", "50 % of the rank", "100 %")
        measure = Measure("How many directions they use", "effective rank", about, "rank", ticks)
        yield measure, "effective_rank", _share_of_rank


def _drawings(rows: Sequence[TargetRow], write: Write) -> Iterator[dict[str, Any]]:
    """Heat maps and spectra, adapter by adapter."""
    links = {(r.adapter, r.target): f"#t{i}" for i, r in enumerate(rows)}
    adapters = list(dict.fromkeys(r.adapter for r in rows))
    for adapter in adapters:
        own = [r for r in rows if r.adapter == adapter]
        here = {r.target: links[adapter, r.target] for r in own}
        said = {here[r.target]: _said(r, write) for r in own}
        grid = lay_out(own, lambda r: r.target)
        yield {
            "suffix": f" of adapter {adapter}" if len(adapters) > 1 else "",
            "grid": grid,
            **wide_columns(len(grid.columns)),
            "maps": [_map(*m, grid, here, said, write) for m in _measures(own)],
            "spectra": _spectra(grid, here, said),
        }


def _said(row: TargetRow, write: Write) -> str:
    """All there is to say of a target, for where the pointer rests on it."""
    lines = [row.target, f"{figures.shape(row.shape)}, rank {row.rank}, scale {row.scale:g}"]
    values = [(n, f, getattr(row, f)) for f, n in _FIELDS[:3]]
    lines += [f"{name} {write[field](v)}" for name, field, v in values if v is not None]
    return "\n".join([*lines, *row.words])


def _map(
    measure: Measure,
    field: str,
    value: Value,
    grid: Grid[TargetRow],
    links: dict[str, str],
    said: dict[str, str],
    write: Write,
) -> dict[str, Any]:
    cells = {
        at: Cell(
            url := links[row.target],
            said[url],
            value(row),
            write[field](getattr(row, field)),
            frozenset(w for w in row.words if w != "not finite"),
        )
        for at, row in grid.cells.items()
    }
    return heat_map(measure, cells, write[field])


def _spectra(
    grid: Grid[TargetRow], links: dict[str, str], said: dict[str, str]
) -> dict[str, Any] | None:
    """A panel for each row of the grid, strongest first where there are too many."""
    from lora_param.report.page.drawing import spectrum, spectrum_floor

    lines: dict[int, list[TargetRow]] = {}
    for (row, _), target in sorted(grid.cells.items()):
        values = target.singular_values
        if values and all(math.isfinite(v) for v in values) and values[0] > 0:
            lines.setdefault(row, []).append(target)
    spectra = [t.singular_values or () for of in lines.values() for t in of]
    if all(len(s) < 2 for s in spectra):
        return None  # a single value is the norm, which is shown already
    greatest = {row: max(max(t.singular_values or (0,)) for t in of) for row, of in lines.items()}
    shown = sorted(sorted(lines, key=lambda row: -greatest[row])[:_PANELS])
    return {
        "floor": (floor := spectrum_floor(spectra)),
        "layered": any(len(of) > 1 for of in lines.values()),
        "many": any(len(of) > 12 for of in lines.values()),
        "disabled": any(not t.enabled for of in lines.values() for t in of),
        "left_out": (len(shown), len(lines)) if len(shown) < len(lines) else None,
        "panels": [spectrum(grid.labels[r], lines[r], floor, links, said) for r in shown],
    }
