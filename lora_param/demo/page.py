"""How the demo prints: numbered steps, calls to copy, claims checked before they are made."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, TextColumn
from rich.segment import Segment
from rich.text import Text

from lora_param.report.terminal import stats_view

if TYPE_CHECKING:
    from lora_param.demo.training import Accuracy
    from lora_param.report.stats import Stats

__all__ = ["Page", "accuracy_table"]

_INDENT = 3


@dataclass(frozen=True, slots=True)
class _Indented:
    """Something moved to the right, and without trailing blanks."""

    part: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        narrower = options.update_width(max(options.max_width - _INDENT, 1))
        for line in console.render_lines(self.part, narrower, pad=False):
            while line and not line[-1].text.strip():
                line.pop()
            if line:
                yield Segment(" " * _INDENT)
                yield from line[:-1]
                yield Segment(line[-1].text.rstrip(), line[-1].style)
            yield Segment.line()


class Page:
    """A console that the story is printed to."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps = 0

    def step(self, title: str) -> None:
        """Begin a step."""
        if self._steps:
            self._console.print()
        self._steps += 1
        self._console.print(Text().append(f"{self._steps}  ", "bold cyan").append(title, "bold"))

    def show(self, part: RenderableType) -> None:
        """Print something under the step."""
        self._console.print(_Indented(part))

    def say(self, sentence: str, *, strong: bool = False) -> None:
        """Print a sentence."""
        self.show(Text(sentence, "bold" if strong else ""))

    def call(self, code: str) -> None:
        """Print the line of Python that the step runs."""
        self._line(Text().append(">>> ", "dim").append(code, "cyan"))

    def command(self, *arguments: str) -> None:
        """Print a command line."""
        self._line(Text().append("$ ", "dim").append(f"lora-param {shlex.join(arguments)}", "cyan"))

    def check(self, holds: bool, claim: str) -> None:
        """Print a claim that was tested, as holding or not."""
        word, style = ("yes", "bold green") if holds else ("NO ", "bold red")
        self.show(Text().append(word, style).append(f"  {claim}"))

    def show_stats(self, stats: Stats) -> None:
        """Print the trainable share and the targets."""
        self.show(stats_view(stats, weights=False))

    @contextmanager
    def progress(self, what: str, total: int | None) -> Iterator[Callable[[], None]]:
        """A bar while something trains, gone afterwards; nothing where there is no terminal."""
        columns = TextColumn(" " * _INDENT + what), BarColumn(bar_width=24)
        hidden = not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=hidden) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)

    def _line(self, text: Text) -> None:
        # never broken by us: a line to copy stays one line
        self._console.print(Text(" " * _INDENT).append_text(text), soft_wrap=True)


def accuracy_table(stages: Mapping[str, Accuracy], digit: int) -> Text:
    """Accuracy of each digit at each stage, the digit in question standing out; 55 columns wide."""
    width = max(len(name) for name in stages)
    table = Text(" " * width, "")
    for d in range(10):
        table.append(f"{d:>4}", "bold" if d == digit else "dim")
    table.append(f"{'all':>7}", "dim")
    for name, accuracy in stages.items():
        table.append(f"\n{name:<{width}}")
        for d, value in enumerate(accuracy.digits):
            table.append(f"{value:>4.0f}", "bold green" if d == digit else "")
        table.append(f"{accuracy.all:>7.1f}")
    table.append("\n" + " " * (width + 4 * digit + 3) + "^", "bold")
    return table
