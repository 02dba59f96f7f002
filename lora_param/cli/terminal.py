"""What every command shares: consoles, progress, JSON, and errors as one sentence."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from lora_param.errors import InternalError, LoraParamError

if TYPE_CHECKING:
    import typer
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["progress_bar", "run", "show", "show_json"]

_SHOW_AFTER = 1.0  # seconds before a progress bar appears
_TRACEBACK = "LORA_PARAM_TRACEBACK"  # set to anything, it shows where a bug of ours is


class Progress(Protocol):
    """How library calls report: work done, work in all, and what is being worked on."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


def run(app: typer.Typer) -> int:
    """Run the command line; exit status 0, 1 for a mistake, 2 for wrong usage, 70 for our bug."""
    import typer

    usage_error = typer.BadParameter.__mro__[2]  # Click's root, wherever this Typer keeps it
    try:
        status = app(prog_name="lora-param", standalone_mode=False)
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
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted.")
        return 130
    except Exception as error:
        if isinstance(error, usage_error):
            return _wrong_usage(error)
        if _TRACEBACK in os.environ:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        _say(f"{InternalError(what)} {_TRACEBACK}=1 shows where.")
        return 70
    return status if isinstance(status, int) else 0


def _wrong_usage(error: Any) -> int:
    """What Click says of the arguments, as one sentence and where to read on."""
    sentence = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # the help itself
    else:
        command = context.command_path if context is not None else "lora-param"
        _say(f"{sentence.rstrip('.')}. See {command} --help.")
    return 2


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
        if isinstance(item, str):  # names of files are no markup
            console.print(item, soft_wrap=True, markup=False, emoji=False)
        else:
            console.print(item)


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
