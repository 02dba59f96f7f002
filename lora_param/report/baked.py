"""What a bake wrote, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from lora_param.errors import escaped
from lora_param.report import figures
from lora_param.report.collapse import Group, collapse
from lora_param.report.layout import View, split_common
from lora_param.report.tree import Column, Facts, Row, TreeTable

__all__ = ["bake_view"]


def bake_view(report: Any) -> RenderableType:
    """What a bake wrote.

    Args:
        report: anything with `rows`, each with `target`, and where they have them `changed` and
            `total` (elements), `ratio` or `relative_norm` (‖ΔW‖/‖W‖), `loss` or `rounding_loss`
            (the part of ΔW that the stored dtype cannot hold), `adapter`, `dead` and `lost`; of
            its own `path`, `files`, `bytes`, `verified`, `disabled` and `notes`.
    """
    rows = [_BakeRow.of(row) for row in getattr(report, "rows", ())]
    disabled = tuple(getattr(report, "disabled", ()))
    head = Text("baked ").append(f"{len(rows):,}", "bold")
    head.append(f" of {figures.plural(len(rows) + len(disabled), 'target')}")
    changed = [row.changed for row in rows if row.changed is not None]
    if changed:
        head.append(f", {figures.count(sum(changed))} elements changed")
    parts: list[RenderableType] = [*_written(report), head]
    common, varying = split_common(rows, [("adapter", lambda r: r.adapter)])
    if rows:
        groups = collapse(rows, lambda r: r.target, lambda r: (r.words, r.adapter))
        columns = [Column(name, left=True) for name, _ in varying]
        columns += [Column("changed"), Column("of", optional=True)]
        columns += [Column("‖ΔW‖/‖W‖"), Column("rounding loss")]
        parts += [Facts(common)] if common else []
        parts += ["", TreeTable(columns, [_bake_line(g, bool(varying)) for g in groups])]
    if disabled:
        off = collapse(disabled, str, lambda _: 0)
        lines = [Row(g.segments, (), len(g.items), ("disabled: the base alone",)) for g in off]
        parts += ["", TreeTable([], lines)]
    if notes := tuple(getattr(report, "notes", ())):
        parts += ["", *(Text(escaped(str(note)), "yellow") for note in notes)]
    return View(parts)


@dataclass(frozen=True)
class _BakeRow:
    """What is shown of one baked target, None where it is not known."""

    target: str
    adapter: str
    changed: int | None
    total: int | None
    ratio: float | None
    loss: float | None
    words: tuple[str, ...]

    @classmethod
    def of(cls, row: Any) -> _BakeRow:
        changed = getattr(row, "changed", None)
        words: tuple[str, ...] = ()
        if getattr(row, "dead", False):
            words = ("still zero",)
        elif getattr(row, "lost", False):
            words = ("lost in rounding",)
        elif changed == 0:
            words = ("unchanged",)
        return cls(
            str(row.target),
            str(getattr(row, "adapter", "")),
            changed,
            getattr(row, "total", None),
            getattr(row, "ratio", getattr(row, "relative_norm", None)),
            getattr(row, "loss", getattr(row, "rounding_loss", None)),
            words,
        )


def _bake_line(group: Group[_BakeRow], with_adapter: bool) -> Row:
    items = group.items
    figure = (
        _sum([r.changed for r in items]),
        _sum([r.total for r in items]),
        figures.span((r.ratio for r in items), digits=2),
        figures.most((r.loss for r in items), digits=2),
    )
    lead = (items[0].adapter,) if with_adapter else ()
    return Row(group.segments, (*lead, *figure), len(items), items[0].words)


def _written(report: Any) -> list[RenderableType]:
    """Where the result is, its size, and whether it was read again."""
    path, size = getattr(report, "path", None), getattr(report, "bytes", None)
    if path is None:
        return []
    facts = [figures.size(size)] if size is not None else []
    if (files := len(getattr(report, "files", ()))) > 1:
        facts.append(f"{files} files")
    if getattr(report, "verified", False):
        facts.append("verified")
    line = Text(escaped(str(path)), "bold")
    return [line.append(f" · {' · '.join(facts)}", "not bold") if facts else line]


def _sum(values: Sequence[int | None]) -> str:
    return figures.count(sum(v for v in values if v is not None)) if None not in values else ""
