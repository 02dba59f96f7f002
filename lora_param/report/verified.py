"""What a verification found, for the terminal."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from lora_param.report import figures
from lora_param.report.collapse import collapse
from lora_param.report.layout import View
from lora_param.report.tree import Column, Row, TreeTable
from lora_param.verification import Verification

__all__ = ["verification_view"]


def verification_view(found: Verification) -> RenderableType:
    """Every check in a line, and below them what failed, by name."""
    total, bad = len(found.checks), found.failures
    head = Text()
    if found.source:
        head.append(found.source, "bold").append(": ")
    done = f"{total - len(bad)} of {figures.plural(total, 'check')} passed"
    head.append(done, "bold red" if bad else "bold green")
    lines = [Row((c.name,), ("passed" if c.passed else "FAILED", c.found)) for c in found.checks]
    table = TreeTable([Column("", left=True), Column("found", left=True)], lines)
    parts: list[RenderableType] = [head, "", table]
    for check in bad:
        expected = Text(check.name, "bold red").append(f": expected {check.expected}", "not bold")
        groups = collapse(check.failed.items(), lambda item: item[0], lambda item: item[1])
        named = [Row((g.name,), (), len(g.items), (g.items[0][1],)) for g in groups]
        parts += ["", expected, TreeTable([], named)]
    return View(parts)
