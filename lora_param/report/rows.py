"""`Stats`: rows and totals that print themselves. Needs neither torch nor, until then, Rich."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_param.report.data import StatsData, TargetRow, WeightRow

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Stats", "TargetRow", "WeightRow"]


@dataclass(frozen=True)
class Stats(StatsData):
    """What is in a model, an adapter, or both. Prints itself; `to_dict` gives it as data.

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
