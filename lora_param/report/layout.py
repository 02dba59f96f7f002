"""What the terminal views share: parts below one another, the share line, common settings."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from lora_param.report import figures
from lora_param.report.stats import Stats
from lora_param.report.tree import printable

__all__ = ["Indented", "View", "plain_text", "remarks", "share_line", "split_common"]


@dataclass(frozen=True)
class View:
    """Parts one below the other. A Rich renderable; lines of text lose their trailing blanks."""

    parts: Sequence[RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in self.parts:
            if not isinstance(part, Text):
                yield part
                continue
            text = printable(part, options)
            room = options.max_width
            if options.overflow == "ignore":  # a line is as long as its longest word
                room = max([room, *map(cell_len, text.plain.split())])
            for line in text.wrap(console, room, overflow="fold"):
                line.overflow = options.overflow
                line.rstrip()
                yield line


@dataclass(frozen=True)
class Indented:
    """A text whose lines all begin some columns to the right. A Rich renderable."""

    text: Text
    columns: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = max(options.max_width - self.columns, 1)
        for line in printable(self.text, options).wrap(console, width):
            line.rstrip()
            yield Text(" " * self.columns).append_text(line)


def plain_text(view: RenderableType, width: int | None = None) -> str:
    """A view as text without control codes, as wide as the terminal where no width is given."""
    console = Console(
        file=io.StringIO(), color_system=None, force_terminal=False, width=width or Console().width
    )
    with console.capture() as captured:
        console.print(view)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def share_line(trainable: int, base: int, percent: float) -> Text:
    """The trainable share in one line.

    >>> share_line(73728, 22713216, 0.3246).plain
    'trainable 73,728 of 22,713,216 (0.32 %)'
    """
    text = Text("trainable ").append(figures.count(trainable), "bold")
    if not base:
        return text
    text.append(f" of {figures.count(base)} (")
    return text.append(figures.percent(percent), "bold green").append(")")


def split_common(
    rows: Sequence[Any], columns: Sequence[tuple[str, Callable[[Any], str]]]
) -> tuple[list[str], list[tuple[str, Callable[[Any], str]]]]:
    """What all rows have in common, as words for above the table, and the columns that vary."""
    common, varying = [], []
    for name, show in columns:
        values = {show(row) for row in rows}
        if len(values) > 1:
            varying.append((name, show))
        elif value := next(iter(values), ""):
            common.append(value if name == "dtype" else f"{name} {value}")
    return common, varying


def remarks(stats: Stats) -> list[tuple[str, str]]:
    """What is out of the ordinary, counted, in words, each with "warning" or "error"."""
    total = figures.plural(len(stats.rows), "target")
    bad = sum(not row.finite for row in stats.rows)
    found = [
        (f"{number:,} of {total} {what}", kind)
        for number, what, kind in (
            (len(stats.dead), "still zero: ΔW = 0", "warning"),
            (len(stats.disabled), "disabled: the base alone", "warning"),
            (bad, "not finite: NaN or infinity", "error"),
        )
        if number
    ]
    if stats.unfrozen and stats.rows:  # beside an adapter; a plain model's weights all may train
        train = f"{figures.count(stats.unfrozen)} base elements train too: not frozen"
        found.append((train, "warning"))
    return found
