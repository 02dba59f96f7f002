"""Colours of the page, and its spectra, drawn with Matplotlib."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lora_param.report.page.vector import STEPS, figure, ink, style, to_svg
from lora_param.report.stats import TargetRow

__all__ = ["Ramp", "ramps", "spectrum", "spectrum_floor"]

_RAMPS = {
    "light": {
        "heat": ("#dfeaf6", "#9dc3e3", "#4a8fc7", "#185a9d", "#082f63"),
        "rank": ("#e9e5f3", "#bdb2dc", "#8b77be", "#5f4398", "#36205f"),
        "depth": ("#8fc3e8", "#2f8fd0", "#6a51b5", "#b0307a"),
    },
    "dark": {
        "heat": ("#1b3049", "#22568c", "#3f86c2", "#86bdea", "#d8ecff"),
        "rank": ("#2b2541", "#4d3d80", "#7d66b8", "#b09ee0", "#e6deff"),
        "depth": ("#3a7fc0", "#63b4f0", "#a596f0", "#f58ac4"),
    },
}


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


@dataclass(frozen=True)
class Ramp:
    """Steps of colour over a range of values.

    Attributes:
        edges: where the steps begin and end.
    """

    edges: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float]) -> Ramp:
        """From the least to the greatest of positive values; wide ranges in equal ratios."""
        if not values:
            return cls.share()
        least, most = min(values), max(values)
        least = min(least, most * 0.9)  # differences of some percent stay pale
        space = np.geomspace if most / 4 > least > 0 else np.linspace
        return cls(tuple(space(least, most, STEPS + 1).tolist()))

    @classmethod
    def share(cls) -> Ramp:
        """From 0 to 1."""
        return cls(tuple(np.linspace(0, 1, STEPS + 1).tolist()))

    @property
    def ticks(self) -> tuple[float, float, float]:
        """The least, a middle and the greatest value."""
        return self.edges[0], self.edges[STEPS // 2], self.edges[-1]

    def step(self, value: float) -> int:
        """The number of the step that a value is in."""
        return min(max(bisect.bisect_right(self.edges, value) - 1, 0), STEPS - 1)


def spectrum_floor(spectra: Sequence[Sequence[float]]) -> float:
    """The least share of their greatest that is drawn of spectra: at most four decades below.

    What is further down is rounding, or as good as zero beside the rest.
    """
    shares = [v / s[0] for s in spectra for v in s if v > 0]
    return max(min(shares), 1e-4)


def spectrum(
    label: str,
    targets: Sequence[TargetRow],
    floor: float,
    links: Mapping[str, str],
    said: Mapping[str, str],
) -> str:
    """Singular values of the targets of one row of the grid, a line for each, as an `<svg>`.

    Each is divided by its greatest, so that forms can be compared whatever the sizes.

    Args:
        label: what the targets have in common.
        targets: from the first layer to the last, each with singular values, the first not 0.
        floor: the least share on the axis, the same for all panels of a page.
        links: target → the URL of its line in the table.
        said: URL → its tooltip.
    """
    spectra = [t.singular_values or (1.0,) for t in targets]
    shares = [[v / s[0] for v in s] for s in spectra]
    longest, many = max(map(len, shares)), len(targets) > 12
    with style():
        page = figure(286, 170)
        axes = page.add_axes((46 / 286, 30 / 170, 228 / 286, 114 / 170))
        for i, (target, share) in enumerate(zip(targets, shares, strict=True)):
            depth = round(i * (STEPS - 1) / max(len(targets) - 1, 1))
            (line,) = axes.plot(
                range(1, len(share) + 1), np.maximum(share, floor / 10),
                "-" if target.enabled else "--", marker="o" if len(share) == 1 else "",
                color=ink(f"depth{depth}"), lw=0.8 if many else 1.5, alpha=0.6 if many else None,
            )  # fmt: skip
            line.set_url(links[target.target])
        if many:
            middle = [np.median([s[k] for s in shares if len(s) > k]) for k in range(longest)]
            heights = np.maximum(middle, floor / 10)
            axes.plot(range(1, longest + 1), heights, color=ink("ink"), lw=2)
        axes.set(yscale="log", ylim=(floor / 1.3, 1.3), xlim=(0.7, longest + 0.3))
        axes.set_title(label, fontsize=11, loc="left", color=ink("ink"), parse_math=False)
        axes.grid(axis="y", color=ink("line"), lw=1)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0, labelsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        between = (1.0,) if floor < 0.02 else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=between, numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.patch.set_visible(False)
        return to_svg(page, f"Singular values of the updates of {label}.", said)
