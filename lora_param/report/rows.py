"""`Stats`: rows and totals that print themselves. Needs neither torch nor, until then, Rich."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_param.report.data import StatsData, TargetRow, WeightRow

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Stats", "TargetRow", "WeightRow"]


@dataclass(frozen=True)
class Stats(StatsData):
    """What is in a model, an adapter, or both, as text, as data and as a page.

    It prints itself; `to_dict` gives plain data, `to_html` and `write_html` a page.

    Attributes:
        rows: one for each target of each adapter.
        base: number of elements of all base weights; 0 where the base is not at hand.
        weights: one for each weight; empty where the base is not at hand.
        source: what it is about, to show above.
        notes: sentences to show below.
        unfrozen: number of base elements that train as well, besides the factors.

    Example:
        >>> row = TargetRow("fc.weight", (10, 20), "float32", "default", 1, 1, 1, True, 30, True)
        >>> stats = Stats((row,), base=210)
        >>> stats.trainable, round(stats.percent, 2), len(stats.dead)
        (30, 14.29, 1)
    """

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from lora_param.report.terminal import stats_view

        yield stats_view(self)

    def __str__(self) -> str:
        from lora_param.report.terminal import plain_text, stats_view

        return plain_text(stats_view(self))

    def to_html(self) -> str:
        """A page with heat maps of layer × projection, spectra and all values in a table.

        It needs nothing else: no script, no network. It follows the reader's light or dark mode
        and prints.

        Raises:
            MissingPackageError: Matplotlib is not installed (`pip install 'lora_param[report]'`).
        """
        from lora_param.report.html import page

        return page(self)

    def write_html(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write what `to_html` gives to a file, atomically.

        Args:
            path: where it goes.
            force: replace a page that exists.

        Raises:
            MissingPackageError: Matplotlib is not installed.
            OutputError: the file exists (without force) or is no page, or cannot be written.
        """
        from lora_param.files.writer import replace_file
        from lora_param.report.html import check_page

        check_page(path, force=force)
        text = self.to_html()
        with replace_file(path, force=force) as file:
            file.write(text.encode(errors="xmlcharrefreplace"))  # names may hold anything
