"""What `check` found, for the terminal."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from lora_param.consumers.judge import ITSELF, Finding
from lora_param.consumers.verdict import Verdict
from lora_param.report.layout import Indented, View

__all__ = ["verdict_view"]

_STYLES = {"accepted": "bold green", "differs": "bold yellow", "refused": "bold red"}
_WORDS = {"differs": "accepted, but differs"}


def verdict_view(verdict: Verdict) -> RenderableType:
    """One line for each who was asked about, and below it why, what to do, and where it says so."""
    head = Text(verdict.source, "bold").append(f": {verdict.about}", "not bold")
    parts: list[RenderableType] = [head]
    width = max(len(_name(c)) for c in verdict.consumers)
    for consumer in verdict.consumers:
        answer = verdict.answer(consumer)
        word = "no fault found" if (consumer, answer) == (ITSELF, "accepted") else answer
        line = Text(_name(consumer).ljust(width + 2)).append(
            _WORDS.get(answer, word), _STYLES[answer]
        )
        parts += ["", line]
        name = consumer.partition("==")[0]
        parts += [part for f in verdict.findings if f.consumer == name for part in _finding(f)]
    return View(parts)


def _name(consumer: str) -> str:
    return "the adapter" if consumer == ITSELF else consumer


def _finding(f: Finding) -> list[RenderableType]:
    versions = f" (versions {f.versions.strip('-')}{_side(f.versions)})" if f.versions else ""
    return [
        Indented(Text(f"{f.says[0].upper()}{f.says[1:]}{versions}."), 2),
        Indented(Text(f"→ {f.mend}"), 4),
        Indented(Text(f.source, "dim"), 4),
    ]


def _side(versions: str) -> str:
    if versions.endswith("-"):
        return " and later"
    return " and earlier" if versions.startswith("-") else ""
