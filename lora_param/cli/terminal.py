"""What every command shares: consoles, progress, JSON, and errors as one sentence."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from lora_param.errors import LoraParamError

if TYPE_CHECKING:
    import typer
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["progress_bar", "run", "show", "show_json"]

_SHOW_AFTER = 1.0  # seconds before a progress bar appears


class Progress(Protocol):
    """How library calls report: work done, work in all, and what is being worked on."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


def run(app: typer.Typer) -> int:
    """Run the command line; exit status 0, 1 for a mistake, 2 for wrong usage."""
    try:
        app(prog_name="lora-param")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except LoraParamError as error:
        _say(str(error))
        return 1
    except BrokenPipeError:
        # The reader has gone: keep the interpreter from failing on the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}.")
        return 1
    return 0


def _say(sentence: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("Error: ", "bold red"), sentence))


def show(*what: Any) -> None:
    """Print renderables or text to standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    for item in what:
        console.print(item, soft_wrap=isinstance(item, str))


def show_json(data: object) -> None:
    """Print one JSON document to standard output."""
    sys.stdout.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[Progress | None]:
    """A bar on standard error for what takes longer than a second; None without a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    start = time.monotonic()
    bar: RichProgress | None = None
    task: TaskID | None = None

    def report(done: int, total: int, what: str) -> None:  # noqa: ARG001  the protocol's
        nonlocal bar, task
        if bar is None:
            if time.monotonic() - start < _SHOW_AFTER:
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            bar = Progress(
                TextColumn(title),
                BarColumn(bar_width=None),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            bar.start()
            task = bar.add_task(title, total=total)
        assert task is not None
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        if bar is not None:
            bar.stop()
