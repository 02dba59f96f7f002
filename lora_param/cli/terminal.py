"""What every command shares: consoles, progress, JSON, and errors as one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import typer
from typer.core import TyperCommand, TyperGroup

from lora_param.errors import InternalError, LoraParamError, at_command_line, escaped

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Command", "Group", "progress_bar", "run", "show", "show_json"]

_NARROW = 70  # columns below which help is written in one column
_SHOW_AFTER = 1.0  # seconds before a progress bar appears
_TRACEBACK = "LORA_PARAM_TRACEBACK"  # set to anything, it shows where a bug of ours is


class Progress(Protocol):
    """How library calls report: work done, work in all, and what is being worked on."""

    def __call__(self, done: int, total: int, what: str) -> None: ...


class _StoppedError(BaseException):
    """A signal asked us to end: raised where we are, so that temporary outputs are removed."""


def run(app: typer.Typer) -> int:
    """Run the command line; exit status 0, 1 for a mistake, 2 for wrong usage, 70 for our bug.

    A signal that ends it gives 128 and its number. With --json an error is one JSON document, too.
    """
    with at_command_line(), _stoppable():
        status, sentence = _call(app)
    if sentence:
        arguments = sys.argv[1:]
        end = arguments.index("--") if "--" in arguments else None
        _tell(sentence, json="--json" in arguments[:end])
    return status


def _call(app: typer.Typer) -> tuple[int, str]:
    """The exit status, and what went wrong."""
    usage_error = typer.BadParameter.__mro__[2]  # Click's root, wherever this Typer keeps it
    try:
        status = app(prog_name="lora-param", standalone_mode=False)
    except SystemExit as stop:
        return (stop.code if isinstance(stop.code, int) else 0), ""
    except LoraParamError as error:
        return 1, str(error)
    except BrokenPipeError:
        # The reader has gone: keep the interpreter from failing on the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return 1, f"{where}{error.strerror or error}."
    except _StoppedError as stop:
        (number,) = stop.args
        return 128 + number, "interrupted." if number == signal.SIGINT else "terminated."
    except (KeyboardInterrupt, typer.Abort):
        return 130, "interrupted."
    except Exception as error:
        if isinstance(error, usage_error):
            return 2, _wrong_usage(error)
        if _TRACEBACK in os.environ:
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return 70, f"{InternalError(what)} {_TRACEBACK}=1 shows where."
    if status == 130:  # so Typer ends a KeyboardInterrupt
        return 130, "interrupted."
    return (status if isinstance(status, int) else 0), ""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM raise, unless whoever started us has them ignored or handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        for one in before:  # a second one must not stop the cleaning up
            signal.signal(one, signal.SIG_IGN)
        raise _StoppedError(number)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) in usual]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wrong_usage(error: Any) -> str:
    """What Click says of the arguments, as one sentence and where to read on."""
    sentence = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # the help itself
        return ""
    command = context.command_path if context is not None else "lora-param"
    return f"{sentence.rstrip('.?')}. See {command} --help."


def _tell(sentence: str, *, json: bool) -> None:
    if json:
        try:
            show_json({"error": sentence})
            return
        except OSError:
            pass  # standard output is what failed
    _say(sentence)


def _say(sentence: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("Error: ", "bold red"), escaped(sentence)))


def show(*what: Any) -> None:
    """Print renderables or text to standard output.

    On a terminal, what is longer than its lines is broken; for a pipe no path or name ever is.
    """
    from rich.console import Console

    console = Console(highlight=False)
    whole: dict[str, Any] = {} if console.is_terminal else {"overflow": "ignore", "crop": False}
    for item in what:
        if isinstance(item, str):  # names of files are no markup
            console.print(escaped(item), soft_wrap=True, markup=False, emoji=False)
        else:
            console.print(item, **whole)


def show_json(data: object) -> None:
    """Print one JSON document to standard output, with what steers a terminal written out."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    ascii_only = (sys.stdout.encoding or "ascii").lower() in ("ascii", "us-ascii", "ansi_x3.4-1968")
    if ascii_only or not text.replace("\n", "").isprintable():
        text = "".join(
            c
            if c == "\n" or (c.isprintable() and not ascii_only) or " " <= c <= "~"
            # a code point beyond 16 bits is two escapes
            else json.dumps(c)[1:-1]
            for c in text
        )
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class _Readable:
    """Help for narrow terminals: what an option does below its name, not in a column beside it."""

    rich_markup_mode: Any

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help."""
        width = shutil.get_terminal_size().columns
        mode = self.rich_markup_mode
        if width < _NARROW:
            formatter.width = width
            formatter.write_dl = partial(formatter.write_dl, col_max=2, col_spacing=2)
            self.rich_markup_mode = None
        try:
            super().format_help(ctx, formatter)  # type: ignore[misc]
        finally:
            self.rich_markup_mode = mode


class Command(_Readable, TyperCommand):
    """A command."""

    def get_short_help_str(self, limit: int = 45) -> str:
        """Its first sentence, whole: it is wrapped, not cut."""
        return super().get_short_help_str(max(limit, 200))


class Group(_Readable, TyperGroup):
    """All commands."""


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
