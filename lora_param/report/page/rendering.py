"""What every page needs: its packages, its templates, and a place where it may be written."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from lora_param.errors import MissingPackageError, OutputError
from lora_param.files.writer import check_output, replace_file
from lora_param.report import figures

__all__ = ["check_page", "render", "write_page"]

_DOCTYPE = "<!doctype html>"


def check_page(path: str | os.PathLike[str], *, force: bool = False) -> None:
    """Find out before anything is measured whether a page can be written.

    Args:
        path: where it is to go.
        force: a page that exists may be replaced.

    Raises:
        MissingPackageError: Matplotlib or Jinja2 is not installed.
        OutputError: there is a page (without force) or another file, or the directory is missing.
    """
    _need_packages()
    real = check_output(path, force=force)
    if real.exists():  # a model's or an adapter's name, by mistake: nothing else has a copy of it
        with real.open("rb") as file:
            found = file.read(len(_DOCTYPE)).decode("latin-1")
        if found and found.lower() != _DOCTYPE:
            raise OutputError(path, "it exists, and is not an HTML page")


def write_page(path: str | os.PathLike[str], text: str, *, force: bool = False) -> None:
    """Write a page, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with replace_file(path, force=force) as file:
        file.write(text.encode(errors="xmlcharrefreplace"))  # names may hold anything


def render(template: str, **values: Any) -> str:
    """A template beside this file, filled in.

    Raises:
        MissingPackageError: Matplotlib or Jinja2 is not installed.
    """
    _need_packages()
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    from lora_param.report.page.drawing import ramps

    def breakable(name: str) -> Markup:
        """A long name, with places where it may be broken."""
        text = Markup.escape(name)
        for mark in "./_":
            text = text.replace(mark, Markup(f"{mark}<wbr>"))
        return text

    templates = Environment(
        loader=PackageLoader("lora_param.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"breakable": breakable, "svg": Markup}
    templates.globals |= {"figures": figures, "ramps": ramps}
    return templates.get_template(template).render(**values)


def _need_packages() -> None:
    for module, package in (("matplotlib", "matplotlib"), ("jinja2", "Jinja2")):
        if importlib.util.find_spec(module) is None:
            raise MissingPackageError("the HTML report", package, "lora_param[report]")
