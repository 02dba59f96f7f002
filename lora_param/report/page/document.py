"""`Stats` as one page that needs nothing else: no script, no network, no fonts of its own.

All that is drawn stands in tables as well, norms and ranks at full precision in `data-`
attributes. Light and dark mode are the reader's, paper is always light.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from lora_param.errors import MissingPackageError, OutputError
from lora_param.files.writer import check_output
from lora_param.report import figures
from lora_param.report.layout import remarks, split_common
from lora_param.report.page.grid import Grid, in_reading_order, lay_out
from lora_param.report.page.tables import breakable, target_table, weight_table
from lora_param.report.stats import Stats, TargetRow

if TYPE_CHECKING:
    from lora_param.report.page.drawing import Measure

__all__ = ["check_page", "page"]

_DOCTYPE = "<!doctype html>"
_PANELS = 24  # of spectra; more would hide one another
_RATIO, _NORM = "‖ΔW‖/‖W‖", "‖ΔW‖"
# no request may leave the page, whatever a name in it says
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def check_page(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Find out before anything is measured whether a page can be written.

    Args:
        path: where it is to go.
        force: a page that exists may be replaced.

    Raises:
        MissingPackageError: Matplotlib is not installed.
        OutputError: there is a page (without force) or another file, or the directory is missing.
    """
    _need_matplotlib()
    real = check_output(path, force=force)
    if real.exists():  # a model's or an adapter's name, by mistake: nothing else has a copy of it
        with real.open("rb") as file:
            found = file.read(len(_DOCTYPE)).decode("latin-1")
        if found and found.lower() != _DOCTYPE:
            raise OutputError(path, "it exists, and is not an HTML page")


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("the HTML report", "matplotlib", "lora_param[report]")


def page(stats: Stats) -> str:
    """What is in a model, an adapter, or both, as an HTML document.

    Raises:
        MissingPackageError: Matplotlib is not installed.
    """
    _need_matplotlib()
    from lora_param.report.page.drawing import ramps

    colours = {mode: _variables(ramps(mode)) for mode in ("light", "dark")}
    sheet = files(__package__).joinpath("page.css").read_text("utf-8")
    for mode, variables in colours.items():
        sheet = sheet.replace(f"/* {mode} ramps */", variables)
    title = stats.source or "LoRA"
    adapted = stats.rows or not stats.weights
    rows = in_reading_order(stats.rows)
    body = [
        f"<header><p class=kind>LoRA report</p><h1>{breakable(title)}</h1></header>",
        *(_summary(stats) if adapted else []),
        *_remarks(stats),
        *_drawings(rows),
        *(target_table(rows) if rows else []),
        *(weight_table(stats) if stats.weights else []),
        *(f"<p class=note>{escape(note)}</p>" for note in stats.notes),
    ]
    return (
        f"{_DOCTYPE}\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        '<meta name=color-scheme content="light dark">\n'
        f"<title>{escape(title)} – LoRA report</title>\n<style>\n{sheet}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


# --- above the drawings -----------------------------------------------------------------------


def _summary(stats: Stats) -> list[str]:
    """The trainable share, and what all targets have in common."""
    tiles: list[tuple[str, str, str]] = []
    if stats.base:
        share = f"{figures.count(stats.trainable)} of {figures.count(stats.base)} elements"
        tiles.append(("trainable", figures.percent(stats.percent), share))
    else:
        tiles.append(("trainable", figures.count(stats.trainable), "elements"))
    names = {r.adapter for r in stats.rows}
    adapters = f"of {figures.plural(len(names), 'adapter')}" if len(names) > 1 else ""
    tiles.append(("targets", figures.count(len(stats.rows)), adapters))
    ratios, norms = [r.ratio for r in stats.rows], [r.update_norm for r in stats.rows]
    ranks = [r.effective_rank for r in stats.rows]
    by_ratio = any(v is not None for v in ratios)
    tiles.append(_range(_RATIO, ratios) if by_ratio else _range(_NORM, norms))
    tiles.append(_range("effective rank", ranks))
    common, _ = split_common(
        stats.rows,
        [
            ("variant", lambda r: "" if r.variant == "lora" else r.variant),
            ("rank", lambda r: str(r.rank)),
            ("alpha", lambda r: f"{r.alpha:g}"),
            ("scale", lambda r: f"{r.scale:g}"),
            ("dtype", lambda r: r.dtype),
        ],
    )
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}"
        f"{f'<small>{escape(more)}</small>' if more else ''}</dd></div>"
        for name, value, more in tiles
        if value
    )
    parts = [
        f"<dl class=tiles data-trainable={stats.trainable} data-base={stats.base} "
        f"data-percent={stats.percent!r}>{shown}</dl>"
    ]
    if stats.base:
        width = min(stats.percent, 100.0)
        parts.append(
            f'<div class=share role=img aria-label="{escape(figures.percent(stats.percent))} '
            f'trainable"><span style="width:{width:.4f}%"></span></div>'
        )
    if common:
        everywhere = " · ".join(map(escape, common))
        parts.append(f"<p class=note>{everywhere}</p>")
    return parts


def _range(name: str, values: Sequence[float | None]) -> tuple[str, str, str]:
    """A tile with the least and the greatest of measured values that are neither zero nor NaN."""
    known = [v for v in values if v is not None]
    usual = [v for v in known if math.isfinite(v) and v > 0]
    without = ["zero"] if 0 in known else []
    without += ["NaN"] if any(map(math.isnan, known)) else []
    without += ["infinity"] if any(map(math.isinf, known)) else []
    text = figures.span(usual, digits=2)
    about = "range" if "–" in text else ""
    return name, text, f"{about} without {' or '.join(without)}".strip() if without else about


def _remarks(stats: Stats) -> list[str]:
    if not stats.rows:
        none = "no targets: nothing is adapted"
        return [] if stats.weights else [f"<ul class=remarks><li>{none}</li></ul>"]
    lines = [f"<li class={kind}>{escape(text)}</li>" for text, kind in remarks(stats)]
    return [f"<ul class=remarks>{''.join(lines)}</ul>"] if lines else []


# --- drawings ---------------------------------------------------------------------------------


def _drawings(rows: Sequence[TargetRow]) -> Iterator[str]:
    """Heat maps and spectra, adapter by adapter."""
    links = {(r.adapter, r.target): f"#t{i}" for i, r in enumerate(rows)}
    said = {links[r.adapter, r.target]: _said(r) for r in rows}
    adapters = list(dict.fromkeys(r.adapter for r in rows))
    for adapter in adapters:
        own = [r for r in rows if r.adapter == adapter]
        grid = lay_out(own)
        here = {r.target: links[adapter, r.target] for r in own}
        suffix = f" of adapter {escape(adapter)}" if len(adapters) > 1 else ""
        yield from _maps(own, grid, here, said, suffix)
        yield from _spectra(grid, here, {here[r.target]: r.target for r in own}, suffix)


def _said(row: TargetRow) -> str:
    """All there is to say of a target, for where the pointer rests on it."""
    lines = [row.target, f"{figures.shape(row.shape)}, rank {row.rank}, scale {row.scale:g}"]
    values = ((_RATIO, row.ratio), (_NORM, row.update_norm), ("effective rank", row.effective_rank))
    lines += [f"{name} {figures.number(v)}" for name, v in values if v is not None]
    return "\n".join([*lines, *row.words])


def _measures(rows: Sequence[TargetRow]) -> Iterator[tuple[str, Measure, str]]:
    """What there is to colour by: title, measure, and a sentence on it."""
    from lora_param.report.page.drawing import Measure

    if any(r.ratio is not None for r in rows):
        about = "Size of each update beside the weight that it is added to (Frobenius norms)."
        yield "How strong the updates are", Measure(_RATIO, lambda r: r.ratio, "heat", True), about
    elif any(r.update_norm is not None for r in rows):
        about = (
            "Size of each update (Frobenius norm). Give the model as well to see it beside ‖W‖, "
            "the size of the weight that it is added to."
        )
        yield (
            "How strong the updates are",
            Measure(_NORM, lambda r: r.update_norm, "heat", True),
            about,
        )
    else:
        about = (
            "The updates were not measured: what is shown is the rank that each target was given."
        )
        yield "What is adapted", Measure("rank", lambda r: float(r.rank), "heat"), about
    if any(r.effective_rank is not None and r.rank > 1 for r in rows):
        about = "How many directions carry each update: exp of the entropy of its singular values."
        yield (
            "How many directions they use",
            Measure("effective rank", lambda r: r.effective_rank, "rank"),
            about,
        )


def _maps(
    rows: Sequence[TargetRow], grid: Grid, links: Mapping[str, str], said: Mapping[str, str],
    suffix: str,
) -> Iterator[str]:  # fmt: skip
    from lora_param.report.page.drawing import heat_map

    for title, measure, about in _measures(rows):
        yield (
            f"<section><h2>{title}<span class=measure>{escape(measure.name)}{suffix}</span></h2>"
            f"<p class=note>{escape(about)}</p><div class=wide tabindex=0 role=region "
            f'aria-label="{escape(measure.name)}">'
            f"{heat_map(grid, measure, links, said)}</div></section>"
        )


def _spectra(
    grid: Grid, links: Mapping[str, str], said: Mapping[str, str], suffix: str
) -> Iterator[str]:
    """A panel for each row of the grid, strongest first where there are too many."""
    from lora_param.report.page.drawing import spectrum, spectrum_limits

    lines: dict[int, list[TargetRow]] = {}
    for (row, _), target in sorted(grid.cells.items()):
        values = target.singular_values
        if values and all(math.isfinite(v) for v in values) and values[0] > 0:
            lines.setdefault(row, []).append(target)
    if all(len(t.singular_values or ()) < 2 for of in lines.values() for t in of):
        return  # a single value is the norm, which is shown already
    greatest = {row: max(max(t.singular_values or (0,)) for t in of) for row, of in lines.items()}
    shown = sorted(sorted(lines, key=lambda row: -greatest[row])[:_PANELS])
    limits = spectrum_limits([t for of in lines.values() for t in of])
    about = "Singular values of each ΔW, greatest first, a line for each target."
    if any(len(of) > 1 for of in lines.values()):
        about += " The first layers are faint, the last strong."
    if any(len(of) > 12 for of in lines.values()):
        about += " The thick line is their median."
    if any(not t.enabled for of in lines.values() for t in of):
        about += " Dashed: disabled."
    if len(shown) < len(lines):
        about += f" Shown are the {len(shown)} strongest of {len(lines)}; the table has all."
    panels = "".join(
        f"<figure>{spectrum(grid.labels[row], lines[row], limits, links, said)}</figure>"
        for row in shown
    )
    yield (
        f"<section><h2>Spectra<span class=measure>singular values of ΔW{suffix}</span></h2>"
        f"<p class=note>{about}</p><div class=panels>{panels}</div></section>"
    )
