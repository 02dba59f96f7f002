"""What the page draws, with Matplotlib: heat maps of layer × projection, and spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, to_hex
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lora_param.report import figures
from lora_param.report.page.grid import Grid
from lora_param.report.page.vector import STEPS, figure, ink, style, to_svg
from lora_param.report.stats import TargetRow

__all__ = ["Measure", "heat_map", "ramps", "spectrum", "spectrum_limits"]

_DRAWN = 1e-100, 1e100  # logarithmic axes overflow not far beyond

_WIDTH = 900.0  # of a page's column, in CSS pixels
_LETTER = 6.1  # width of an average letter of a label
_MARKS = ("still zero", "disabled", "not finite")
_MARK_WIDTH = 116.0
_RAMPS = {
    "light": {
        "heat": ("#dfeaf6", "#9dc3e3", "#4a8fc7", "#185a9d", "#082f63"),
        "rank": ("#e9e5f3", "#bdb2dc", "#8b77be", "#5f4398", "#36205f"),
        "depth": ("#a6cfe8", "#4f9fcb", "#1f6fa8", "#123f73"),
    },
    "dark": {
        "heat": ("#1b3049", "#22568c", "#3f86c2", "#86bdea", "#d8ecff"),
        "rank": ("#2b2541", "#4d3d80", "#7d66b8", "#b09ee0", "#e6deff"),
        "depth": ("#2e5f8f", "#4487bd", "#7db8e3", "#cfe8fb"),
    },
}


@dataclass(frozen=True)
class Measure:
    """What a heat map shows.

    Attributes:
        name: for titles and screen readers.
        value: of a target; None where it was not measured.
        ramp: the colours.
        ratio: values are compared by their ratio: equal steps of colour multiply.
    """

    name: str
    value: Callable[[TargetRow], float | None]
    ramp: str
    ratio: bool = False


def ramps(mode: str) -> dict[str, str]:
    """Colours of the ramps in "light" or "dark" mode, by the name of their CSS variable."""
    found = {}
    for ramp, anchors in _RAMPS[mode].items():
        colours = LinearSegmentedColormap.from_list(ramp, anchors)(np.linspace(0, 1, STEPS))
        for i, colour in enumerate(colours):
            found[f"{ramp}{i}"] = to_hex(colour)
            luminance = float(np.dot(_linear(colour[:3]), (0.2126, 0.7152, 0.0722)))
            # whichever of the two has the higher contrast, by WCAG 2
            found[f"on-{ramp}{i}"] = "#ffffff" if 1.05 / (luminance + 0.05) > 4.5 else "#10161d"
    return found


def _linear(rgb: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    c = np.asarray(rgb, np.float64)
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _scale(values: Sequence[float], ratio: bool) -> BoundaryNorm | None:
    """Steps of colour from the least to the greatest value; None where there is none."""
    if not values:
        return None
    least, most = (float(v) for v in np.clip([min(values), max(values)], *_DRAWN))
    least = min(least, most * 0.9)  # differences of some percent stay pale
    apart = ratio and most / least > 4
    edges = (np.geomspace if apart else np.linspace)(least, most, STEPS + 1)
    return BoundaryNorm(edges, STEPS)


def heat_map(
    grid: Grid, measure: Measure, links: Mapping[str, str], said: Mapping[str, str]
) -> str:
    """Layer × projection, coloured by a measure, as an `<svg>` element.

    Args:
        grid: the targets.
        measure: what the colours show.
        links: target → the URL of its line in the table.
        said: URL → its tooltip.
    """
    found = {at: measure.value(target) for at, target in grid.cells.items()}
    known = [v for v in found.values() if v is not None and math.isfinite(v) and v > 0]
    scale = _scale(known, measure.ratio)
    rows, columns = len(grid.rows), len(grid.columns)
    left = max(len(label) for label in grid.labels) * _LETTER + 16
    cell = min(max((_WIDTH - left - 12) / columns, 8.0), 54.0)
    high = 30.0 if cell >= 40 else 22.0
    top, below = 40.0 if grid.axis else 24.0 if any(grid.columns) else 4.0, 78.0
    marks = [w for w in _MARKS if any(w in _marks(t, found[at]) for at, t in grid.cells.items())]
    wide = max(left + cell * columns + 12, left + 264, left + _MARK_WIDTH * len(marks))
    tall = top + high * rows + (below if marks else below - 34)
    with style():
        page = figure(wide, tall)
        axes = page.add_axes(
            (left / wide, 1 - (top + high * rows) / tall, cell * columns / wide, high * rows / tall)
        )
        _frame(axes, grid, cell)
        for (row, column), target in grid.cells.items():
            _cell(
                axes, (column, row), found[row, column], scale, measure.ramp,
                _marks(target, found[row, column]), links[target.target], written=cell >= 40,
            )  # fmt: skip
        if scale is not None:
            _colour_bar(
                page.add_axes(
                    (left / wide, (below - 40 if marks else 22) / tall, 240 / wide, 9 / tall)
                ),
                scale,
                measure,
            )
        if marks:
            key = page.add_axes((left / wide, 2 / tall, 1 - left / wide, 18 / tall))
            _key(key, marks, measure.ramp, wide - left)
        return to_svg(page, f"Heat map of {measure.name}; the table has its values.", said)


def _marks(target: TargetRow, value: float | None) -> tuple[str, ...]:
    words = [w for w in target.words if w != "not finite"]
    if value is not None and not math.isfinite(value):
        words.append("not finite")
    return tuple(words)


def _frame(axes: Axes, grid: Grid, cell: float) -> None:
    """Names of rows and columns; no ticks, no frame."""
    axes.set(xlim=(-0.5, len(grid.columns) - 0.5), ylim=(len(grid.rows) - 0.5, -0.5))
    axes.set_yticks(range(len(grid.rows)), grid.labels, color=ink("ink"), parse_math=False)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    longest = max(len(h) for h in grid.headings)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 10**9) if n * cell > longest * 6 + 6)
    shown = range(0, len(grid.columns), every) if any(grid.columns) else ()
    axes.set_xticks(list(shown), [grid.headings[i] for i in shown], fontsize=10)
    if grid.axis:
        axes.set_xlabel(grid.axis, fontsize=10, loc="left", parse_math=False)
    axes.tick_params(length=0, pad=5)
    axes.spines[:].set_visible(False)
    axes.patch.set_visible(False)


def _cell(
    axes: Axes,
    at: tuple[float, float],
    value: float | None,
    scale: BoundaryNorm | None,
    ramp: str,
    marks: Sequence[str],
    url: str,
    *,
    written: bool,
) -> None:
    """One target. What is out of the ordinary shows by form: hollow and dashed, crossed, or "!"."""
    x, y = at
    hollow = value is None or not math.isfinite(value) or value <= 0 or scale is None
    step = (
        0 if value is None or hollow or scale is None else min(max(int(scale(value)), 0), STEPS - 1)
    )
    box = Rectangle((x - 0.5, y - 0.5), 1, 1, lw=1.5, edgecolor=ink("surface"))
    box.set_facecolor(ink("surface" if hollow else f"{ramp}{step}"))
    box.set_url(url)
    axes.add_patch(box)
    if "still zero" in marks or "not finite" in marks:
        inside = Rectangle(
            (x - 0.4, y - 0.36), 0.8, 0.72, fill=False, lw=1, linestyle=(0, (2, 1.5))
        )
        inside.set_edgecolor(ink("muted"))
        axes.add_patch(inside)
    colour = ink("ink" if hollow else f"on-{ramp}{step}")
    if "disabled" in marks:
        axes.plot((x - 0.44, x + 0.44), (y + 0.4, y - 0.4), color=ink("ink"), lw=3.4)
        axes.plot((x - 0.44, x + 0.44), (y + 0.4, y - 0.4), color=ink("surface"), lw=1.4)
    text = ""
    if "not finite" in marks:
        text = "!"
    elif written and value is not None:
        text = figures.number(value, 2)
    if text:
        behind = {"facecolor": box.get_facecolor(), "edgecolor": "none", "pad": 1.5}
        axes.text(
            x, y, text, color=colour, fontsize=10, ha="center", va="center_baseline", url=url,
            bbox=behind if "disabled" in marks else None, parse_math=False,
        )  # fmt: skip


def _colour_bar(axes: Axes, scale: BoundaryNorm, measure: Measure) -> None:
    colours = ListedColormap([ink(f"{measure.ramp}{i}") for i in range(STEPS)])
    edges = scale.boundaries
    drawn = axes.get_figure()
    assert drawn is not None
    bar = drawn.colorbar(
        ScalarMappable(scale, colours), cax=axes, orientation="horizontal", spacing="uniform",
        ticks=[edges[0], edges[STEPS // 2], edges[-1]],
        format=FuncFormatter(lambda value, _: figures.number(value, 2)),
    )  # fmt: skip
    bar.outline.set_visible(False)
    if bar.solids is not None:
        bar.solids.set_edgecolor("face")  # or seams show between the steps
    bar.ax.tick_params(length=0, pad=4, labelsize=10)
    bar.ax.xaxis.set_minor_locator(NullLocator())


def _key(axes: Axes, marks: Sequence[str], ramp: str, width: float) -> None:
    """The marks in use, each drawn as in the map."""
    axes.set(xlim=(0, width / 24), ylim=(0.9, -0.6))
    axes.axis("off")
    for i, mark in enumerate(marks):
        x = i * _MARK_WIDTH / 24 + 0.5
        value = math.nan if mark == "not finite" else 0.0 if mark == "still zero" else 1.0
        scale = BoundaryNorm(np.linspace(0.0, 2.0, STEPS + 1), STEPS)
        _cell(axes, (x, 0), value, scale, ramp, (mark,), "#targets", written=False)
        axes.text(x + 0.8, 0, mark, fontsize=10, va="center_baseline", color=ink("muted"))


def spectrum(
    label: str,
    targets: Sequence[TargetRow],
    limits: tuple[float, float],
    links: Mapping[str, str],
    said: Mapping[str, str],
) -> str:
    """Singular values of the targets of one row of the grid, a line for each, as an `<svg>`.

    Args:
        label: what the targets have in common.
        targets: from the first layer to the last, each with singular values.
        limits: least and greatest value on the axis, the same for all panels of a page.
        links: target → the URL of its line in the table.
        said: URL → its tooltip.
    """
    many = len(targets) > 12
    with style():
        page = figure(286, 170)
        axes = page.add_axes((46 / 286, 30 / 170, 228 / 286, 114 / 170))
        longest = 1
        for i, target in enumerate(targets):
            values = target.singular_values or ()
            longest = max(longest, len(values))
            depth = STEPS - 1 if len(targets) == 1 else round(i * (STEPS - 1) / (len(targets) - 1))
            dashed = "--" if not target.enabled else "-"
            (line,) = axes.plot(
                range(1, len(values) + 1), np.clip(values, *_DRAWN), dashed,
                color=ink(f"depth{depth}"), lw=0.8 if many else 1.5, alpha=0.55 if many else None,
            )  # fmt: skip
            line.set_url(links[target.target])
        if many:
            axes.plot(*_median(targets), color=ink("ink"), lw=2)
        axes.set(yscale="log", ylim=limits, xlim=(0.7, longest + 0.3))
        axes.set_title(label, fontsize=11, loc="left", color=ink("ink"), parse_math=False)
        axes.grid(axis="y", color=ink("line"), lw=1)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        between = (1.0,) if limits[1] / limits[0] > 50 else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=between, numticks=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.patch.set_visible(False)
        return to_svg(page, f"Singular values of the updates of {label}.", said)


def spectrum_limits(targets: Sequence[TargetRow]) -> tuple[float, float]:
    """An axis for the singular values of targets, of which one is not zero: at most four decades.

    What is below is rounding, or as good as zero beside the rest.
    """
    positive = [v for t in targets for v in t.singular_values or () if v > 0]
    least, most = (float(v) for v in np.clip([min(positive), max(positive)], *_DRAWN))
    return max(least, most * 1e-4) / 1.5, most * 1.5


def _median(targets: Sequence[TargetRow]) -> tuple[range, list[float]]:
    """The middle one of the first, second, … singular values of targets."""
    found = [t.singular_values or () for t in targets]
    longest = max(map(len, found))
    middle = [float(np.median([s[k] for s in found if len(s) > k])) for k in range(longest)]
    return range(1, longest + 1), np.clip(middle, *_DRAWN).tolist()
