"""What a verification found, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from lora_param.report import figures
from lora_param.report.collapse import collapse
from lora_param.report.data import Check
from lora_param.report.layout import View, plain_text
from lora_param.report.tree import Column, Row, TreeTable

__all__ = ["plain_text", "verification_view"]


def verification_view(checks: Sequence[Check], source: str = "") -> RenderableType:
    """Every check in a line, and below them what failed, by name."""
    total, bad = len(checks), [c for c in checks if not c.passed]
    head = Text()
    if source:
        head.append(source, "bold").append(": ")
    done = f"{total - len(bad)} of {figures.plural(total, 'check')} passed"
    head.append(done, "bold red" if bad else "bold green")
    lines = [Row((c.name,), ("passed" if c.passed else "FAILED", c.found)) for c in checks]
    table = TreeTable([Column("", left=True), Column("found", left=True)], lines)
    parts: list[RenderableType] = [head, "", table]
    for check in bad:
        expected = Text(check.name, "bold red").append(f": expected {check.expected}", "not bold")
        groups = collapse(check.failed.items(), lambda item: item[0], lambda item: item[1])
        named = [Row((g.name,), (), len(g.items), (g.items[0][1],)) for g in groups]
        parts += ["", expected, TreeTable([], named)]
    return View(parts)
