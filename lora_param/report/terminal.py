"""Reports for the terminal: what `stats`, `apply --dry-run` and `bake` print.

Each view reads the same in colour, without it and in a pipe: state is said in words. Repeated
layers are one line, what all targets have in common stands above the table instead of in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from rich.console import RenderableType
from rich.text import Text

from lora_param.errors import escaped
from lora_param.report import figures
from lora_param.report.arithmetic import compressed_view, diff_view, extract_view
from lora_param.report.baked import bake_view
from lora_param.report.collapse import Group, collapse
from lora_param.report.layout import View, plain_text, remarks, share_line, split_common
from lora_param.report.stats import Stats, TargetRow, WeightRow
from lora_param.report.tree import Column, Facts, Row, TreeTable
from lora_param.report.verdict import verdict_view
from lora_param.report.verified import verification_view
from lora_param.targets.plan import LeftOut, PatternCount, Plan, PlannedTarget
from lora_param.targets.settings import SETTINGS

__all__ = ["bake_view", "plain_text", "plan_view", "share_line", "stats_view", "verdict_view"]
__all__ += ["compressed_view", "diff_view", "extract_view", "verification_view"]


# --- stats ------------------------------------------------------------------------------------


def stats_view(stats: Stats, *, weights: bool = True) -> RenderableType:
    """What is in a model, an adapter, or both.

    Args:
        stats: what to show.
        weights: also list the weights, where they are known.
    """
    parts: list[RenderableType] = []
    if stats.source:
        parts.append(Text(escaped(stats.source), "bold"))
    if stats.rows or not weights:
        parts.append(share_line(stats.trainable, stats.base, stats.percent))
        parts += _target_parts(stats.rows)
    parts += _warnings(stats)
    if weights and (stats.weights or not stats.rows):
        parts += ["", *_weight_parts(stats)] if stats.rows else _weight_parts(stats)
    parts += ["", *(Text(escaped(note), "dim") for note in stats.notes)] if stats.notes else []
    return View(parts)


def _target_parts(rows: Sequence[TargetRow]) -> list[RenderableType]:
    if not rows:
        return [Text("no targets: nothing is adapted", "yellow")]
    columns: list[tuple[str, Callable[[TargetRow], str]]] = [
        ("adapter", lambda r: r.adapter),
        ("variant", lambda r: "" if r.variant == "lora" else r.variant),
        ("rank", lambda r: str(r.rank)),
        ("alpha", lambda r: f"{r.alpha:g}"),
        ("scale", lambda r: f"{r.scale:g}"),
        ("dtype", lambda r: r.dtype),
    ]
    common, varying = split_common(rows, columns)
    groups = collapse(
        rows,
        lambda r: r.target,
        lambda r: (r.shape, r.words, *(show(r) for _, show in columns)),
    )
    # what is said of all of them is said once, by the count below
    marked = len({r.words for r in rows}) > 1
    shown = [
        Column("shape"),
        *(Column(n, left=n in ("adapter", "variant", "dtype")) for n, _ in varying),
    ]
    alone = not any(r.ratio is not None for r in rows)  # then ‖ΔW‖ is all there is of their size
    shown += [Column("trainable"), Column("‖ΔW‖", optional=not alone), Column("‖ΔW‖/‖W‖")]
    shown += [Column("eff. rank", optional=True)]
    measures: Sequence[Callable[[TargetRow], float | None]] = (
        lambda r: r.update_norm,
        lambda r: r.ratio,
        lambda r: r.effective_rank,
    )
    written = [(of, figures.aligned(map(of, rows))) for of in measures]
    shows = [show for _, show in varying]
    return [
        Facts([figures.plural(len(rows), "target"), *common]),
        "",
        TreeTable(shown, [_target_line(g, shows, written, marked) for g in groups]),
    ]


def _target_line(
    group: Group[TargetRow],
    varying: Sequence[Callable[[TargetRow], str]],
    written: Sequence[tuple[Callable[[TargetRow], float | None], figures.Write]],
    marked: bool,
) -> Row:
    first = group.items[0]
    return Row(
        group.segments,
        (
            figures.shape(first.shape),
            *(show(first) for show in varying),
            figures.count(sum(r.trainable for r in group.items)),
            *(figures.span(map(of, group.items), write) for of, write in written),
        ),
        len(group.items),
        first.words if marked else (),
    )


def _warnings(stats: Stats) -> list[RenderableType]:
    styles = {"warning": "yellow", "error": "bold red"}
    lines: list[RenderableType] = [Text(text, styles[kind]) for text, kind in remarks(stats)]
    return ["", *lines] if lines else []


def _weight_parts(stats: Stats) -> list[RenderableType]:
    columns: list[tuple[str, Callable[[WeightRow], str]]] = [
        ("dtype", lambda w: w.dtype),
        ("quantized as", lambda w: w.quantized),
    ]
    common, varying = split_common(stats.weights, columns)

    def adapted(row: WeightRow) -> str:
        parts = len(row.adapted)
        return "" if not parts else "LoRA" if parts == 1 else f"LoRA ×{parts}"

    groups = collapse(
        stats.weights, lambda w: w.name, lambda w: (w.shape, w.dtype, w.quantized, adapted(w))
    )
    shown = [Column("shape"), *(Column(n, left=True) for n, _ in varying), Column("elements")]
    lines = [
        Row(
            g.segments,
            (
                figures.shape(g.items[0].shape),
                *(show(g.items[0]) for _, show in varying),
                figures.count(sum(w.elements for w in g.items)),
                adapted(g.items[0]),
            ),
            len(g.items),
        )
        for g in groups
    ]
    facts = [f"{figures.count(sum(w.elements for w in stats.weights))} elements", *common]
    head = Facts([figures.plural(len(stats.weights), "weight"), *facts])
    return [head, "", TreeTable([*shown, Column("", left=True)], lines)]


# --- plan -------------------------------------------------------------------------------------


_ALWAYS = ("rank", "alpha", "init")  # shown in a plan even at their defaults


def _setting(planned: PlannedTarget, name: str) -> str:
    """A setting of a planned target; nothing for one at its default."""
    value = getattr(planned.settings, name)
    if value == SETTINGS[name].default and name not in _ALWAYS:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def plan_view(plan: Plan) -> RenderableType:
    """What `apply` would do: targets, counts of each pattern, what is left out, and the cost."""
    settings = {name: partial(_setting, name=name) for name in SETTINGS}
    columns: list[tuple[str, Callable[[PlannedTarget], str]]] = [
        *((name, settings.pop(name)) for name in ("variant", "rank", "alpha")),
        ("scale", lambda t: f"{t.settings.scale:g}"),
        *settings.items(),
        ("dtype", lambda t: t.weight.dtype),
        ("quantized as", lambda t: t.weight.quantized),
    ]
    common, varying = split_common(plan.targets, columns)
    groups = collapse(
        plan.targets,
        lambda t: str(t.target),
        lambda t: (t.weight.shape, _remarks(t), *(show(t) for _, show in columns)),
    )
    texts = {"dtype", "quantized as", *(n for n, s in SETTINGS.items() if s.kind is str)}
    words = [Column(n, left=n in texts) for n, _ in varying]
    lines = [
        Row(
            g.segments,
            (
                figures.shape(g.items[0].weight.shape),
                *(show(g.items[0]) for _, show in varying),
                figures.count(sum(t.trainable for t in g.items)),
            ),
            len(g.items),
            _remarks(g.items[0]),
        )
        for g in groups
    ]
    return View(
        [
            share_line(plan.trainable, plan.base, plan.percent).append(
                f", {figures.size(plan.factor_bytes)} in fp32"
            ),
            Facts([figures.plural(len(plan.targets), "target"), *common]),
            "",
            TreeTable([Column("shape"), *words, Column("trainable")], lines),
            "",
            TreeTable([Column("matched"), Column("", left=True)], _pattern_lines(plan.counts)),
            *_left_out_parts(plan.left_out),
        ]
    )


def _remarks(target: PlannedTarget) -> tuple[str, ...]:
    words = [] if target.asked is None else [f"rank {target.asked} asked"]
    words += [f"tied to {n}" for n in target.also] + [f"apart from {n}" for n in target.apart]
    return tuple(words)


def _pattern_lines(counts: Iterable[PatternCount]) -> list[Row]:
    return [
        Row(
            (c.pattern,),
            (
                figures.count(c.matched),
                "taken away"
                if c.pattern.startswith("!")
                else f"{figures.count(c.left_out)} left out"
                if c.left_out
                else "",
            ),
        )
        for c in counts
    ]


def _left_out_parts(left_out: Sequence[LeftOut]) -> list[RenderableType]:
    if not left_out:
        return []
    groups = collapse(left_out, lambda item: item.name, lambda item: item.reason)
    lines = [Row((g.name,), (g.items[0].reason,), len(g.items)) for g in groups]
    head = Text(f"left out: {figures.plural(len(left_out), 'weight')}")
    return ["", head, TreeTable([Column("", left=True)], lines)]
