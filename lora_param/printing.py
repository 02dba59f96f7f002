"""What prints itself, or is drawn on a page.

Data stands above the views that show it, so it knows its view by name.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["Drawn", "Printed"]


class Printed:
    """Base of `Plan`, `Verification`, `BakeReport` and the like: printed by Rich, or as plain text.

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


class Drawn(Printed):
    """Base of `Stats` and `Diff`: also an HTML page.

    Attributes:
        page: name of the module and of the function in it that makes the page, in `report.page`.
    """

    page: ClassVar[tuple[str, str]]

    def to_html(self) -> str:
        """A page with heat maps of layer × projection and all values in tables.

        It needs nothing else: no script, no network. It follows the reader's light or dark mode
        and prints.

        Raises:
            MissingPackageError: Matplotlib or Jinja2 is not installed
                (`pip install 'lora_param[report]'`).
        """
        module, function = self.page
        text: str = getattr(import_module(f"lora_param.report.page.{module}"), function)(self)
        return text

    def write_html(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write what `to_html` gives to a file, atomically.

        Args:
            path: where it goes.
            force: replace a page that exists.

        Raises:
            MissingPackageError: Matplotlib or Jinja2 is not installed.
            OutputError: the file exists (without force) or is no page, or cannot be written.
        """
        rendering = import_module("lora_param.report.page.rendering")
        rendering.check_page(path, force=force)
        rendering.write_page(path, self.to_html(), force=force)
