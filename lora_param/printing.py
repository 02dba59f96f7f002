"""What prints itself. Data stands above the views that draw it, so it knows its view by name."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Printed"]


class Printed:
    """Base of `Plan`, `Stats`, `Verification` and `BakeReport`: printed by Rich, or as plain text.

    Neither the view nor Rich is imported before something is printed.

    Attributes:
        view: name of the function in `report.terminal` that draws it.
    """

    view: ClassVar[str]

    def _renderable(self) -> Any:
        return getattr(import_module("lora_param.report.terminal"), self.view)(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._renderable()

    def __str__(self) -> str:
        text: str = import_module("lora_param.report.layout").plain_text(self._renderable())
        return text
