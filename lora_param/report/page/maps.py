"""Heat maps of layer × projection, as the templates take them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_param.report import figures

__all__ = ["MARKS", "Cell", "Measure", "heat_map", "wide_columns"]

MARKS = ("still zero", "disabled", "not comparable", "not finite")
_WRITTEN = 13  # columns of a heat map with room for numbers


@dataclass(frozen=True)
class Measure:
    """What a heat map shows.

    Attributes:
        title: of the section.
        name: of the quantity.
        about: a sentence on it.
        ramp: of colours, see `drawing.ramps`.
        ticks: the ends and the middle of a ramp from 0 to 1; None for one over the values.
    """

    title: str
    name: str
    about: str
    ramp: str = "heat"
    ticks: tuple[str, str, str] | None = None


@dataclass(frozen=True)
class Cell:
    """One place of a heat map.

    Attributes:
        url: of its line in the table.
        said: all there is to say, for where the pointer rests on it.
        value: what it is coloured by; hollow where None, 0 or not finite.
        text: what is written in it.
        marks: of `MARKS`, what it is beside its value.
    """

    url: str
    said: str
    value: float | None
    text: str
    marks: frozenset[str] = frozenset()


def wide_columns(number: int) -> dict[str, Any]:
    """How a grid of so many columns is drawn: each how many-th is numbered, values are written."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 10**9) if number <= 20 * n)
    return {"every": every, "written": number <= _WRITTEN}


def heat_map(
    measure: Measure, cells: Mapping[tuple[int, int], Cell], text: figures.Write
) -> dict[str, Any]:
    """A heat map.

    Args:
        measure: what it shows.
        cells: row and column number of the grid → what is there.
        text: writes a value, for the ramp's ticks.
    """
    from lora_param.report.page.drawing import Ramp

    known = [v for c in cells.values() if (v := c.value) is not None and math.isfinite(v) and v > 0]
    ramp = Ramp.over(known) if measure.ticks is None else Ramp.share()
    drawn = {}
    for at, cell in cells.items():
        value, marks = cell.value, set(cell.marks)
        if value is not None and not math.isfinite(value):
            marks.add("not finite")
        hollow = value is None or not math.isfinite(value) or value <= 0
        drawn[at] = {
            "url": cell.url,
            "said": cell.said,
            "classes": " ".join(w.replace(" ", "-") for w in MARKS if w in marks),
            "colour": "" if hollow or value is None else f"{measure.ramp}{ramp.step(value)}",
            "text": "!" if "not finite" in marks else cell.text,
            "marks": marks,
        }
    used = {mark for cell in drawn.values() for mark in cell["marks"]}
    ticks = measure.ticks or tuple(map(text, ramp.ticks))
    return {
        "measure": measure,
        "cells": drawn,
        "ticks": ticks if known else (),
        "marks": [w for w in MARKS if w in used],
    }
