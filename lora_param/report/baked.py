"""What a bake wrote, for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import RenderableType
from rich.text import Text

from lora_param.checkpoint.baked import BakeReport
from lora_param.checkpoint.measures import BakedTarget
from lora_param.errors import escaped
from lora_param.report import figures
from lora_param.report.collapse import Group, collapse
from lora_param.report.layout import View, split_common
from lora_param.report.tree import Column, Facts, Row, TreeTable

__all__ = ["bake_view"]

_FORMS = {"dense": "plain weights of quantized ones", "same": "quantized again"}


def bake_view(report: BakeReport) -> RenderableType:
    """Where the result is, and what came of each target."""
    rows, disabled = report.rows, report.disabled
    head = Text("baked ").append(f"{len(rows):,}", "bold")
    head.append(f" of {figures.plural(len(rows) + len(disabled), 'target')}")
    if rows:
        head.append(f", {figures.count(report.changed)} elements changed")
    parts: list[RenderableType] = [_written(report), head]
    common, varying = split_common(rows, [("adapter", lambda r: r.adapter)])
    if rows:
        groups = collapse(rows, lambda r: r.target, lambda r: (_words(r), r.adapter))
        write = (
            figures.aligned(r.relative_norm for r in rows),
            figures.aligned(r.rounding_loss for r in rows),
        )
        more = _quantized(report)
        columns = [Column(name, left=True) for name, _ in varying]
        columns += [Column("changed"), Column("of", optional=True)]
        columns += [Column("‖ΔW‖/‖W‖"), Column("rounding loss")]
        columns += [Column(name) for name, _ in more]
        parts += [Facts(common)] if common else []
        parts += ["", TreeTable(columns, [_line(g, bool(varying), *write, more) for g in groups])]
    if disabled:
        off = collapse(disabled, str, lambda _: 0)
        lines = [Row(g.segments, (), len(g.items), ("disabled: the base alone",)) for g in off]
        parts += ["", TreeTable([], lines)]
    if report.notes:
        parts += ["", *(Text(escaped(note), "yellow") for note in report.notes)]
    return View(parts)


def _quantized(
    report: BakeReport,
) -> list[tuple[str, Callable[[Sequence[BakedTarget]], str]]]:
    """What is shown of targets on quantized weights alone: the least of a group's kept shares."""
    more: list[tuple[str, Callable[[Sequence[BakedTarget]], str]]] = []
    if report.quantized == "same":
        more.append(("kept", lambda rows: figures.percent(100 * min(r.kept for r in rows))))
    found = [e for r in report.rows if (e := r.quantization_error) is not None]
    if found:
        write = figures.aligned(found)

        def errors(rows: Sequence[BakedTarget]) -> str:
            own = [e for r in rows if (e := r.quantization_error) is not None]
            return figures.span(own, write) if own else ""

        more.append(("‖quantization error‖/‖ΔW‖", errors))
    return more


def _words(row: BakedTarget) -> tuple[str, ...]:
    if row.dead:
        return ("still zero",)
    if row.lost:
        return ("lost in rounding",)
    return ("unchanged",) if row.changed == 0 else ()


def _line(
    group: Group[BakedTarget],
    with_adapter: bool,
    norm: figures.Write,
    loss: figures.Write,
    more: Sequence[tuple[str, Callable[[Sequence[BakedTarget]], str]]],
) -> Row:
    items = group.items
    cells = (
        figures.count(sum(r.changed for r in items)),
        figures.count(sum(r.total for r in items)),
        figures.span((r.relative_norm for r in items), norm),
        figures.most((r.rounding_loss for r in items), loss),
        *(show(items) for _, show in more),
    )
    lead = (items[0].adapter,) if with_adapter else ()
    return Row(group.segments, (*lead, *cells), len(items), _words(items[0]))


def _written(report: BakeReport) -> Text:
    """Where the result is, its size, and whether it was read again."""
    facts = [figures.size(report.bytes)]
    facts += [f"{len(report.files)} files"] if len(report.files) > 1 else []
    facts += ["verified"] if report.verified else []
    facts += [_FORMS[report.quantized]] if report.quantized else []
    return Text(escaped(str(report.path)), "bold").append(f" · {' · '.join(facts)}", "not bold")
