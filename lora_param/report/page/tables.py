"""The tables of the page, with numbers at full precision in `data-` attributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from lora_param.report import figures
from lora_param.report.collapse import collapse
from lora_param.report.stats import Stats, TargetRow, WeightRow

__all__ = ["breakable", "target_table", "weight_table"]


def breakable(name: str) -> str:
    """A long name, with places where it may be broken."""
    text = escape(name)
    for mark in "./_":
        text = text.replace(mark, f"{mark}<wbr>")
    return text


def target_table(rows: Sequence[TargetRow]) -> Iterator[str]:
    """Every target with all its values."""
    several = len({r.adapter for r in rows}) > 1
    measured = [
        (label, field)
        for label, field in (
            ("‖ΔW‖/‖W‖", "ratio"),
            ("eff. rank", "effective_rank"),
            ("‖ΔW‖", "update_norm"),
            ("‖W‖", "weight_norm"),
        )
        if any(getattr(r, field) is not None for r in rows)
    ]
    heads = ["target", *(["adapter"] if several else []), *(label for label, _ in measured)]
    heads += ["rank", "scale", "trainable", "shape"]
    lines = []
    for i, row in enumerate(rows):
        words = ", ".join(row.words)
        mark = f"<em>{escape(words)}</em>" if words else ""
        cells = [f"<th scope=row>{breakable(row.target)}{mark}</th>"]
        cells += [f"<td class=word>{escape(row.adapter)}</td>"] if several else []
        for _, field in measured:
            value = getattr(row, field)
            name = "relative-norm" if field == "ratio" else field.replace("_", "-")
            shown = "" if value is None else figures.number(value)
            cells.append(f"<td data-{name}={_exact(value)}>{shown}</td>")
        cells += [
            f"<td data-rank={row.rank}>{row.rank}</td>",
            f"<td data-scale={row.scale!r}>{row.scale:g}</td>",
            f"<td data-trainable={row.trainable}>{figures.count(row.trainable)}</td>",
            f"<td>{figures.shape(row.shape)}</td>",
        ]
        lines.append(
            f'<tr id=t{i} data-target="{escape(row.target)}" data-adapter="{escape(row.adapter)}" '
            f'data-state="{escape(words)}">{"".join(cells)}</tr>'
        )
    left = {"target", "adapter"}
    head = "".join(
        f"<th scope=col{' class=word' if h in left else ''}>{escape(h)}</th>" for h in heads
    )
    yield (
        f"<section id=targets><h2>Targets<span class=measure>{figures.count(len(rows))}</span></h2>"
        f"<div class=wide tabindex=0 role=region aria-label=Targets><table><thead><tr>{head}</tr>"
        f"</thead><tbody>{''.join(lines)}</tbody></table></div>{_values(rows)}</section>"
    )


def _exact(value: float | None) -> str:
    return '""' if value is None else repr(value)


def _values(rows: Sequence[TargetRow]) -> str:
    """The singular values of every target, folded away."""
    lines = "".join(
        f'<tr data-spectrum-of="{escape(row.target)}" data-adapter="{escape(row.adapter)}">'
        f"<th scope=row>{breakable(row.target)}</th><td class=word>"
        f"{' '.join(f'{v:.4g}' for v in row.singular_values)}</td></tr>"
        for row in rows
        if row.singular_values
    )
    if not lines:
        return ""
    return (
        "<details><summary>Singular values</summary>"
        f"<div class=wide><table>{lines}</table></div></details>"
    )


def weight_table(stats: Stats) -> Iterator[str]:
    """The weights of the base, repeated layers in one line."""

    def adapted(row: WeightRow) -> str:
        return (
            f"LoRA ×{len(row.adapted)}" if len(row.adapted) > 1 else "LoRA" if row.adapted else ""
        )

    groups = collapse(stats.weights, lambda w: w.name, lambda w: (w.shape, w.dtype, adapted(w)))
    lines = "".join(
        f"<tr{' class=adapted' if g.items[0].adapted else ''}>"
        f"<th scope=row>{breakable(g.name)}</th><td>{len(g.items)}</td>"
        f"<td>{figures.shape(g.items[0].shape)}</td><td>{escape(g.items[0].dtype)}</td>"
        f"<td>{figures.count(sum(w.elements for w in g.items))}</td>"
        f"{f'<td class=word>{adapted(g.items[0])}</td>' if stats.rows else ''}</tr>"
        for g in groups
    )
    total = figures.count(sum(w.elements for w in stats.weights))
    head = "".join(f"<th scope=col>{h}</th>" for h in ("number", "shape", "dtype", "elements"))
    head += "<th></th>" if stats.rows else ""
    yield (
        f"<section><details{'' if stats.rows else ' open'}><summary>"
        f"{figures.plural(len(stats.weights), 'weight')} of the base, {total} elements</summary>"
        "<div class=wide><table><thead><tr><th scope=col class=word>weight</th>"
        f"{head}</tr></thead><tbody>{lines}</tbody></table></div>"
        "</details></section>"
    )
