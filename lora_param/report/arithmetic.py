"""What `extract`, `combine`, `resize` and `diff` found, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from lora_param.arithmetic.combine import Compressed
from lora_param.arithmetic.difference import Diff, Difference
from lora_param.arithmetic.extract import ExtractReport
from lora_param.report import figures
from lora_param.report.collapse import collapse
from lora_param.report.layout import View
from lora_param.report.tree import Column, Row, TreeTable

__all__ = ["compressed_view", "diff_view", "extract_view"]


def extract_view(report: ExtractReport) -> RenderableType:
    """What became factors, and what moved and did not."""
    head = Text(f"{report.tuned} - {report.base}", "bold")
    counts = [figures.plural(len(report.rows), "target")]
    if report.unchanged:
        counts.append(f"{report.unchanged:,} unchanged")
    groups = collapse(report.rows, lambda r: r.target, lambda _: 0)
    energies = figures.aligned(r.energy for r in report.rows)
    sizes = [r.relative_norm for r in report.rows] + [m.relative_norm for m in report.moved]
    ratios = figures.aligned(sizes)
    columns = [Column("rank"), Column("energy kept"), Column("‖ΔW‖/‖W‖")]
    lines = [
        Row(
            g.segments,
            (
                _span([r.rank for r in g.items]),
                figures.span((r.energy for r in g.items), energies),
                figures.span((r.relative_norm for r in g.items), ratios),
            ),
            len(g.items),
        )
        for g in groups
    ]
    parts: list[RenderableType] = [head, Text(", ".join(counts)), "", TreeTable(columns, lines)]
    if report.moved:
        moved = collapse(report.moved, lambda m: m.name, lambda m: m.reason)
        left = [
            Row(
                g.segments,
                (g.items[0].reason, figures.span((m.relative_norm for m in g.items), ratios)),
                len(g.items),
            )
            for g in moved
        ]
        text = f"not in the adapter: {figures.plural(len(report.moved), 'weight')}"
        table = TreeTable([Column("", left=True), Column("‖ΔW‖/‖W‖")], left)
        parts += ["", Text(text, "yellow"), table]
    return View(parts)


def compressed_view(rows: Sequence[Compressed]) -> RenderableType:
    """The rank of each target before and after, and what was lost."""
    groups = collapse(rows, lambda r: r.target, lambda r: (r.before, r.rank))
    columns = [Column("rank"), Column("lost")]
    lines = [
        Row(
            g.segments,
            (
                f"{g.items[0].before} → {g.items[0].rank}",
                figures.most(r.error for r in g.items),
            ),
            len(g.items),
        )
        for g in groups
    ]
    return View([TreeTable(columns, lines)])


def diff_view(found: Diff) -> RenderableType:
    """Yes, or the list of what differs."""
    head = Text(found.a, "bold").append(" and ", "not bold").append(found.b)
    notes = [Text(note, "yellow") for note in found.notes]
    noun = "target" if found.kind == "adapters" else "weight"
    if found.same:
        words = "the same, bit for bit"
        if found.kind == "baked":
            words = "yes: it is base and adapter, bit for bit"
        verdict = Text(words, "bold green").append(
            f" ({figures.plural(found.compared, noun)})", "not bold"
        )
        return View([head, verdict, *notes])
    word = "no: " if found.kind == "baked" else ""
    verdict = Text(f"{word}{figures.plural(len(found.rows), noun)} differ", "bold red")
    verdict.append("s" * (len(found.rows) == 1)).append(
        f" of {found.compared:,} in both", "not bold"
    )
    groups = collapse(found.rows, lambda r: r.name, lambda r: (r.what, r.overlap is None))
    of_adapters = found.kind == "adapters"
    columns = [Column("", left=True), Column("‖a-b‖"), Column("‖a-b‖/‖b‖")]
    columns += [Column("overlap")] if of_adapters else [Column("changed"), Column("rank")]
    norms, ratios, overlaps = (
        figures.aligned(getattr(r, n) for r in found.rows) for n in ("norm", "ratio", "overlap")
    )

    def cells(rows: Sequence[Difference]) -> tuple[str, ...]:
        sizes = (
            figures.span((r.norm for r in rows), norms),
            figures.span((r.ratio for r in rows), ratios),
        )
        what = "" if rows[0].what == "values" and not of_adapters else rows[0].what
        if of_adapters:
            return (what, *sizes, figures.span((r.overlap for r in rows), overlaps))
        changed = sum(r.changed or 0 for r in rows)
        return (what, *sizes, figures.count(changed) if changed else "", _ranks(rows))

    lines = [Row(g.segments, cells(g.items), len(g.items)) for g in groups]
    return View([head, verdict, *notes, "", TreeTable(columns, lines)])


def _ranks(rows: Sequence[Difference]) -> str:
    """Of the differences that are matrices; empty for those of high rank."""
    known = [r.rank for r in rows]
    return "" if None in known else _span([r for r in known if r is not None])


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
